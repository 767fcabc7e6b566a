"""`stoker export --format gguf`: the model and its tokenizer in one file, for llama.cpp and what is built on it.

Names of tensors, keys and tokens are those of llama.cpp's own package `gguf`, which writes the file too. What it leaves
to its callers is here: which models it has names for, the order of rotary rows, and the name of a pre-tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stoker.conf.records import parse_json
from stoker.conf.values import ConfigError
from stoker.launch.importing.torchtitan import to_neighbours
from stoker.launch.tensor_files import Planned
from stoker.models.hugging_face_config import CONFIG

FILE = "model.gguf"
# By model_type: the architecture's name in the package, and whether its rotary embedding turns neighbouring channels.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16"}

# llama.cpp knows regular expressions of pre-tokenizers by name.
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PRE_TOKENIZERS = {f"{_WORDS}|\\p{{N}}{{1,3}}|{_ENDS}": "llama-bpe", f"{_WORDS}|\\p{{N}}|{_ENDS}": "qwen2"}
_GPT2 = "gpt-2"


def refuse_without_gguf() -> None:
    """Raises ConfigError where the package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--format gguf needs the package gguf, which is not installed: pip install 'stoker[gguf]'")


def write_gguf(folder: Path, tensors: Mapping[str, Planned], read: Callable[[str], Tensor], dtype: str) -> None:
    """Write `tensors`, by Hugging Face's names, to `folder`, which holds their config.json and tokenizer.

    `read` gives one by its name; one is in memory at a time. `dtype`: of matrices; vectors are fp32, as llama.cpp has
    them. Raises ValueError for a model or a tokenizer that llama.cpp has no name for.
    """
    import gguf

    config = json.loads((folder / CONFIG).read_text("utf-8"))
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type={kind!r}: --format gguf writes {', '.join(ARCHITECTURES)}")
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window is not None and window < config["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window={window} with max_position_embeddings={config['max_position_embeddings']}: llama.cpp "
            "would attend to all of them"
        )
    name, neighbours = ARCHITECTURES[kind]
    architecture = gguf.MODEL_ARCH[name]
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    extra = _add_shape(writer, config, dtype)
    _add_tokenizer(writer, folder, int(config["vocab_size"]))

    names = gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    matrices = gguf.GGMLQuantizationType[_DTYPES[dtype]]
    order = []
    for file, planned in tensors.items():
        found = names.get_name(file, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{file}: llama.cpp's {name} has no such tensor")
        order.append(file)
        _announce(writer, found, planned.shape, matrices if len(planned.shape) > 1 else gguf.GGMLQuantizationType.F32)
    for own, values in extra.items():
        _announce(writer, own, values.shape, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file in order:
        heads = _heads(config, file) if neighbours else None
        value = read(file)
        writer.write_tensor_data(_stored(value if heads is None else to_neighbours(value, heads), dtype))
    for values in extra.values():
        writer.write_tensor_data(values)
    writer.close()


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    """The entry of a tensor, whose data follow in the same order."""
    size = 4 if kind.name == "F32" else 2
    whole = int(np.prod(shape)) * size
    if kind.name == "BF16":  # NumPy has no such numbers: bytes
        writer.add_tensor_info(name, (*shape[:-1], shape[-1] * size), np.dtype(np.uint8), whole, raw_dtype=kind)
        return
    writer.add_tensor_info(name, shape, np.dtype(np.float32 if size == 4 else np.float16), whole)


def _stored(value: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    value = value.contiguous()
    if value.dim() == 1 or dtype == "fp32":
        return value.float().numpy()
    return value.half().numpy() if dtype == "fp16" else value.to(torch.bfloat16).view(torch.uint8).numpy()


def _heads(config: Mapping[str, Any], name: str) -> int | None:
    """How many heads of the tensor `name` have other rows in llama.cpp; None where they are the same."""
    heads = int(config["num_attention_heads"])
    of = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}
    return of.get(name.rpartition("self_attn.")[2].partition(".")[0])


def _add_shape(writer: Any, config: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    """The keys of the architecture. Returns tensors that it has beside the model's own."""
    import gguf

    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or width // heads)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_dim)
    return _add_rope(writer, config, head_dim)


def _add_rope(writer: Any, config: Mapping[str, Any], head_dim: int) -> dict[str, np.ndarray[Any, Any]]:
    import gguf

    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return {}
    if kind == "llama3":  # llama.cpp divides each frequency by a factor
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        values = {key: value for key, value in config.items() if key != "model_type"}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(str(config["model_type"]), **values), None)
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        return {"rope_freqs.weight": (plain / scaled.double()).float().numpy()}
    raise ValueError(f"rope_type={kind!r}: --format gguf writes default, linear and llama3")


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """The tokens of the folder's tokenizer, and as many more as the model has. Without a tokenizer there are none.

    Raises ValueError for a tokenizer that llama.cpp does not have.
    """
    from gguf import SpecialVocab, TokenType
    from gguf.vocab import BpeVocab, LlamaHfVocab

    path = folder / "tokenizer.json"
    if not path.is_file():
        if any(folder.glob("tokenizer*")):
            raise ValueError("the tokenizer has no tokenizer.json: --format gguf reads no other file")
        writer.add_tokenizer_model("no_vocab")
        return
    found = parse_json(path.read_text("utf-8"))
    vocabulary: Any = None
    try:
        if (found.get("decoder") or {}).get("type") == "ByteLevel":
            vocabulary, pre = BpeVocab(folder), pre_tokenizer_of(found)
        else:
            vocabulary, pre = LlamaHfVocab(folder), "default"
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer.json is none that the package gguf reads: {error}") from error
    tokens, scores, kinds = [], [], []
    special = {token["content"] for token in found.get("added_tokens") or [] if token.get("special")}
    for token, score, kind in vocabulary.all_tokens():
        content = token.decode() if isinstance(token, bytes) else token
        tokens.append(token)
        scores.append(score)
        kinds.append(TokenType.CONTROL if content in special and kind == TokenType.NORMAL else kind)
    if len(tokens) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, and the model {vocab_size}")
    for number in range(len(tokens), vocab_size):  # that the tokenizer never writes
        tokens.append(f"[PAD{number}]")
        scores.append(0.0)
        kinds.append(TokenType.UNUSED)
    writer.add_tokenizer_model(vocabulary.tokenizer_model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json. Raises ValueError for one that it does not have."""
    if not tokenizer["model"].get("merges"):
        return _GPT2  # each byte is a token, however a text is cut
    given = tokenizer.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    plain = [step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
    if patterns == [] and len(steps) == len(plain) == 1:
        return _GPT2
    if len(patterns) == 1 and not plain and patterns[0] in _PRE_TOKENIZERS and len(steps) == 2:
        return _PRE_TOKENIZERS[patterns[0]]
    known = ", ".join([_GPT2, *_PRE_TOKENIZERS.values()])
    raise ValueError(f"tokenizer.json cuts texts in a way that --format gguf has no name for: it knows {known}")
