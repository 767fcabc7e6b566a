from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.schema import DataConfig
from stoker.data import keep_tokenizer, open_rows, open_tokenizer, vocabulary
from stoker.data.cache import write_tokenizer
from stoker.data.tokenizer import JsonTokenizer, Tokenizer
from stoker.data.tokenizer_files import load_kept, load_tokenizer
from tests.data.conftest import cache_of
from tests.data.tiktokens import tiktoken_file

TEXTS = ["the stoker feeds the furnace", "the furnace moves the train", "über den Wolken"] * 4


def trained() -> JsonTokenizer:
    return JsonTokenizer.train(TEXTS, 300)


def tokenizer_json(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(trained().json)
    return folder / "tokenizer.json"


def with_another_end(folder: Path) -> Path:
    """A folder as transformers keeps it; its text ends with an end token, and encoding would add another."""
    values = json.loads(trained().json)
    values["added_tokens"][0]["content"] = "<|im_end|>"
    vocab = values["model"]["vocab"]
    vocab["<|im_end|>"] = vocab.pop("<|end_of_document|>")
    (folder / "hf").mkdir()
    (folder / "hf" / "tokenizer.json").write_text(json.dumps(values))
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder / "hf"


def gpt2_tiktoken(folder: Path) -> Path:
    return tiktoken_file(folder / "gpt2.tiktoken", 50256, b"th", b"the", b" f", b" st")


def kept_folder(folder: Path) -> Path:
    write_tokenizer(trained(), folder / "kept")
    return folder / "kept"


@pytest.fixture(params=[tokenizer_json, with_another_end, gpt2_tiktoken, kept_folder])
def path(request, tmp_path):
    return request.param(tmp_path)


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return (one.fingerprint, one.vocab_size, one.end_of_document, one.encode(TEXTS[0])) == (
        other.fingerprint,
        other.vocab_size,
        other.end_of_document,
        other.encode(TEXTS[0]),
    )


def test_any_text_comes_back_and_a_batch_is_its_texts_one_by_one(path):
    tokenizer = load_tokenizer(path)
    texts = [*TEXTS, "", "emoji \U0001f682 and \u00e9", "<|im_end|> <|endoftext|> <|end_of_document|>"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
        assert tokenizer.end_of_document not in ids and all(0 <= number < tokenizer.vocab_size for number in ids)


def test_it_is_loaded_again_from_what_a_run_keeps(path, tmp_path):
    tokenizer = load_tokenizer(path)
    write_tokenizer(tokenizer, tmp_path / "of-the-run")
    assert same(load_kept(tmp_path / "of-the-run"), tokenizer)


def test_the_characters_of_tokens_are_places_in_the_text(path):
    tokenizer = load_tokenizer(path)
    text = "the stoker \u00fcber the \U0001f682 train"
    ids, spans = tokenizer.encode_template(text)
    ends = [end for _, end in spans]
    assert len(ids) == len(ends) and ends == sorted(ends) and ends[-1] == len(text)
    assert all(begin <= end for (begin, _), (_, end) in zip(spans[1:], spans, strict=False))
    for number, end in enumerate(ends):
        decoded = tokenizer.decode(ids[: number + 1])
        assert "\ufffd" in decoded or decoded == text[:end]


def test_the_end_of_a_document_is_the_folders_or_the_configured_one(tmp_path):
    folder = with_another_end(tmp_path)
    expected = trained().end_of_document
    assert load_tokenizer(folder).end_of_document == expected
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"names no eos_token: data.end_of_document=TOKEN names one"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, "<|im_end|>").end_of_document == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "data.tokenizer=.*tokenizer.json: this is no tokenizer.json"),
        ("tokenizer.json", "[]", "data.tokenizer=.*it holds no JSON object"),
        ("a.tiktoken", "what is this\n", "data.tokenizer=.*a.tiktoken: this is no .tiktoken file"),
        ("a.model", "what is this\n", "data.tokenizer=.*a.model: transformers cannot read this folder"),
        ("missing", None, "data.tokenizer=.*missing: does not exist; use byte, bpe or the path of a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_one_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the folder has no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_run_keeps_its_tokenizer_and_needs_neither_the_data_nor_the_file(path, config, tmp_path):
    config.data.tokenizer = str(path)
    expected = open_tokenizer(config.data)
    assert vocabulary(config) == expected.vocab_size
    plan = open_rows(config, "train")
    first = plan.tokens.ids[: plan.tokens.starts[1]]
    assert expected.decode(first) in {text.read_text() for text in Path(config.data.path).iterdir()}
    keep_tokenizer(config.data, tmp_path / "kept-by-run")
    gone = DataConfig(tokenizer="/nowhere", path="/nowhere")
    assert same(open_tokenizer(gone, tmp_path / "kept-by-run"), expected)
    config.data = gone
    assert vocabulary(config, tmp_path / "kept-by-run") == expected.vocab_size


def test_another_tokenizer_is_another_cache(config, tmp_path):
    folders = {cache_of(config.data).folder}
    for make in (tokenizer_json, gpt2_tiktoken):
        config.data.tokenizer = str(make(tmp_path))
        folders.add(cache_of(config.data).folder)
    assert len(folders) == 3
