"""Answers that are rated one by one: their ratings, and which answers are mismatched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.data import open_rows, read_rows
from stoker.data.indexed import IndexPlan
from stoker.data.tokenizer import ByteTokenizer
from stoker.parallel.batch import DESIRABLE, IGNORE_INDEX, MISMATCHED, UNDESIRABLE
from tests.data.counted import base, write_lines
from tests.data.talks import MARKED


def config_of(folder: Path, lines: list[dict[str, Any]], **args: Any) -> Config:
    write_lines(folder / "rated" / "a.jsonl", lines)
    args = {"shape": "unpaired_preference", "template": MARKED, **args}
    target, path = "stoker.data.chat:open_source", str(folder / "rated")
    return base(folder, 64, target=target, path=path, packing="best_fit", args=args, validation=0.0)


def documents(folder: Path, lines: list[dict[str, Any]], **args: Any) -> list[tuple[str, str, float]]:
    """Of each document the text, the part of it that is learned, and its rating: by the order in rows, unshuffled."""
    plan = open_rows(config_of(folder, lines, **args), "train")
    assert isinstance(plan, IndexPlan) and plan.documents_together == 2 and plan.weighted
    rows, decode = read_rows(plan, range(plan.rows_per_epoch)), ByteTokenizer().decode
    assert rows.weights is not None
    found = []
    for tokens, numbers, labels, weights in zip(rows.tokens, rows.documents, rows.labels, rows.weights, strict=True):
        for number in range(int(numbers.max()) + 1):
            own, learned = numbers == number, (numbers == number) & (labels != IGNORE_INDEX)
            ratings = weights[learned].unique().tolist()
            if ratings:  # it is no padding
                (rating,) = ratings
                found.append((decode(tokens[own].tolist()), decode(labels[learned].tolist()), rating))
    return found


def pairs_of(found: list[tuple[str, str, float]]) -> set[tuple[str, float, str]]:
    """Each rated answer with its prompt and its rating, and the mismatched one."""
    assert [rating for *_, rating in found[1::2]] == [MISMATCHED] * (len(found) // 2)
    for (text, *_), (other, *_) in zip(found[::2], found[1::2], strict=True):
        assert text.partition(";A:")[0] == other.partition(";A:")[0]  # the prompt
    return {(own[0], own[2], other[1]) for own, other in zip(found[::2], found[1::2], strict=True)}


def test_an_answer_has_its_rating_and_the_answer_to_the_next_prompt(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "completion": "a", "label": True},
        {"prompt": "one", "completion": "b", "label": False},
        {"prompt": [{"role": "user", "content": "two"}], "completion": "c", "label": False},
        {"prompt": "one", "completion": "d", "label": True},
    ]
    found = pairs_of(documents(tmp_path, lines))
    assert {(text.rstrip("\x00"), rating, other) for text, rating, other in found} == {
        ("U:one;A:a;", DESIRABLE, "c;"),
        ("U:one;A:b;", UNDESIRABLE, "c;"),
        ("U:two;A:c;", UNDESIRABLE, "d;"),
        ("U:one;A:d;", DESIRABLE, "c;"),  # the last: the first line has its prompt
    }


def test_the_answers_of_a_pair_are_rated(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one", "chosen": "a", "rejected": "b"},
        {"prompt": "two", "completion": "c", "label": True},
        {"chosen": [ASK, REPLY], "rejected": [ASK, {"role": "assistant", "content": "e"}]},
    ]
    found = pairs_of(documents(tmp_path, lines))
    assert {(text.rstrip("\x00"), rating, other) for text, rating, other in found} == {
        ("U:one;A:a;", DESIRABLE, "c;"),
        ("U:one;A:b;", UNDESIRABLE, "c;"),
        ("U:two;A:c;", DESIRABLE, "d;"),
        ("U:three;A:d;", DESIRABLE, "a;"),
        ("U:three;A:e;", UNDESIRABLE, "b;"),
    }


ASK, REPLY = {"role": "user", "content": "three"}, {"role": "assistant", "content": "d"}
GOOD = {"prompt": "two", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "one", "completion": "a"}, "it has no 'label'"),
        ({"prompt": "one", "completion": "a", "label": 1}, "its 'label' is 1: expected true"),
        ({"prompt": "one", "completion": [ASK], "label": True}, "its 'completion' goes on after the prompt with"),
        ({"prompt": "one", "chosen": "a", "rejected": "b", "label": True}, "a 'completion' or a 'label' beside them"),
        ({"prompt": "one", "completion": [{**REPLY, "weight": 0.5}], "label": True}, "has the weight 0 or 1, not 0.5"),
        ({"prompt": "one", "completion": [{**REPLY, "weight": 0}], "label": True}, "has no token that is trained on"),
        ({"prompt": "two", "completion": "b", "label": False}, "all prompts of the file are the same"),
    ],
)
def test_what_is_no_rated_answer_is_refused(line: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a.jsonl .*{reason}"):
        open_rows(config_of(tmp_path, [GOOD, line]), "train")


def test_a_label_is_not_left_out_unseen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"its completion has a 'label': set data.args.shape=unpaired"):
        open_rows(config_of(tmp_path, [GOOD], shape="auto"), "train")


def test_long_answers_are_refused_or_dropped_with_their_mismatched_ones(tmp_path: Path) -> None:
    lines = [{"prompt": str(n), "completion": "x" * (70 if n == 3 else 1), "label": True} for n in range(9)]
    with pytest.raises(ValueError, match="2 of 9 train pairs of answers are longer than seq_len=64, pair 2 first"):
        open_rows(config_of(tmp_path, lines), "train")
    assert len(documents(tmp_path, lines, long_pairs="drop")) == 14


def test_pairs_and_rated_answers_do_not_mix(tmp_path: Path) -> None:
    config = config_of(tmp_path, [{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(9)])
    common = {"kind": "chat", "path": config.data.path}
    shapes = {"rated": "unpaired_preference", "pairs": "preference"}
    config.data.path, config.data.args = None, {}
    config.data.sources = {
        name: {**common, "args": {"shape": shape, "template": MARKED}} for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match="pairs has pairs of answers, rated has rated answers: an objective takes"):
        open_rows(config, "train")
