"""Conversations and chat templates that are refused, with the place and the reason."""

from __future__ import annotations

import json

import pytest

from stoker.conf.schema import DataConfig
from stoker.data import prepare
from stoker.data.chat import CHATML, settings_of
from stoker.data.tokenizer import ByteTokenizer
from tests.data.counted import base
from tests.data.talks import CALL, HELLO, HI, MARKED, TALK, TOOL, encoded

CHATML_OLD = "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n{% endfor %}"
REFUSED = {
    "an assistant that begins": (TALK[2:], CHATML, "the assistant begins, and the template does not mark"),
    "earlier turns rewritten": (
        TALK,
        "{{ messages | length }}" + CHATML,
        r"for message 3 changes when more follow: mark the assistant's text with \{% generation",
    ),
    "another end of the last reply": (
        TALK,
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{{ '!' if loop.last and m['role'] == 'assistant' else ';' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "for message 3 changes when more follow",
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
        "renders an empty list of tools differently",
    ),
    "weights below 0": (
        [HELLO, HI | {"weight": -0.5}],
        CHATML,
        "message 2 has the weight -0.5: expected a number from",
    ),
    "users to learn": ([HELLO | {"train": True}, HI], CHATML, "message 1 is to be trained on, and its role is 'user'"),
    "what the template refuses": (TALK, "{{ raise_exception('no') }}", "the chat template refuses it: no"),
    "what it fails on": (TALK, "{{ 1 / 0 }}", "the chat template refuses it: ZeroDivisionError"),
    "what the sandbox forbids": (TALK, "{{ ''.__class__.__mro__ }}", "refuses it: access to attribute"),
    "tools that are no list": ({"messages": TALK, "tools": "[]"}, MARKED, "its 'tools' is str, not list"),
    "half a character": ([HELLO | {"content": "\ud800"}, HI], CHATML, "surrogates not allowed"),
    "parameters of transformers": (
        {"messages": TALK, "chat_template_kwargs": {"max_length": 3}},
        CHATML,
        "'chat_template_kwargs' names max_length, which cannot be a variable of a template",
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
        ({"template": "{{ [1, 2] | random }}"}, "data.args.template: it writes another text each time"),
        ({"template": "{{ lipsum() }}"}, "data.args.template: it writes another text each time"),
        ({"template": "{{ 9 ** 9 }}"}, "data.args.template: it raises numbers to powers"),
        (
            {"template": "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ m() }}"},
            "inside a macro, a call, a set or a filter block",
        ),
        ({"date": "yesterday"}, "data.args.date=yesterday: expected a day as 2026-01-31"),
        ({"variables": {"tools": 1}}, "data.args.variables names tools, which cannot be a variable of a template"),
        ({"variables": "x"}, "data.args.variables=x: expected the template's variables by name"),
        ({"render_seconds": 0}, "data.args.render_seconds=0: must be above 0"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_error(args, message):
    with pytest.raises(ValueError, match=message):
        settings_of(DataConfig(args=args), None)


BOMBS = {
    "loops in loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.3 seconds"),
    "marks without end": (
        "{% for a in range(99999) %}{% generation %}x{% endgeneration %}{% endfor %}",
        "0.3 seconds",
    ),
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
