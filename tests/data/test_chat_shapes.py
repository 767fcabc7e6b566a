"""The shapes of conversations: what each becomes is what transformers renders of its messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker.data import open_rows, read_rows
from stoker.data.chat import CHATML, ChatEncoder, TemplateSettings
from stoker.data.chat_shapes import text_of
from stoker.data.mixed import MixedPlan
from stoker.data.packing import together
from stoker.data.tokenizer import ByteTokenizer
from stoker.data.tokenizer_files import load_tokenizer
from stoker.parallel.batch import IGNORE_INDEX
from tests.data.chat_styles import template
from tests.data.counted import base, chat, write_lines
from tests.data.hub_folders import hub_folder
from tests.data.talks import HELLO, HI, MARKED, MORE, NO, SYSTEM, TALK, TOOL, encoded, learned_text, theirs

ASKED = {"role": "user", "content": "hello\nworld"}
UNTAUGHT = HI | {"weight": 0}
# shape -> a line of it, and the messages that it stands for
LINES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": TALK, "tools": [TOOL], "id": 7}, TALK),
    "sharegpt": (
        {
            "system": "be brief",
            "conversations": [
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "hi"},
                {"from": "user", "value": "more?"},
                {"from": "assistant", "value": "no"},
            ],
        },
        TALK,
    ),
    "alpaca": (
        {"system": "be brief", "history": [["hello", "hi"]], "instruction": "more?", "input": "", "output": "no"},
        TALK,
    ),
    "alpaca with input": ({"instruction": "hello", "input": "world", "output": "hi"}, [ASKED, HI]),
    "prompt_completion": ({"prompt": "hello", "completion": "hi"}, [HELLO, HI]),
    "prompt_completion of messages": (
        {"prompt": [SYSTEM, HELLO, HI, MORE], "completion": [NO]},
        [SYSTEM, HELLO, UNTAUGHT, MORE, NO],
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_shape_has_the_ids_and_the_mask_of_its_messages_in_transformers(name: str, tmp_path: Path) -> None:
    line, messages = LINES[name]
    folder = hub_folder(tmp_path / "hub", template("qwen-2.5", marked=True))
    shape, tokenizer = name.partition(" ")[0], load_tokenizer(folder)
    ids, mask = theirs(folder, {"messages": messages, "tools": line.get("tools")})
    for given in (shape, "auto"):
        text = text_of(line, "messages", given)
        ((found, weights),) = ChatEncoder(TemplateSettings(), tokenizer).encode(tokenizer, "line", text)
        assert found[: len(ids)].tolist() == ids
        if UNTAUGHT not in messages:
            assert weights[: len(ids)].tolist() == mask
    assert UNTAUGHT not in messages or learned_text(json.loads(text), MARKED) == "no;"


def test_a_preference_is_its_two_conversations_trained_on_after_the_prompt() -> None:
    whole = [HELLO, HI, MORE, NO]
    other = [HELLO, HI, MORE, NO | {"content": "yes"}]
    for line in (
        {"chosen": whole, "rejected": other},
        {"prompt": whole[:3], "chosen": "no", "rejected": "yes"},
        {"prompt": whole[:3], "chosen": whole, "rejected": other[3:]},
    ):
        documents = _pair(line)
        assert [_learned(*document) for document in documents] == ["no;", "yes;"]
        for (ids, _), messages in zip(documents, (whole, other), strict=True):
            assert ids.tolist() == encoded(ByteTokenizer(), messages, template=MARKED)[0]


def _pair(line: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    encoder, tokenizer = ChatEncoder(TemplateSettings(MARKED), pairs=True), ByteTokenizer()
    return encoder.encode(tokenizer, "line", text_of(line, "messages", "preference"))


def _learned(ids: np.ndarray, weights: np.ndarray) -> str:
    return ByteTokenizer().decode(ids[weights != 0].tolist())


@pytest.mark.parametrize(
    ("line", "shape", "reason"),
    [
        (
            {"text": "a"},
            "auto",
            "it has no 'messages', only 'text'; the other shapes of a conversation have sharegpt: ",
        ),
        ({"prompt": "a", "completion": "b", "conversations": []}, "auto", "shapes sharegpt and prompt_completion"),
        ({"chosen": "a", "rejected": "b"}, "auto", "set data.args.shape=preference"),
        ({"conversations": [HELLO]}, "auto", "data.args.shape=messages data.args.messages=conversations"),
        ({"conversations": [{"from": "bard", "value": ""}]}, "auto", "message 1 is from 'bard': expected one of human"),
        ({"instruction": "a", "output": 3}, "auto", "its 'output' is int, not str"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "alpaca", "its 'history' is no list of"),
        ({"prompt": "a"}, "prompt_completion", "it has no 'completion', only 'prompt'"),
        ({"prompt": [HI | {"weight": 1}], "completion": "a"}, "auto", "message 1 of the prompt is to be trained on"),
        ({"prompt": 3, "completion": "a"}, "auto", "its 'prompt' is neither a text nor a list of messages"),
        ({"chosen": "a", "rejected": "b"}, "preference", "no 'prompt', and its answers have no message in common"),
        (
            {"prompt": "a", "chosen": [HELLO], "rejected": "b"},
            "preference",
            "its 'chosen' goes on after the prompt with",
        ),
        ({"prompt": "hello", "chosen": [HELLO], "rejected": "b"}, "preference", "after the prompt with nothing"),
    ],
)
def test_a_line_of_no_or_two_shapes_is_refused_with_the_reason(line: Any, shape: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        text_of(line, "messages", shape)


@pytest.mark.parametrize(("weight", "reason"), [(0.5, "has the weight 0 or 1, not 0.5"), (0, "has no token that is")])
def test_answers_of_a_preference_are_trained_on_whole(weight: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _pair({"prompt": "hello", "chosen": [HI | {"weight": weight}], "rejected": "no"})


# Weights.


@pytest.mark.parametrize("between", [[MORE], []])
@pytest.mark.parametrize(("source", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, ";")])
def test_the_weight_of_a_message_is_that_of_its_tokens(source: str, end: str, between: list[dict[str, Any]]) -> None:
    ids, weights = encoded(
        ByteTokenizer(), [HELLO, HI | {"weight": 0.5}, *between, NO | {"weight": 3}], template=source
    )
    plain_ids, learned = encoded(ByteTokenizer(), [HELLO, HI, *between, NO], template=source)
    assert ids == plain_ids and [weight > 0 for weight in weights] == [mark > 0 for mark in learned]
    for weight, text in ((0.5, "hi" + end), (3.0, "no" + end)):
        assert ByteTokenizer().decode([n for n, w in zip(ids, weights, strict=True) if w == weight]) == text
    assert weights[-1] == 3.0  # the end of the document


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1"])
def test_a_weight_is_a_number_from_0_on(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"message 2 has the weight .*: expected a number from 0 on"):
        encoded(ByteTokenizer(), [HELLO, HI | {"weight": weight}], template=MARKED)


def test_rows_have_the_weights_of_their_labels_also_in_a_mixture(tmp_path: Path) -> None:
    talks = [[HELLO, HI | {"weight": 0.25 * (n % 4)}, MORE, NO] for n in range(40)]
    write_lines(tmp_path / "weighed" / "a.jsonl", [{"messages": talk} for talk in talks])
    config, args = chat(tmp_path), {"template": MARKED}
    config.data.args = args
    plain = read_rows(open_rows(config, "train"), [0])
    assert plain.weights is None
    config.data.path = str(tmp_path / "weighed")
    rows = read_rows(open_rows(config, "train"), [0])
    assert rows.weights is not None
    learned = rows.labels != IGNORE_INDEX
    by_weight = {w: rows.labels[learned & (rows.weights == w)] for w in rows.weights[learned].unique().tolist()}
    assert set(by_weight) == {0.25, 0.5, 0.75, 1.0}
    assert set(ByteTokenizer().decode(by_weight[0.5].tolist())) == set("hi;")

    sources = {"plain": str(tmp_path / "chats"), "weighed": str(tmp_path / "weighed")}
    config.data.path = None
    config.data.sources = {name: {"kind": "chat", "path": path, "args": args} for name, path in sources.items()}
    plan = open_rows(config, "train")
    assert isinstance(plan, MixedPlan) and plan.weighted
    mixed = read_rows(plan, range(plan.rows_per_epoch))
    assert mixed.weights is not None
    assert set(mixed.weights[mixed.labels != IGNORE_INDEX].unique().tolist()) == {0.25, 0.5, 0.75, 1.0}


# Pairs.


def test_groups_of_documents_stay_whole_in_one_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 200)
    begins = np.cumsum(lengths) - lengths
    for shared in (True, False):
        table = together(begins, lengths, 32, 2, shared)
        found = []
        for row in range(len(table)):
            pieces = slice(table.firsts[row], table.firsts[row + 1])
            assert table.lengths[pieces].sum() <= 32
            found += [tuple(pair) for pair in table.begins[pieces].reshape(-1, 2).tolist()]
            assert shared or len(found) == row + 1
        kept = lengths.reshape(-1, 2).sum(1) <= 32
        assert 0 < kept.sum() < 100
        assert sorted(found) == [tuple(pair) for pair in begins.reshape(-1, 2)[kept].tolist()]


def test_rows_of_preferences_hold_pairs_and_long_ones_are_refused_or_dropped(tmp_path: Path) -> None:
    pairs = [{"prompt": "ask", "chosen": f"yes {n}", "rejected": "no" * (40 if n == 7 else 1)} for n in range(40)]
    write_lines(tmp_path / "pairs" / "a.jsonl", pairs)
    args = {"shape": "preference", "template": MARKED}
    config = base(
        tmp_path,
        64,
        target="stoker.data.chat:open_source",
        path=str(tmp_path / "pairs"),
        packing="best_fit",
        args=args,
        validation=0.0,
    )
    with pytest.raises(ValueError, match=r"1 of 40 train pairs .* seq_len=64, pair 7 first; .* seq_len=105 holds all"):
        open_rows(config, "train")
    config.data.args = {**args, "long_pairs": "drop"}
    plan = open_rows(config, "train")
    assert plan.documents_together == 2 and plan.counts(0)["data"]["leftovers"] == 2
    rows = read_rows(plan, range(plan.rows_per_epoch))
    seen = set()
    for tokens, documents, labels in zip(rows.tokens, rows.documents, rows.labels, strict=True):
        texts = [ByteTokenizer().decode(tokens[documents == n].tolist()) for n in range(int(documents.max()) // 2 * 2)]
        assert all(text.startswith("U:ask;A:yes") for text in texts[::2])
        assert all(text.startswith("U:ask;A:no;") for text in texts[1::2]) and len(texts) % 2 == 0
        learned = ByteTokenizer().decode(labels[labels != IGNORE_INDEX].tolist())
        assert learned.count("yes") == learned.count("no;") == len(texts) // 2 and "ask" not in learned
        seen.update(texts[::2])
    assert len(seen) == 39


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("packing", "concatenated", "data.packing=concatenated cuts the pairs"),
        ("document_mask", False, "data.document_mask=false lets one answer"),
        ("validation_by", "position", "data.validation_by=position cuts pairs"),
    ],
)
def test_what_would_divide_pairs_is_refused(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "ask", "chosen": f"{n}", "rejected": "no"} for n in range(9)])
    keys = {"packing": "best_fit", key: value, "args": {"shape": "preference"}, "path": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=reason):
        open_rows(base(tmp_path, 256, target="stoker.data.chat:open_source", **keys), "train")
