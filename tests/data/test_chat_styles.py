"""Conversations of all kinds in templates of all styles: ids and learned tokens are transformers', or are refused.

A template that marks replies is compared with transformers' own mask. One that does not is compared with the mask that
transformers gives for the same template with marks: prefixes may add to it only what follows a reply's own end.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import transformers

from stoker.conf.schema import DataConfig
from stoker.data.chat import ChatEncoder, settings_of
from stoker.data.chat_shapes import text_of
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from tests.data.chat_styles import STYLES, a_conversation, template
from tests.data.hub_folders import hub_folder
from tests.extent import some

DAY = datetime(2026, 1, 31)


class Day(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return DAY


def theirs(hub: Any, line: dict[str, Any], source: str) -> tuple[list[int], list[int]]:
    """What transformers makes of a line: ids and mask."""
    with mock.patch("transformers.utils.chat_template_utils.datetime", Day):
        found = hub.apply_chat_template(
            line["messages"],
            tools=line.get("tools"),
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **line.get("chat_template_kwargs", {}),
        )
    return found["input_ids"], found["assistant_masks"]


def compare(folder: Path, style: str, marked: bool, count: int, seed: int) -> Counter[str]:
    """How many of `count` conversations are equal, and refused by whom. Fails at the first unreported difference."""
    tokenizer = load_tokenizer(hub_folder(folder, template(style, marked)))
    assert isinstance(tokenizer, HubTokenizer)
    hub = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = ChatEncoder(settings_of(DataConfig(args={"date": "2026-01-31"}), tokenizer), tokenizer)
    found: Counter[str] = Counter()
    for number in range(count):
        line = a_conversation(random.Random(f"{seed} {number}"))
        try:
            ((ids, learned),) = encoder.encode(tokenizer, "line", text_of(line, "messages"))
        except ValueError as error:
            found["refused" if "line: the chat template refuses it: " in str(error) else str(error)] += 1
            continue
        their_ids, mask = theirs(hub, line, template(style, marked=True))
        assert ids.tolist() in (their_ids, [*their_ids, tokenizer.end_of_document]), (style, line)
        expected, learned = np.array(mask, bool), learned[: len(their_ids)].astype(bool)
        if marked:
            assert learned.tolist() == expected.tolist(), (style, line)
        else:
            assert_grown_by_ends(tokenizer, np.array(their_ids), expected, learned, line)
        found["equal"] += 1
    assert set(found) <= {"equal", "refused"}, found
    return found


def assert_grown_by_ends(
    tokenizer: HubTokenizer, ids: np.ndarray, expected: np.ndarray, learned: np.ndarray, line: dict[str, Any]
) -> None:
    """What is learned is what is expected, more ends and spaces behind replies, and no more stretches than replies."""
    opened = tokenizer.decode(ids[expected & ~learned])  # by a template that opens a reply with no thoughts
    assert not "".join(opened.split()).replace("<think></think>", ""), (line, opened)
    for number in ids[learned & ~expected].tolist():
        assert number in tokenizer.special_ids or not tokenizer.decode([number]).strip(), line
    replies = sum(message["role"] == "assistant" for message in line["messages"])
    assert np.count_nonzero(np.diff(learned, prepend=False) & learned) <= replies, line


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_written_and_learned_as_by_transformers_or_refused(style, marked, tmp_path):
    found = compare(tmp_path / "hub", style, marked, count=25, seed=0)
    assert found["equal"] >= 3, found


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("style", some(list(STYLES), 3))
def test_two_thousand_conversations_are_too(style, marked, tmp_path):
    found = compare(tmp_path / "hub", style, marked, count=2000, seed=1)
    print(f"{style} {'marked' if marked else 'unmarked'}: {dict(found)}")
    assert found["equal"] >= 200, found
