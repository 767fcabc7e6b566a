from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.data.cache import write_tokenizer
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.hugging_face import tokenizer_files
from stoker.data.tokenizer import JsonTokenizer
from stoker.data.tokenizer_files import load_kept, load_tokenizer
from tests.data.hub_folders import SPECIALS, encoder_json, hub_folder

NAMED = {"content": "<|turn|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
FOLDERS = {
    "plain": {},
    "token that is only in the config": {"pad_token": "<|pad|>"},
    "tokens in special_tokens_map.json": {
        "files": {"special_tokens_map.json": {"bos_token": NAMED, "eos_token": "<|eot|>"}}
    },
    "tokens in added_tokens.json": {"files": {"added_tokens.json": {"<|more|>": 480}}},
    "begin and end added": {"add_bos_token": True, "add_eos_token": True},
}
some_text = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(SPECIALS), st.just("the colour"))).map("".join)


def loaded(folder: Path) -> HubTokenizer:
    found = load_tokenizer(folder)
    assert isinstance(found, HubTokenizer)
    return found


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub"), **FOLDERS[request.param])


@pytest.fixture(scope="module")
def both(folder):
    return loaded(folder), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@settings(max_examples=60)
@given(text=some_text)
def test_ids_are_those_of_transformers(both, text):
    ours, theirs = both
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ours.encode_template(text) == (expected["input_ids"], expected["offset_mapping"])
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode(text) == plain == ours.encode_batch(["x", text])[1].tolist()
    assert not set(plain) & ours.special_ids and max(plain, default=0) < ours.vocab_size


def test_special_tokens_are_found_where_transformers_finds_them(folder):
    ours, theirs = loaded(folder), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert ours.end_of_document == theirs.eos_token_id and ours.vocab_size == len(theirs)
    assert ours.renderer.backend.special_tokens_map == theirs.special_tokens_map


def test_what_is_kept_is_the_same_tokenizer_and_its_files_are_those_of_the_folder(folder, tmp_path):
    ours = loaded(folder)
    write_tokenizer(ours, tmp_path / "kept")
    kept = load_kept(tmp_path / "kept")
    assert (kept.fingerprint, kept.renderer.fingerprint) == (ours.fingerprint, ours.renderer.fingerprint)
    for path in folder.iterdir():
        assert tokenizer_files(kept, 64)[path.name] == path.read_bytes()


def test_templates_of_a_folder_are_kept_too(tmp_path):
    files = {"chat_template.jinja": "{{ 1 }}", "additional_chat_templates/tool_use.jinja": "{{ 2 }}"}
    ours = loaded(hub_folder(tmp_path / "hub", "{{ 0 }}", files))
    assert ours.hub.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    write_tokenizer(ours, tmp_path / "kept")
    kept = load_kept(tmp_path / "kept")
    assert isinstance(kept, HubTokenizer) and kept.hub.chat_template == ours.hub.chat_template


def test_a_folder_that_transformers_takes_as_it_is_has_the_fingerprint_of_its_file(tmp_path):
    ours = loaded(hub_folder(tmp_path / "hub"))
    assert ours.fingerprint == JsonTokenizer(encoder_json(), "<|eos|>").fingerprint
    changed = loaded(hub_folder(tmp_path / "other", pad_token="<|pad|>"))
    assert changed.fingerprint != JsonTokenizer(encoder_json(), "<|eos|>").fingerprint


def test_truncation_and_padding_in_the_file_are_left_aside(tmp_path):
    values = json.loads(encoder_json())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    ours = loaded(hub_folder(tmp_path / "hub", files={"tokenizer.json": values}))
    text = "what is the colour of the sea"
    assert ours.encode(text) == ours.encode_template(text)[0] == loaded(hub_folder(tmp_path / "b")).encode(text)
    assert len(ours.encode(text)) > 4


def test_code_in_a_folder_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    folder = hub_folder(tmp_path / "hub", files={"tokenization_x.py": code}, **auto)
    with pytest.raises(ValueError, match=r"data.tokenizer=.*hub: transformers cannot read this folder"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def sentencepiece_model() -> bytes:
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(piece, 1) for piece in ("\u2581t", "\u2581th", "he", "\u2581the", "is", *"\u2581theisabc")]
    for rank, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = True, False
    return model.SerializeToString()


@pytest.mark.parametrize("text", ["the is abc", "  the  is\n x", "", "\u00e9\u65e5 this", "the</s>"])
def test_a_sentencepiece_model_is_read_as_by_its_own_library(text, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "a.model").write_bytes(sentencepiece_model())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    ours = load_tokenizer(tmp_path / "a.model")
    assert ours.encode(text) == theirs.encode(text) and ours.end_of_document == theirs.eos_id() == 2
    write_tokenizer(ours, tmp_path / "kept")
    assert load_kept(tmp_path / "kept").encode(text) == theirs.encode(text)


def test_without_the_package_a_sentencepiece_model_is_refused_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.model").write_bytes(sentencepiece_model())
    monkeypatch.setattr("stoker.data.hub_tokenizer.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("transformers.convert_slow_tokenizer.requires_backends", _refuse)
    with pytest.raises(ValueError, match=r"needs the package sentencepiece: pip install 'stoker\[sentencepiece\]'"):
        load_tokenizer(tmp_path / "a.model")


def _refuse(*_: object) -> None:
    raise ImportError("no sentencepiece")
