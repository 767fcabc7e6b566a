from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from stoker.conf.schema import Config
from stoker.data import EndOfData, IndexedLoader, RowPlan, open_rows, read_rows
from stoker.parallel.batch import Batch
from tests import world
from tests.data.batches import together
from tests.data.plans import NumberPlan


def digest(rows: Batch) -> str:
    parts = (rows.tokens, rows.labels, rows.positions, rows.documents)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def global_batches(
    plan: RowPlan, dp: int, batches: int, splits: tuple[int, ...] = (), workers: int = 0, prefetch: int = 2
) -> Iterator[Batch]:
    """The rows of all ranks put together, the ranks started anew from their state before each batch of `splits`."""
    streams: list[IndexedLoader] = []
    for number in range(batches):
        if number == 0 or number in splits:
            states = {json.dumps(stream.state()) for stream in streams}
            assert len(states) <= 1
            for stream in streams:
                stream.close()
            streams = [IndexedLoader(plan, 24, rank, dp, workers=workers, prefetch=prefetch) for rank in range(dp)]
            for stream in streams:
                for state in states:
                    stream.load_state(json.loads(state))
        parts = [stream.next() for stream in streams]
        yield together(parts)
    for stream in streams:
        stream.close()


@pytest.mark.long
@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (1, 4), (2, 3)])
def test_every_layout_reads_the_same_batches(config: Config, dp, workers, prefetch):
    plan = open_rows(config, "train")
    expected = [digest(read_rows(plan, range(24 * n, 24 * n + 24))) for n in range(7)]
    found = global_batches(plan, dp, 7, (3, 4), workers, prefetch)
    assert [digest(rows) for rows in found] == expected
    assert len(set(expected)) == 7


def read_as_rank(config: Config, ranks: int) -> list[list[list[int]]]:
    stream = IndexedLoader(open_rows(config, "train"), 24, dist.get_rank(), ranks, workers=1)
    tokens = []
    for _ in range(3):
        rows = stream.next()
        dist.all_reduce(rows.tokens.sum())  # the readers were forked from a process that talks to others
        tokens.append(rows.tokens.tolist())
    stream.close()
    return tokens


def test_ranks_of_a_process_group_read_the_same_batches_and_build_the_tokens_together(config: Config):
    found = world.run(read_as_rank, 4, config, 4)
    expected = read_rows(open_rows(config, "train"), range(72)).tokens.tolist()
    assert [found[row % 4][row // 24][row % 24 // 4] for row in range(72)] == expected


def test_a_state_moves_between_layouts_and_batch_sizes(config: Config):
    plan = open_rows(config, "train")
    seen = []
    state = None
    for dp, batch, workers in ((1, 24, 0), (4, 24, 1), (2, 10, 0), (3, 6, 2)):
        streams = [IndexedLoader(plan, batch, rank, dp, workers=workers) for rank in range(dp)]
        for stream in streams:
            if state is not None:
                stream.load_state(state)
        for _ in range(3):
            seen += together([stream.next() for stream in streams]).tokens.tolist()
        state = streams[0].state()
        for stream in streams:
            stream.close()
    assert seen == read_rows(plan, range(len(seen))).tokens.tolist()


def test_the_state_counts_what_was_handed_out_not_what_was_read_ahead():
    with closing(IndexedLoader(NumberPlan(), 8, workers=2, prefetch=5)) as stream:
        for _ in range(3):
            stream.next()
        assert stream.state() == {
            "row": 24,
            "step": 3,
            "fingerprint": {"content": "numbers", "seed": 0},
            "sources": {"numbers": {"rows": 24, "epoch": 2}},
            "weights": None,
        }


def test_a_state_saved_again_without_a_step_is_unchanged():
    with closing(IndexedLoader(NumberPlan(), 8, row=40, workers=1)) as stream:
        state = json.loads(json.dumps(stream.state()))
        stream.load_state(state)
        assert stream.state() == state
        assert stream.next().tokens[:, 0].tolist() == list(range(40, 48))


def test_loading_a_state_discards_what_was_read_ahead():
    with closing(IndexedLoader(NumberPlan(), 4, workers=2, prefetch=3)) as stream:
        start = stream.state()
        seen = [stream.next().tokens[:, 0].tolist() for _ in range(4)]
        for _ in range(2):
            stream.load_state(start)
            assert [stream.next().tokens[:, 0].tolist() for _ in range(4)] == seen


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_handed_out_stay_as_they_were(workers):
    with closing(IndexedLoader(NumberPlan(), 2, workers=workers, prefetch=1)) as stream:
        batches = [stream.next() for _ in range(6)]
    assert [rows.tokens[0, 0].item() for rows in batches] == [0, 2, 4, 6, 8, 10]
    assert [rows.documents[0, 0].item() for rows in batches] == [0, 2, 4, 6, 8, 10]


def test_a_state_of_other_data_is_refused_and_both_are_shown(config: Config):
    state = IndexedLoader(open_rows(config, "train"), 24).state()
    config.run.seed, config.seq_len = 7, 8
    stream = IndexedLoader(open_rows(config, "train"), 24)
    with pytest.raises(ValueError, match=r"seed was 0 and is 7, seq_len was 16 and is 8$"):
        stream.load_state(state)
    assert stream.row == 0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "tokenizer", "bpe"),
        ("data", "document_mask", True),
        ("data", "validation", 0.3),
        ("run", "seed", 1),
        (None, "seq_len", 17),
    ],
)
def test_all_that_changes_the_rows_changes_the_fingerprint(config: Config, section, key, value):
    before = open_rows(config, "train").fingerprint
    setattr(getattr(config, section) if section else config, key, value)
    assert open_rows(config, "train").fingerprint != before


