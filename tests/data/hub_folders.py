"""Small tokenizers in folders as transformers keeps them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = (
    *("<|begin|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|header|>", "<|/header|>", "<|eot|>"),
    *("<turn>", "</turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOLS]", "[/TOOLS]", "[RESULT]", "[/RESULT]"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
)
TEXTS = [
    "what is the colour of the sea\n\n",
    "it is blue and green and grey\n",
    "system user assistant tool model\n",
    '{"name": "weather", "arguments": {"place": "north"}}\n',
    "tell me about the weather in the north\n\n\n",
] * 20


@cache
def encoder_json() -> str:
    """A byte-level BPE with `SPECIALS`."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(TEXTS, trainer)
    return encoder.to_str()


def hub_folder(
    folder: Path, template: str | list[dict[str, str]] | None = None, files: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A folder with a tokenizer.json, a tokenizer_config.json of `config`, and more `files` (JSON values, or text)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(encoder_json())
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", "bos_token": "<|begin|>"} | config
    if template is not None:
        values["chat_template"] = template
    for name, content in {"tokenizer_config.json": values, **(files or {})}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder
