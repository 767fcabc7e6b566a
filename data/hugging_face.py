"""Our tokenizers as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json

from stoker.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, str]:
    """Texts by file name; none for a tokenizer that transformers has no class for. `context`: tokens of a model."""
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
    return {"tokenizer.json": encoder, "tokenizer_config.json": json.dumps(words, indent=2)}


def _bytes_json() -> str:
    """The byte tokenizer as a byte-level BPE that knows no merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Encoder

    # Byte-level BPE (Radford et al. 2019) writes bytes as letters: those that can be seen as themselves, the others,
    # in order, as the letters from 256 on.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    vocabulary = {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(unseen)}
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    assert encoder.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.end_of_document
    return encoder.to_str()
