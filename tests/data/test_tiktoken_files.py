from __future__ import annotations

import base64
import json

import pytest

from stoker.data.cache import write_tokenizer
from stoker.data.tokenizer_files import load_kept, load_tokenizer
from tests.data.tiktokens import tiktoken_file

tiktoken = pytest.importorskip("tiktoken")

TEXT = "it is 1234567 and HELLO's ..\n\n  x\n we'll, \u00fcber \u65e5\u672c \U0001f682 "
TOKENS = [b"12", b"34", b"1234", b"56", b"123", b"123456", b"..", b"..\n", b"LO", b"LO'", b"\n\n", b"'ll", b"HE", b"'s"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Tokens, how texts are cut (that of tiktoken itself where it has it), the end of a document, its id, all ids.
PUBLISHED = {
    50256: (tiktoken.get_encoding, "gpt2", "<|endoftext|>", 50256, 50257),
    100256: (tiktoken.get_encoding, "cl100k_base", "<|endoftext|>", 100257, 100258),
    199998: (tiktoken.get_encoding, "o200k_base", "<|endoftext|>", 199999, 200019),
    128000: (None, LLAMA3, "<|end_of_text|>", 128001, 128256),
    151643: (None, LLAMA3.replace("{1,3}", ""), "<|endoftext|>", 151643, 151851),
}


def pattern_of(name: str) -> str:
    """The published pattern, from tiktoken's own source: its constructors would download the tokens."""
    from unittest import mock

    from tiktoken_ext import openai_public

    with (
        mock.patch.object(openai_public, "load_tiktoken_bpe", return_value={}),
        mock.patch.object(openai_public, "data_gym_to_mergeable_bpe_ranks", return_value={}),
    ):
        return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


@pytest.mark.long
@pytest.mark.parametrize("count", PUBLISHED)
def test_a_published_file_has_its_split_pattern_and_end(count, tmp_path):
    known, name, end, number, vocabulary = PUBLISHED[count]
    path = tiktoken_file(tmp_path / "a.tiktoken", count, *TOKENS)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in path.read_bytes().splitlines()}
    theirs = tiktoken.Encoding(
        "x", pat_str=pattern_of(name) if known else name, mergeable_ranks=ranks, special_tokens={}
    )
    ours = load_tokenizer(path)
    assert ours.encode(TEXT) == theirs.encode_ordinary(TEXT) and ours.decode(ours.encode(TEXT)) == TEXT
    assert (ours.end_of_document, ours.vocab_size) == (number, vocabulary)
    assert ours.encode_template(f"a{end}")[0][-1] == number and number not in ours.encode(f"a{end}")
    write_tokenizer(ours, tmp_path / "kept")
    assert load_kept(tmp_path / "kept").fingerprint == ours.fingerprint


def test_special_tokens_of_a_published_file_are_known_by_name(tmp_path):
    llama = load_tokenizer(tiktoken_file(tmp_path / "a.tiktoken", 128000), "<|eot_id|>")
    assert llama.end_of_document == 128009
    assert llama.encode_template("<|begin_of_text|><|start_header_id|>")[0] == [128000, 128006]
    qwen = load_tokenizer(tiktoken_file(tmp_path / "b.tiktoken", 151643))
    assert qwen.encode_template("<|im_start|><|im_end|>")[0] == [151644, 151645]
    with pytest.raises(ValueError, match=r"data.end_of_document=</s> is none of its special tokens, such as <\|begin"):
        load_tokenizer(tmp_path / "a.tiktoken", "</s>")


def test_another_file_needs_its_pattern_and_its_end(tmp_path):
    path = tiktoken_file(tmp_path / "a.tiktoken", 300, *TOKENS)
    refusal = r"it holds 300 tokens, which is none of the published files.*data.tiktoken_pattern=REGEX and data.end_of"
    for given in ({}, {"end_of_document": "</s>"}, {"tiktoken_pattern": LLAMA3}):
        with pytest.raises(ValueError, match=refusal):
            load_tokenizer(path, **given)
    ours = load_tokenizer(path, "</s>", r"\p{N}{1,2}|[^\p{N}]+")
    assert [ours.decode([number]) for number in ours.encode("1234")] == ["12", "34"]
    assert (ours.end_of_document, ours.vocab_size) == (300, 301)
    write_tokenizer(ours, tmp_path / "kept")
    assert load_kept(tmp_path / "kept").fingerprint == ours.fingerprint
    assert load_tokenizer(path, "</s>", r"\p{N}|[^\p{N}]+").fingerprint != ours.fingerprint
    with pytest.raises(ValueError, match=r"data.tiktoken_pattern=\(: "):
        load_tokenizer(path, "</s>", "(")


def test_a_file_kept_by_an_earlier_version_is_the_same_tokenizer(tmp_path):
    content = tiktoken_file(tmp_path / "a.tiktoken", 260).read_bytes()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "tokens.tiktoken").write_bytes(content)
    facts = {"kind": "tiktoken", "end_of_document": "<|endoftext|>", "pattern": r"\p{L}+|[^\p{L}]+"}
    (tmp_path / "kept" / "stoker.json").write_text(json.dumps(facts))
    kept = load_kept(tmp_path / "kept")
    assert (kept.end_of_document, kept.vocab_size) == (260, 261)
    assert kept.fingerprint == "tiktoken 35dde25c4e2c79b6 <|endoftext|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, lines[3]], "a token or a rank occurs in it twice"),
        (lambda lines: [*lines, b"AAAA 3"], "a token or a rank occurs in it twice"),
        (lambda lines: [*lines[:65], *lines[66:]], "it has no token for the byte 0x41"),
    ],
)
def test_a_file_that_is_damaged_is_refused(change, message, tmp_path):
    path = tiktoken_file(tmp_path / "a.tiktoken", 50256)
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(ValueError, match=f"data.tokenizer=.*a.tiktoken: this is no sound .tiktoken file: {message}"):
        load_tokenizer(path)
