from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.data.packing import Table, best_fit, fill, fit, padded
from stoker.data.rows import DOCUMENTS, LABELS, POSITIONS, TOKENS
from stoker.parallel.batch import IGNORE_INDEX

END = 256
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def laid_out(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are all different, and where each document begins."""
    return np.arange(1000, 1000 + sum(lengths)), np.cumsum([0, *lengths])[:-1]


def rows_of(table: Table, tokens: np.ndarray, seq_len: int, mask: bool = True, learned=None) -> np.ndarray:
    out = np.full((4, len(table), seq_len), -7, np.int32)
    fill(out, tokens, table.pieces(np.arange(len(table))), mask, learned)
    return out


def fullest_bin_first(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing, one item after the other."""
    room: list[int] = []
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fitting = [number for number in range(len(room)) if room[number] >= lengths[item]]
        if not fitting:
            room.append(capacity)
            fitting = [len(room) - 1]
        bins[item] = min(fitting, key=lambda number: room[number])
        room[bins[item]] -= lengths[item]
    return bins


@given(st.integers(1, 30).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=80))))
def test_the_fast_best_fit_fills_bins_as_the_slow_one_does(case):
    capacity, lengths = case
    fast, slow = fit(np.array(lengths, np.int64), capacity).tolist(), fullest_bin_first(lengths, capacity)

    assert sorted(np.bincount(fast, lengths)) == sorted(np.bincount(slow, lengths))  # bins of equal room are alike


def test_a_million_documents_are_packed_quickly_and_tightly():
    chance = np.random.default_rng(0)
    lengths = np.minimum(chance.lognormal(6, 1.2, 1_000_000).astype(np.int64) + 2, 4096)
    bins = fit(lengths, 4096)  # the test's time limit is its speed limit; it takes a fraction of a second
    held = np.bincount(bins, lengths)
    assert held.max() <= 4096 and lengths.sum() / (4096 * len(held)) > 0.999


@given(lengths_of_documents, st.integers(2, 16), st.sampled_from([best_fit, padded]))
def test_every_token_but_a_documents_first_is_a_label_exactly_once(lengths, seq_len, packing):
    tokens, begins = laid_out(lengths)
    labels = rows_of(packing(begins, np.array(lengths), seq_len), tokens, seq_len)[LABELS]
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == sorted(
        set(tokens.tolist()) - set(tokens[begins].tolist())
    )


@given(lengths_of_documents, st.integers(2, 16), st.sampled_from([best_fit, padded]))
def test_a_label_is_the_token_after_it_in_its_document(lengths, seq_len, packing):
    tokens, begins = laid_out(lengths)
    out = rows_of(packing(begins, np.array(lengths), seq_len), tokens, seq_len)
    learned = out[LABELS] != IGNORE_INDEX
    assert (out[LABELS][learned] == out[TOKENS][learned] + 1).all()


@given(lengths_of_documents, st.integers(2, 16), st.sampled_from([best_fit, padded]))
def test_no_document_that_fits_a_row_is_cut(lengths, seq_len, packing):
    _, begins = laid_out(lengths)
    table = packing(begins, np.array(lengths), seq_len)
    pieces = sorted(zip(table.begins.tolist(), table.lengths.tolist(), strict=True))
    for begin, length in zip(begins.tolist(), lengths, strict=True):
        mine = [piece for piece in pieces if begin <= piece[0] < begin + length]
        if length <= seq_len + 1:
            assert mine == [(begin, length)]
        assert all(piece[1] == seq_len + 1 for piece in mine[:-1])


@given(lengths_of_documents, st.integers(2, 16))
def test_best_fit_needs_no_more_rows_than_padded_and_padded_has_a_row_for_each_document(lengths, seq_len):
    _, begins = laid_out(lengths)
    assert len(best_fit(begins, np.array(lengths), seq_len)) <= len(padded(begins, np.array(lengths), seq_len))
    assert set(np.diff(padded(begins, np.array(lengths), seq_len).firsts)) == {1}


@given(lengths_of_documents, st.integers(2, 16), st.booleans())
def test_planes_are_what_a_walk_over_the_pieces_gives(lengths, seq_len, mask):
    tokens, begins = laid_out(lengths)
    table = best_fit(begins, np.array(lengths), seq_len)
    out = rows_of(table, tokens, seq_len, mask)
    for row in range(len(table)):
        expected = []
        for number, piece in enumerate(range(table.firsts[row], table.firsts[row + 1])):
            begin = table.begins[piece]
            expected += [(tokens[begin + k], number, k) for k in range(table.lengths[piece])]
        for place in range(seq_len):
            here = expected[place] if place < len(expected) else (0, expected[-1][1] + 1, place - len(expected))
            after = expected[place + 1] if place + 1 < len(expected) else None
            label = IGNORE_INDEX if after is None or (mask and after[2] == 0) else after[0]
            position = here[2] if mask else place
            assert out[:, row, place].tolist() == [here[0], label, position, here[1]]


def test_padding_has_no_label_and_a_separate_document_number():
    out = rows_of(padded(np.array([0, 3]), np.array([3, 2]), 4), np.array([1, 2, END, 3, END]), 4)
    assert out[TOKENS].tolist() == [[1, 2, END, 0], [3, END, 0, 0]]
    assert out[LABELS].tolist() == [
        [2, END, IGNORE_INDEX, IGNORE_INDEX],
        [END, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert out[DOCUMENTS].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert out[POSITIONS].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]


def test_what_is_not_to_be_learned_is_no_label():
    learned = np.array([0, 1, 1, 0, 1], np.uint8)
    out = rows_of(padded(np.array([0]), np.array([5]), 5), np.array([1, 2, 3, 4, END]), 5, learned=learned)
    assert out[LABELS].tolist() == [[2, 3, IGNORE_INDEX, END, IGNORE_INDEX]]


def test_tokens_beyond_two_bytes_and_mapped_ones_are_alike(tmp_path):
    tokens, begins = laid_out([5, 9, 2])
    tokens = tokens.astype(np.uint32) + 100_000
    tokens.tofile(tmp_path / "tokens")
    table = best_fit(begins, np.array([5, 9, 2]), 4)
    mapped = np.memmap(tmp_path / "tokens", np.uint32, "r")
    assert rows_of(table, mapped, 4).tolist() == rows_of(table, tokens, 4).tolist()


@pytest.mark.parametrize("packing", [best_fit, padded])
def test_no_documents_make_no_rows(packing):
    table = packing(np.empty(0, np.int64), np.empty(0, np.int64), 8)
    assert len(table) == 0 and rows_of(table, np.empty(0, np.uint16), 8).shape == (4, 0, 8)
