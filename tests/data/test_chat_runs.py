"""Conversations in the data of a run, and prompts for a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from stoker.conf.schema import DataConfig
from stoker.data import open_rows, read_rows
from stoker.data.chat import CHATML, ChatEncoder, chat_prompt, settings_of
from stoker.data.tokenizer import ByteTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from stoker.parallel.batch import IGNORE_INDEX
from tests.data.chat_styles import template
from tests.data.counted import base, chat, conversations, write_lines
from tests.data.hub_folders import hub_folder
from tests.data.talks import HELLO, MARKED, SYSTEM, TALK, TOOL


def test_labels_of_rows_are_the_assistants_tokens_and_documents_are_apart(tmp_path):
    config = chat(tmp_path)
    plan = open_rows(config, "train")
    rows = read_rows(plan, range(plan.rows_per_epoch))
    learned = rows.labels != IGNORE_INDEX
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
