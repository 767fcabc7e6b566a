"""Our tokenizers as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json

from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer, byte_encoder

_NOT_OF_THE_TOKENIZER = ("config.json", "stoker.json")  # the model's, and ours


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Contents by file name; empty for a tokenizer that transformers has no class for. `context`: tokens of a model.

    A tokenizer that was read from a folder of transformers is written unchanged.
    """
    if isinstance(tokenizer, HubTokenizer):
        return {name: content for name, content in tokenizer.files().items() if name not in _NOT_OF_THE_TOKENIZER}
    if isinstance(tokenizer, ByteTokenizer):
        encoder, end = _bytes_json(), END_OF_DOCUMENT
    elif isinstance(tokenizer, JsonTokenizer):
        encoder, end = tokenizer.json, tokenizer.end_token
    else:
        return {}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": encoder.encode(), "tokenizer_config.json": json.dumps(words, indent=2).encode()}


def _bytes_json() -> str:
    from tokenizers import AddedToken

    encoder = byte_encoder()
    encoder.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    assert encoder.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.end_of_document
    return encoder.to_str()
