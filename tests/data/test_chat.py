from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

from stoker.data.chat import CHATML
from stoker.data.tokenizer import ByteTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from tests.data.chat_styles import template
from tests.data.hub_folders import hub_folder
from tests.data.talks import CALL, HELLO, HI, MARKED, MORE, NO, SYSTEM, TALK, TOOL, encoded, learned_text, theirs
from tests.data.test_tokenizer_files import tokenizer_json
from tests.data.tiktokens import tiktoken_file

# What is learned.


def test_without_marks_a_reply_is_what_the_text_grows_by_after_its_opening():
    assert learned_text(TALK, CHATML) == "hi<|im_end|>\nno<|im_end|>\n"


def test_with_marks_the_text_between_them_is_trained_on():
    assert learned_text(TALK, MARKED) == "hi;no;"


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_a_text_that_ends_in_no_special_token_is_closed_and_the_end_is_learned_behind_a_reply(source):
    ids, learned = encoded(ByteTokenizer(), TALK, template=source)
    assert ids[-1] == ByteTokenizer.end_of_document and learned[-1] == 1
    assert encoded(ByteTokenizer(), TALK[:4], template=source)[1][-1] == 0


letters = st.text(st.characters(codec="utf-8"), max_size=8)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), letters), min_size=1, max_size=6)


@settings(max_examples=60)
@given(turns, st.sampled_from([CHATML, MARKED]))
def test_any_conversation_is_there_whole_and_learned_where_the_assistant_writes(turns, source):
    messages = [SYSTEM, *({"role": role, "content": content} for role, content in turns)]
    ids, _ = encoded(ByteTokenizer(), messages, template=source)
    spoken = [content + (";" if source == MARKED else "<|im_end|>\n") for role, content in turns if role != "user"]
    assert learned_text(messages, source) == "".join(spoken)
    whole = ByteTokenizer().decode(ids)
    assert all(content in whole for _, content in turns)


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True)])
@pytest.mark.parametrize(("source", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, ";")])
def test_a_reply_of_weight_0_is_written_and_not_learned(source, end, key, no, yes):
    weighed = [SYSTEM, HELLO, HI | {key: no}, MORE | {key: None}, NO | {key: yes}]
    assert learned_text(weighed, source) == f"no{end}"
    assert learned_text([SYSTEM, HELLO, HI | {key: yes}, MORE, NO | {key: no}], source) == f"hi{end}"
    ids, learned = encoded(ByteTokenizer(), [HELLO, HI | {key: no}], template=source)
    assert ids[-1] == ByteTokenizer.end_of_document and not any(learned)


