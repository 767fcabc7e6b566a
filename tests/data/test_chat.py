from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.conf.schema import DataConfig
from stoker.data import chat_prompt, open_rows, prepare, read_rows
from stoker.data.chat import CHATML, ChatEncoder, settings_of, text_of
from stoker.data.tokenizer import ByteTokenizer, Tokenizer
from stoker.data.tokenizer_files import load_tokenizer
from stoker.parallel.rows import IGNORE
from tests.data.chat_styles import template
from tests.data.counted import base, chat, conversations, write_lines
from tests.data.hub_folders import hub_folder
from tests.data.test_tokenizer_files import tokenizer_json
from tests.data.tiktokens import tiktoken_file

transformers = pytest.importorskip("transformers")

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }};{% endgeneration %}"
    "{% else %}{{ m['role'][0] | upper }}:{{ m['content'] }};{% endif %}{% endfor %}"
)
SYSTEM, HELLO, HI = [
    {"role": role, "content": content}
    for role, content in (("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
]
MORE, NO = {"role": "user", "content": "more?"}, {"role": "assistant", "content": "no"}
TALK = [SYSTEM, HELLO, HI, MORE, NO]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "é"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of é", "parameters": {}}}


def encoded(tokenizer: Tokenizer, line: Any, **args: Any) -> tuple[list[int], list[int]]:
    """Ids and learned marks of a line of data; `args` are `data.args`."""
    line = line if isinstance(line, dict) else {"messages": line}
    encoder = ChatEncoder(settings_of(DataConfig(args=args), tokenizer), tokenizer)
    ids, learned = encoder.encode(tokenizer, "line 1", text_of(line, "messages"))
    return ids.tolist(), learned.tolist()


def learned_text(line: Any, source: str) -> str:
    ids, learned = encoded(ByteTokenizer(), line, template=source)
    return ByteTokenizer().decode([number for number, mark in zip(ids, learned, strict=True) if mark])


def theirs(folder: Path, line: dict[str, Any]) -> tuple[list[int], list[int]]:
    hub = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = hub.apply_chat_template(
        line["messages"], tools=line.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


# What is learned.


def test_without_marks_a_reply_is_what_the_text_grows_by_after_its_opening():
    assert learned_text(TALK, CHATML) == "hi<|im_end|>\nno<|im_end|>\n"


def test_with_marks_it_is_what_stands_between_them():
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
    named = [{"name": "default", "template": MARKED}, {"name": "tool_use", "template": "{{ tools }}" + MARKED}]
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
def test_json_is_written_as_the_template_asks(given, written):
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
def test_every_kind_of_tokenizer_learns_the_same_text(tokenizer, source, tmp_path):
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


# What is refused.

CHATML_OLD = "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
REFUSED = {
    "an assistant that begins": (TALK[2:], CHATML, "the assistant begins, and the template does not mark"),
    "earlier turns rewritten": (
        TALK,
        "{{ messages | length }}" + CHATML,
        r"for message 3 changes when more follow: mark what the assistant writes with \{% generation",
    ),
    "a heading that is not written alone": (TALK, CHATML_OLD, "it writes a heading before a reply"),
    "tools left out": ({"messages": TALK, "tools": [TOOL]}, CHATML, "has tools, and the template does not write them"),
    "calls left out": ([HELLO, HI | {"content": None, "tool_calls": [CALL]}], CHATML, "message 2 has tool_calls, and"),
    "documents left out": ({"messages": TALK, "documents": [{"text": "x"}]}, CHATML, "has documents, and the template"),
    "thoughts left out": (
        [HELLO, HI | {"thinking": "hm"}],
        CHATML,
        "message 2 has thinking, and the template does not",
    ),
    "parts printed by Python": (
        [HELLO | {"content": [{"type": "text", "text": "x"}]}, HI],
        MARKED,
        "the content of message 1 is a list of parts, which the template cannot write",
    ),
    "parts that are no text": ([HELLO | {"content": [{"type": "image"}]}, HI], CHATML, "a part of type image"),
    "no content": ([HELLO | {"content": None}, HI], CHATML, "a message of user has no content"),
    "no tools in a list": (
        {"messages": [HELLO], "tools": []},
        "{{ tools }}",
        "writes an empty list of tools in another way",
    ),
    "weights between": ([HELLO, HI | {"weight": 0.5}], CHATML, "message 2 has the weight 0.5: 0 and 1 are known"),
    "users to learn": ([HELLO | {"train": True}, HI], CHATML, "message 1 is to be learned, and its role is 'user'"),
    "what the template refuses": (TALK, "{{ raise_exception('no') }}", "the chat template refuses it: no"),
    "what it fails on": (TALK, "{{ 1 / 0 }}", "the chat template refuses it: ZeroDivisionError"),
    "what the sandbox forbids": (TALK, "{{ ''.__class__.__mro__ }}", "refuses it: access to attribute"),
    "tools that are no list": ({"messages": TALK, "tools": "[]"}, MARKED, "its 'tools' is str, not list"),
    "half a character": ([HELLO | {"content": "\ud800"}, HI], CHATML, "surrogates not allowed"),
    "parameters of transformers": (
        {"messages": TALK, "chat_template_kwargs": {"max_length": 3}},
        CHATML,
        "'chat_template_kwargs' names max_length, which is no variable of a template",
    ),
    "no message": ([], CHATML, "a conversation has at least one message"),
    "no role": ([{"content": "x"}], CHATML, "messages are objects with a 'role'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversation_is_refused_by_file_line_and_reason(name, tmp_path):
    line, source, reason = REFUSED[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(line if isinstance(line, dict) else {"messages": line}) + "\n")
    args, path = {"template": source}, str(tmp_path / "a.jsonl")
    config = base(tmp_path, 64, target="stoker.data.chat:open_source", path=path, args=args, validation=0.0)
    with pytest.raises(ValueError, match=rf"(?s)a.jsonl \(line .*\).*{reason}"):
        prepare(config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"template": "{% if %}"}, "data.args.template: it is no Jinja template"),
        ({"template": "nowhere.jinja"}, "cannot read data.args.template=nowhere.jinja"),
        ({"template": "{{ [1, 2] | random }}"}, "data.args.template: it writes something else each time"),
        ({"template": "{{ lipsum() }}"}, "data.args.template: it writes something else each time"),
        ({"template": "{{ 9 ** 9 }}"}, "data.args.template: it raises numbers to powers"),
        (
            {"template": "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ m() }}"},
            "inside a macro, a call, a set or a filter block",
        ),
        ({"date": "yesterday"}, "data.args.date=yesterday: expected a day as 2026-01-31"),
        ({"variables": {"tools": 1}}, "data.args.variables names tools, which is no variable of a template"),
        ({"variables": "x"}, "data.args.variables=x: expected the template's variables by name"),
        ({"render_seconds": 0}, "data.args.render_seconds=0: must be above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_error(args, message):
    with pytest.raises(ValueError, match=message):
        settings_of(DataConfig(args=args), None)


BOMBS = {
    "loops in loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.3 seconds"),
    "doubled text": (
        "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "memory",
    ),
    "long text": ("{% for a in range(9999) %}{{ 'x' * 999 }}{% endfor %}", "it writes more than 1 MB"),
    "repeated text": ("{{ 'x' * 99999999999 }}", "memory"),
    "wide text": ("{{ '%99999999999d' % 1 }}", "memory|Error"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_stopped_and_named(name):
    source, reason = BOMBS[name]
    with pytest.raises(ValueError, match=rf"(?s)line 1: the chat template.*({reason})"):
        encoded(ByteTokenizer(), [HELLO], template=source, render_seconds=0.3, render_megabytes=1)
    assert encoded(ByteTokenizer(), [HELLO], template="{{ 'x' * 9999 }}", render_megabytes=1)[0][0] == ord("x")


# In a run.


def test_labels_of_rows_are_the_assistants_tokens_and_documents_are_apart(tmp_path):
    config = chat(tmp_path)
    plan = open_rows(config, "train")
    rows = read_rows(plan, range(plan.rows_per_epoch))
    learned = rows.labels != IGNORE
    assert plan.document_mask and int(learned.sum()) == int(plan.tokens.learned.sum())
    assert 0.1 < learned.float().mean() < 0.9
    taught = ByteTokenizer().decode(rows.labels[learned].tolist())
    assert "user" not in taught and "<|im_end|>" in taught


def test_the_default_template_is_the_tokenizers(tmp_path):
    config = chat(tmp_path)
    config.data.tokenizer = str(hub_folder(tmp_path / "hub", "{{ eos_token }}{{ messages[0]['content'] }}" + MARKED))
    tokens = open_rows(config, "train").tokens
    assert tokens.ids[0] == tokens.ids[tokens.starts[1]] == load_tokenizer(tmp_path / "hub").end_of_document


def test_what_is_learned_is_kept_beside_the_tokens(tmp_path):
    config = chat(tmp_path)
    open_rows(config, "train")
    (found,) = Path(config.data.cache).glob("*/train.learned")
    assert set(np.fromfile(found, np.uint8)) == {0, 1}


def test_all_that_changes_ids_or_marks_changes_the_fingerprint(tmp_path):
    def fingerprint(folder: str, source: Any = None, files: Any = None, args: Any = None, **config: Any) -> str:
        tokenizer = load_tokenizer(hub_folder(tmp_path / folder, source, files, **config))
        return ChatEncoder(settings_of(DataConfig(args=args or {}), tokenizer), tokenizer).fingerprint

    one = fingerprint("a", MARKED)
    assert one == fingerprint("same", MARKED) == fingerprint("named", files={"chat_template.jinja": MARKED})
    assert one.endswith(" transformers " + ".".join(transformers.__version__.split(".")[:2]))
    assert fingerprint("long", MARKED, model_max_length=9, args={"render_seconds": 9}) == one
    other_json = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    other_json["pre_tokenizer"]["trim_offsets"] = not other_json["pre_tokenizer"]["trim_offsets"]
    changed = [
        fingerprint("b", MARKED + " "),
        fingerprint("c", MARKED, args={"template": CHATML}),
        fingerprint("d", MARKED, args={"variables": {"mood": "sad"}}),
        fingerprint("e", MARKED, args={"date": "2026-01-31"}),
        fingerprint("f", MARKED, eos_token="<|eot|>"),
        fingerprint("g", MARKED, files={"additional_chat_templates/tool_use.jinja": "x"}),
        fingerprint("h", MARKED, files={"tokenizer.json": other_json}),
        fingerprint("i", MARKED, sep_token="<|im_sep|>"),
    ]
    assert len({one, *changed}) == 1 + len(changed)


def test_another_template_is_another_cache(tmp_path):
    config = chat(tmp_path)
    before = open_rows(config, "train").tokens.ids
    (tmp_path / "t.jinja").write_text(MARKED)
    config.data.args = {"template": str(tmp_path / "t.jinja")}
    assert len(open_rows(config, "train").tokens.ids) < len(before)


def test_tools_of_a_line_are_part_of_its_text(tmp_path):
    lines = [{**line, "tools": [TOOL]} for line in conversations(30)]
    write_lines(tmp_path / "chats" / "a.jsonl", lines)
    path, args = str(tmp_path / "chats"), {"template": template("qwen-2.5", marked=True)}
    config = base(tmp_path, 512, target="stoker.data.chat:open_source", path=path, args=args, packing="best_fit")
    tokens = open_rows(config, "train").tokens
    assert b"of \xc3\xa9" in bytes(tokens.ids[: tokens.starts[1]].tolist()[:-1])


# To a reply.


def test_a_prompt_is_a_users_turn_with_the_opening_of_a_reply(tmp_path):
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", template("qwen-2.5", marked=False)))
    ids, stop = chat_prompt(DataConfig(), tokenizer, "hello", "be brief")
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", local_files_only=True)
    assert ids == hub.apply_chat_template([SYSTEM, HELLO], add_generation_prompt=True)["input_ids"]
    assert stop == {tokenizer.end_of_document, *tokenizer.encode_template("<|im_end|>")[0]}
    talk = {"messages": [HELLO], "tools": [TOOL]}
    ids, _ = chat_prompt(DataConfig(), tokenizer, json.dumps(talk))
    assert ids == hub.apply_chat_template([HELLO], tools=[TOOL], add_generation_prompt=True)["input_ids"]
    assert (
        chat_prompt(DataConfig(), tokenizer, json.dumps(TALK[:2]))[0]
        == chat_prompt(DataConfig(), tokenizer, "hello", "be brief")[0]
    )


@pytest.mark.parametrize(
    ("style", "ends"),
    [
        ("glm-4", ["<|user|>"]),
        ("gpt-oss", ["<|return|>", "<|end|>"]),
        ("llama-3", ["<|eot|>"]),
        ("gemma-3", ["</turn>"]),
        ("mistral", []),
    ],
)
def test_a_reply_ends_with_what_the_template_writes_behind_one(style, ends, tmp_path):
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", template(style, marked=False)))
    _, stop = chat_prompt(_dated(), tokenizer, "hello")
    assert stop == {tokenizer.end_of_document, *(tokenizer.encode_template(end)[0][0] for end in ends)}


def _dated() -> DataConfig:
    return DataConfig(target="stoker.data.chat:open_source", args={"date": "2026-01-31"})


def test_a_prompt_that_the_template_refuses_is_one_clear_error(tmp_path):
    tokenizer = load_tokenizer(hub_folder(tmp_path / "hub", "{{ raise_exception('no') }}"))
    with pytest.raises(ValueError, match="the chat template refuses the prompt: no"):
        chat_prompt(DataConfig(), tokenizer, "hello")