def test_more_epochs_continue_at_the_state(config: Config):
    config.data.epochs = 1
    stream = IndexedLoader(open_rows(config, "train"), 24)
    while stream.batches_left:
        stream.next()
    state, row = stream.state(), stream.row
    config.data.epochs = 2
    longer = IndexedLoader(open_rows(config, "train"), 24)
    longer.load_state(state)
    assert longer.batches_left > 0
    expected = read_rows(open_rows(config, "train"), range(row, row + 24))
    assert digest(longer.next()) == digest(expected)


@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.integers(0, 70))
def test_all_ranks_end_at_the_same_batch(total, per_rank, dp, first):
    streams = [IndexedLoader(NumberPlan(total), per_rank * dp, rank, dp, row=first) for rank in range(dp)]
    left = max(0, total - first) // (per_rank * dp)
    for done in range(left):
        assert [stream.batches_left for stream in streams] == [left - done] * dp
        for stream in streams:
            assert stream.next().tokens.max() < total
    for stream in streams:
        assert stream.batches_left == 0
        with pytest.raises(EndOfData):
            stream.next()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_last_partial_batch_is_left_out_and_logged(workers, caplog):
    caplog.set_level("INFO")
    with closing(IndexedLoader(NumberPlan(total_rows=22), 8, workers=workers)) as stream:
        [message] = caplog.messages
        assert "22" not in message and "6 rows that fill no global batch of 8" in message
        assert stream.batches_left == 2
        assert [stream.next().tokens[0, 0].item() for _ in range(2)] == [0, 8]
        with pytest.raises(EndOfData, match=r"end after 22 rows, and 6 are left at row 16: too few for batch.size=8"):
            stream.next()


def test_endless_data_have_batches_left():
    assert IndexedLoader(NumberPlan(), 8, row=10**12).batches_left > sys.maxsize // 16


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_pinned_and_read_on_in_a_process_that_uses_a_gpu(workers):
    torch.ones(1, device="cuda")
    with closing(IndexedLoader(NumberPlan(), 8, workers=workers, pin=True)) as stream:
        for batch in range(8):
            rows = stream.next()
            assert rows.tokens.is_pinned() and rows.documents.is_pinned()
            assert rows.to(torch.device("cuda")).labels[:, 0].tolist() == list(range(8 * batch, 8 * batch + 8))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"batch.size=8 does not divide over 3"):
        IndexedLoader(NumberPlan(), 8, 0, 3)


def test_a_state_of_an_older_format_is_refused_clearly(config: Config):
    stream = IndexedLoader(open_rows(config, "train"), 24)
    old = stream.state()["fingerprint"]
    del old["format"]
    with pytest.raises(ValueError, match=r"has read 48 rows of other data: format \(the .*\) was None and is 2$"):
        stream.load_state({"row": 48, "fingerprint": old, "sources": {}})