def test_an_unknown_word_at_the_end_is_no_end(tmp_path):
    encoder = Encoder(models.WordLevel({"[UNK]": 0, "[END]": 1, "hello": 2}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.add_special_tokens(["[UNK]", "[END]"])
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "[END]")
    source = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert encoded(tokenizer, [HELLO, HI], template=source) == ([2, 0, 1], [0, 1, 1])
    ended = (
        "{{ messages[0]['content'] }} {% generation %}{{ messages[1]['content'] }} {{ eos_token }}{% endgeneration %}"
    )
    assert encoded(tokenizer, [HELLO, HI], template=ended) == ([2, 0, 1], [0, 1, 1])


# As transformers has it.


@pytest.mark.parametrize("marked", [True, False])
def test_a_special_token_that_the_template_ends_with_is_not_doubled(tmp_path, marked):
    folder = hub_folder(tmp_path / "hub", template("chatml", marked), eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    ids, learned = encoded(tokenizer, TALK)
    assert ids == theirs(folder, {"messages": TALK})[0]
    ends = [mark for number, mark in zip(ids, learned, strict=True) if number == tokenizer.end_of_document]
    assert ends == [0, 0, 1, 0, 1]  # one for each turn, learned behind each reply


def test_a_turn_that_nothing_ends_is_learned_up_to_the_special_token_that_follows(tmp_path):
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", template("glm-4", marked=False)))
    ids, learned = encoded(tokenizer, TALK)
    found = [number for number, mark in zip(ids, learned, strict=True) if mark]
    user, end = tokenizer.encode_template("<|user|>")[0][0], tokenizer.end_of_document
    assert found == [*tokenizer.encode("hi"), user, *tokenizer.encode("no"), end]


def test_a_token_that_begins_in_the_opening_and_ends_in_the_reply_is_learned_with_and_without_marks(tmp_path):
    talk, found = [HELLO, HI | {"content": "\n\nit"}], []
    for marked in (True, False):
        folder = hub_folder(tmp_path / str(marked), template("chatml", marked))
        ids, learned = encoded(load_tokenizer(folder), talk)
        found.append([number for number, mark in zip(ids, learned, strict=True) if mark])
    assert ids == theirs(tmp_path / "True", {"messages": talk})[0]
    assert found[1][: len(found[0])] == found[0] and load_tokenizer(folder).decode(found[0]) == "\n\n\nit"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("content", ["", " "])
def test_an_empty_reply_is_ended_too(tmp_path, content, marked):
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", template("glm-4", marked)))
    ids, learned = encoded(tokenizer, [HELLO, HI | {"content": content}, MORE, HI | {"content": content}])
    assert (ids[-1], learned[-1]) == (tokenizer.end_of_document, 1)
    user = tokenizer.encode_template("<|user|>")[0][0]
    assert marked or [mark for number, mark in zip(ids, learned, strict=True) if number == user] == [0, 1]


def test_special_tokens_named_in_special_tokens_map_reach_the_template(tmp_path):
    token = {"content": "<|sop|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    files = {
        "special_tokens_map.json": {"bos_token": token, "eos_token": "<|im_end|>"},
        "tokenizer_config.json": {"chat_template": "{{ bos_token }}" + template("chatml", marked=True)},
    }
    folder = hub_folder(tmp_path / "hub", files=files)
    ids, learned = encoded(load_tokenizer(folder), TALK)
    assert (ids, learned) == theirs(folder, {"messages": TALK})
    assert ids[0] == load_tokenizer(folder).encode_template("<|sop|>")[0][0]


def test_tools_and_calls_reach_the_template(tmp_path):
    folder = hub_folder(tmp_path / "hub", template("qwen-2.5", marked=True))
    answer = {"role": "tool", "content": "grey"}
    line = {"messages": [HELLO, {**HI, "content": None, "tool_calls": [CALL]}, answer, NO], "tools": [TOOL]}
    tokenizer = load_tokenizer(folder)
    ids, learned = encoded(tokenizer, line)
    assert (ids, learned) == theirs(folder, line)
    assert "of é" in tokenizer.decode(ids)
    assert encoded(tokenizer, line | {"tools": None})[0] != ids


def test_the_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    named = [
        {"name": "default", "template": MARKED},
        {"name": "tool_use", "template": "{{ 1 if tools else 0 }}" + MARKED},
    ]
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", named))
    without, line = encoded(tokenizer, TALK), {"messages": TALK, "tools": [TOOL]}
    assert encoded(tokenizer, line)[0] == [*tokenizer.encode("1"), *without[0]]
    assert encoded(tokenizer, TALK, template="default") == without
    assert tokenizer.decode(encoded(tokenizer, TALK, template="tool_use")[0]).startswith("0S:")


def test_variables_of_the_config_and_of_a_line_reach_the_template():
    source = "{{ mood }} {{ place }} {{ messages[0]['content'] }}"
    line = {"messages": [HELLO], "chat_template_kwargs": {"mood": "glad"}}
    ids, _ = encoded(ByteTokenizer(), line, template=source, variables={"mood": "sad", "place": "here"})
    assert ByteTokenizer().decode(ids) == "glad here hello"


def test_the_date_is_the_one_of_the_config_and_never_the_clocks():
    source = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    ids, _ = encoded(ByteTokenizer(), [HELLO], template=source, date="2026-01-31")
    assert ByteTokenizer().decode(ids) == "31 Jan 2026 hello"
    with pytest.raises(ValueError, match=r"line 1: .*it writes the date \(strftime_now\): data.args.date=YYYY-MM-DD"):
        encoded(ByteTokenizer(), [HELLO], template=source)


@pytest.mark.parametrize(
    ("given", "written"), [("ensure_ascii=False", "é"), ("ensure_ascii=True", "\\u00e9"), ("", "é")]
)
def test_json_is_written_with_the_templates_arguments(given, written):
    ids, _ = encoded(ByteTokenizer(), [HELLO], template="{{ ['é'] | tojson(" + given + ") }}")
    assert ByteTokenizer().decode(ids) == f'["{written}"]'


def test_private_use_characters_are_text(tmp_path):
    text = "tell \ue000\ue000me\ue001\ue001 about \U000f0000it\U000f0001"
    line = {"messages": [HELLO | {"content": text}, HI]}
    folder = hub_folder(tmp_path / "hub", template("chatml", marked=True))
    tokenizer = load_tokenizer(folder)
    ids, learned = encoded(tokenizer, line)
    assert (ids, learned) == theirs(folder, line) and text in tokenizer.decode(ids)
    assert learned_text(line, MARKED) == "hi;"


def test_contents_in_parts_are_written_by_chatml_and_by_templates_that_can():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert encoded(ByteTokenizer(), [HELLO | {"content": parts}, HI]) == encoded(ByteTokenizer(), [HELLO, HI])


@pytest.mark.parametrize("tokenizer", ["byte", "json", "tiktoken", "hub"])
@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_every_kind_of_tokenizer_trains_on_the_same_text(tokenizer, source, tmp_path):
    made: dict[str, Any] = {
        "byte": lambda: ByteTokenizer(),
        "json": lambda: load_tokenizer(tokenizer_json(tmp_path)),
        "tiktoken": lambda: load_tokenizer(tiktoken_file(tmp_path / "a.tiktoken", 300, b";U"), "</s>", r"[^;]+|;[^;]?"),
        "hub": lambda: load_tokenizer(hub_folder(tmp_path / "hub", source)),
    }
    found = made[tokenizer]()
    talk = [HELLO | {"content": "über \U0001f682"}, HI | {"content": "日本 ü"}, MORE, NO]
    ids, learned = encoded(found, talk, template=source)
    whole = found.decode(ids)
    assert "über \U0001f682" in whole
    taught = found.decode([number for number, mark in zip(ids, learned, strict=True) if mark])
    assert taught.replace(";U", ";") == learned_text(talk, source).replace(
        "<|im_end|>", "" if tokenizer == "hub" else "<|im_end|>"
    )
