from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.data import open_rows, open_samples, read_rows
from stoker.data.indexed import IndexPlan
from stoker.data.tokens import Tokens
from stoker.parallel.batch import IGNORE_INDEX

END = 256


def plan_of(documents: list[list[int]], seq_len: int, seed: int | None = None, mask: bool = False) -> IndexPlan:
    ids = [token for document in documents for token in [*document, END]]
    starts = np.cumsum([0] + [len(document) + 1 for document in documents])[:-1]
    tokens = Tokens(np.array(ids, np.uint16), starts.astype(np.int64))
    return IndexPlan("test", tokens, seq_len, seed, None, mask, {})


documents = st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=30)


@given(documents, st.integers(2, 9), st.integers(0, 5))
def test_the_rows_of_each_epoch_tile_the_tokens_exactly_once(texts, seq_len, seed):
    plan = plan_of(texts, seq_len, seed)
    epoch = plan.rows_per_epoch
    stretches = plan.tokens.ids[: epoch * seq_len].reshape(epoch, seq_len)
    for number in range(3 if epoch else 0):
        rows = read_rows(plan, range(number * epoch, (number + 1) * epoch))
        assert sorted(rows.tokens.tolist()) == sorted(stretches.tolist())


@given(documents, st.integers(2, 9))
def test_what_fills_no_row_is_less_than_a_row(texts, seq_len):
    plan = plan_of(texts, seq_len)
    assert 0 <= len(plan.tokens.ids) - 1 - plan.rows_per_epoch * seq_len < seq_len


@given(documents, st.integers(2, 9))
def test_pieces_are_stretches_of_one_document_each(texts, seq_len):
    plan = plan_of(texts, seq_len)
    owner = np.repeat(np.arange(len(texts)), plan.tokens.lengths())
    pieces = plan.pieces(np.arange(plan.rows_per_epoch))
    for begin, length in zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True):
        assert length >= 1 and owner[begin] == owner[begin + length - 1]
    assert np.array_equal(np.bincount(pieces.rows, pieces.lengths), [seq_len + 1] * plan.rows_per_epoch)


@given(documents, st.integers(2, 9), st.booleans())
def test_labels_positions_and_documents_are_what_a_walk_over_the_tokens_gives(texts, seq_len, mask):
    plan = plan_of(texts, seq_len, mask=mask)
    owner = [number for number, document in enumerate(texts) for _ in [*document, END]]
    for row in range(plan.rows_per_epoch):
        rows = read_rows(plan, [row])
        begin = row * seq_len
        for place in range(seq_len):
            here = begin + place
            first = max(begin, owner.index(owner[here])) if mask else begin
            crossing = mask and owner[here + 1] != owner[here]
            assert rows.tokens[0, place] == plan.tokens.ids[here]
            assert rows.labels[0, place] == (IGNORE_INDEX if crossing else plan.tokens.ids[here + 1])
            assert rows.positions[0, place] == here - first
            assert rows.documents[0, place] == owner[here] - owner[begin]


def test_the_end_of_a_document_is_learned_and_with_a_mask_what_follows_it_is_not():
    texts = [[1, 2], [3, 4, 5], [6]]
    assert read_rows(plan_of(texts, 4), [0, 1]).labels.tolist() == [[2, END, 3, 4], [5, END, 6, END]]
    masked = read_rows(plan_of(texts, 4, mask=True), [0, 1])
    assert masked.labels.tolist() == [[2, END, IGNORE_INDEX, 4], [5, END, IGNORE_INDEX, END]]
    assert masked.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert masked.documents.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_a_batch_may_span_epochs():
    plan = plan_of([list(range(50))], 5, seed=3)
    together = read_rows(plan, range(35)).tokens
    alone = [read_rows(plan, [row]).tokens[0].tolist() for row in range(35)]
    assert together.tolist() == alone


def test_rows_have_the_types_that_engines_expect(config):
    rows = read_rows(open_rows(config, "train"), range(3))
    assert [str(part.dtype) for part in (rows.tokens, rows.labels, rows.positions, rows.documents)] == [
        "torch.int64",
        "torch.int64",
        "torch.int64",
        "torch.int32",
    ]
    assert rows.tokens.shape == rows.documents.shape == (3, 16)


def test_seeds_and_epochs_give_other_orders_of_the_same_rows(config):
    plan = open_rows(config, "train")
    count = plan.rows_per_epoch
    first = read_rows(plan, range(count)).tokens.tolist()
    second = read_rows(plan, range(count, 2 * count)).tokens.tolist()
    reseeded = read_rows(dataclasses.replace(plan, seed=1), range(count)).tokens.tolist()
    assert first != second and first != reseeded and second != reseeded
    assert sorted(first) == sorted(second) == sorted(reseeded)


def test_validation_rows_keep_the_order_of_the_tokens_and_end(config):
    plan = open_rows(config, "validation")
    rows = read_rows(plan, range(plan.rows_per_epoch))
    assert rows.tokens.flatten().tolist() == plan.tokens.ids[: plan.rows_per_epoch * 16].tolist()
    assert plan.total_rows == plan.rows_per_epoch


def test_too_many_evaluation_rows_are_refused_with_how_many_there_are(config):
    available = open_rows(config, "validation").rows_per_epoch
    config.eval.sequences = available
    assert [len(sample.numbers) for sample in open_samples(config)] == [available, available]
    config.eval.sequences = available + 1
    with pytest.raises(
        ValueError, match=f"eval.sequences={available + 1}, but the .* make {available} sequences of 16 tokens"
    ):
        open_samples(config)


def test_data_shorter_than_a_row_are_refused(config):
    config.seq_len = 10**6
    with pytest.raises(
        ValueError, match=r"train documents of \d+ tokens, and one row of seq_len=1000000 takes 1000001"
    ):
        open_rows(config, "train")


def test_a_split_of_nothing_is_refused(config):
    config.data.validation = 0.0
    with pytest.raises(ValueError, match=r"0 validation documents of 0 tokens.*give more text or lower seq_len"):
        open_rows(config, "validation")
