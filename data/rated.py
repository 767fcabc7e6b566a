"""Answers that are rated one by one, and a mismatched answer to each prompt: `data.args.shape=unpaired_preference`.

`objective=kto` measures how far the model has moved from the reference by prompts with the answer to another prompt.
Which one is a function of the file alone, so that no batch, order or layout matters to it: each text gets the answers
of the next text of another prompt, and the last ones of the file those of the first. So a rated answer is two
documents: its prompt with it, and its prompt with the mismatched answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from stoker.conf.records import parse_json
from stoker.data.chat_refusals import Conversation
from stoker.data.chat_shapes import answered
from stoker.data.documents import Collection
from stoker.parallel.batch import DESIRABLE, MISMATCHED, UNDESIRABLE

_OTHERS = "mismatched"  # the key of the mismatched answers


def with_mismatched(collections: list[Collection]) -> list[Collection]:
    """Texts of `stoker.data.chat_shapes`, each with its mismatched answers.

    Reading raises ValueError, naming a text, where all prompts of a collection are the same.
    """
    return [replace(found, read=partial(_mismatched, found.read)) for found in collections]


def rated_conversations(values: dict[str, Any]) -> list[tuple[Conversation, float]]:
    """The conversations of a text, and the rating of each: for each answer that with it and the mismatched one.

    Raises ValueError for what is no conversation.
    """
    found = []
    for (desirable, answer), other in zip(values["rated"], values[_OTHERS], strict=True):
        for messages, rating in ((answer, DESIRABLE if desirable else UNDESIRABLE), (other, MISMATCHED)):
            what = "mismatched answer" if rating == MISMATCHED else "answer"
            found.append((answered({**values, "messages": [*values["prompt"], *messages]}, what), rating))
    return found


def rate(weights: np.ndarray, rating: float) -> np.ndarray:
    """The ratings of tokens, float32, from their `weights`: 0 where they are not trained on."""
    return np.float32(rating) * (weights != 0).astype(np.float32)


def _mismatched(read: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    firsts: list[dict[str, Any]] = []  # the first text, and the first of another prompt
    waiting: list[tuple[str, dict[str, Any]]] = []  # for a text of another prompt than theirs
    for name, text in read():
        values = parse_json(text)
        if waiting and values["prompt"] != waiting[0][1]["prompt"]:
            yield from _with(waiting, values)
            waiting = []
            if len(firsts) == 1:
                firsts.append(values)
        if not firsts:
            firsts.append(values)
        waiting.append((name, values))
    if not waiting:
        return
    other = next((one for one in firsts if one["prompt"] != waiting[0][1]["prompt"]), None)
    if other is None:
        raise ValueError(
            f"{waiting[-1][0]}: all prompts of the file are the same: unpaired_preference measures by answers to "
            "another prompt, so a file needs two"
        )
    yield from _with(waiting, other)


def _with(waiting: list[tuple[str, dict[str, Any]]], other: dict[str, Any]) -> Iterator[tuple[str, str]]:
    answers = [answer for _, answer in other["rated"]]
    for name, values in waiting:
        own = [answers[min(number, len(answers) - 1)] for number in range(len(values["rated"]))]
        yield name, json.dumps({**values, _OTHERS: own}, ensure_ascii=False)
