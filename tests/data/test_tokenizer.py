from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.data import open_rows, open_tokenizer, vocabulary
from stoker.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, Tokenizer
from tests.data.conftest import cache_of

TEXTS = ["the stoker feeds the furnace", "the furnace moves the train", "über den Wolken"] * 4
TOKENIZERS: dict[str, Tokenizer] = {"byte": ByteTokenizer(), "bpe": JsonTokenizer.train(TEXTS, 300)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@given(st.text())
def test_any_text_comes_back(text):
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= number < tokenizer.vocab_size for number in ids)


@given(st.lists(st.text(), max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts):
    for tokenizer in TOKENIZERS.values():
        batch = tokenizer.encode_batch(texts)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_no_text_encodes_to_the_end_of_a_document(tokenizer):
    text = f"one{END_OF_DOCUMENT}two"
    assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert tokenizer.end_of_document not in tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_and_reserved_ids_decode_to_nothing(tokenizer):
    ids = [*tokenizer.encode("ab"), tokenizer.end_of_document, tokenizer.vocab_size - 1, *tokenizer.encode("c")]
    assert tokenizer.decode(ids) == "abc"


def test_broken_utf8_decodes_to_replacement_characters(tokenizer):
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("ü")[:1]) or len(tokenizer.encode("ü")) == 1


def test_the_byte_vocabulary_divides_over_ranks():
    assert ByteTokenizer.vocab_size % 64 == 0 and ByteTokenizer.vocab_size > ByteTokenizer.end_of_document == 256


def test_bpe_has_merges_and_is_the_same_for_the_same_texts():
    bpe = JsonTokenizer.train(TEXTS, 300)
    assert bpe.json == TOKENIZERS["bpe"].json and bpe.fingerprint == TOKENIZERS["bpe"].fingerprint
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert JsonTokenizer.train(TEXTS, 280).fingerprint != bpe.fingerprint


def test_the_vocabulary_is_known_without_the_data(config):
    config.data.path = "/nowhere"
    assert vocabulary(config) == 320
    config.data.tokenizer, config.data.bpe_vocab = "bpe", 400
    assert vocabulary(config) == 400


def test_bpe_is_trained_once_on_training_documents_and_kept_in_the_cache(config):
    config.data.tokenizer, config.data.bpe_vocab = "bpe", 400
    tokens = open_rows(config, "train").tokens
    tokenizer = open_tokenizer(config.data)
    assert tokenizer.vocab_size == vocabulary(config) == 400
    texts = [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(tokens.starts, tokens.starts[1:], strict=False)]
    assert "furnace" in "".join(texts)
    assert tokens.ids[tokens.starts[1:] - 1].tolist() == [tokenizer.end_of_document] * (len(tokens.starts) - 1)
    assert (cache_of(config.data).folder / "tokenizer" / "tokenizer.json").exists()
    validation = open_rows(config, "validation").tokens
    assert (
        tokenizer.fingerprint
        == JsonTokenizer.train(
            [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(tokens.starts, [*tokens.starts[1:], None], strict=True)],
            400,
        ).fingerprint
    )
    assert len(validation.ids)
