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

from stoker.conf.schema import DataConfig
from stoker.data.chat import ChatEncoder, settings_of, text_of
from stoker.data.hub_tokenizer import HubTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from tests.data.chat_styles import STYLES, a_conversation, template
from tests.data.hub_folders import hub_folder

transformers = pytest.importorskip("transformers")
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
    """How many of `count` conversations are equal, and refused by whom. Fails at the first silent difference."""
    tokenizer = load_tokenizer(hub_folder(folder, template(style, marked)))
    assert isinstance(tokenizer, HubTokenizer)
    hub = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = ChatEncoder(settings_of(DataConfig(args={"date": "2026-01-31"}), tokenizer), tokenizer)
    found: Counter[str] = Counter()
    for number in range(count):
        line = a_conversation(random.Random(f"{seed} {number}"))
        try:
            ids, learned = encoder.encode(tokenizer, "line", text_of(line, "messages"))
        except ValueError as error:
            assert "line: the chat template refuses it: " in str(error)
            found["refused"] += 1
            continue
        their_ids, mask = theirs(hub, line, template(style, marked=True))
        closed = ids.tolist() == their_ids
        assert closed or ids.tolist() == [*their_ids, tokenizer.end_of_document], (style, line)
        learned = learned[: len(their_ids)]
        if marked:
            assert learned.tolist() == mask, (style, line)
        else:
            added = np.flatnonzero(learned & ~np.array(mask, bool))
            assert set(np.flatnonzero(mask)) <= set(np.flatnonzero(learned)), (style, line)
            for place in added.tolist():
                assert_follows_a_reply(tokenizer, hub, their_ids, mask, place, (style, line))
        found["equal"] += 1
    return found


def assert_follows_a_reply(
    tokenizer: HubTokenizer, hub: Any, ids: list[int], mask: list[int], place: int, case: object
) -> None:
    """The token at `place` is a space behind a reply's end, or the special token that ends it."""
    before = place - 1
    while before >= 0 and not mask[before]:
        assert not hub.decode(ids[before]).strip() or ids[before] in tokenizer.special_ids, case
        before -= 1
    assert not hub.decode(ids[place]).strip() or ids[place] in tokenizer.special_ids, case


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_written_and_learned_as_by_transformers_or_refused(style, marked, tmp_path):
    found = compare(tmp_path / "hub", style, marked, count=25, seed=0)
    assert found["equal"] >= 3, found


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("style", STYLES)
def test_two_thousand_conversations_are_too(style, marked, tmp_path):
    found = compare(tmp_path / "hub", style, marked, count=2000, seed=1)
    print(f"{style} {'marked' if marked else 'unmarked'}: {dict(found)}")
    assert found["equal"] >= 200, found
