"""The stream of streams: every layout, worker count and split into resumes reads the same rows, exactly once."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from functools import partial

import pytest
import torch

from stoker.data import EndOfData
from stoker.data.streaming import loader
from stoker.data.streaming.sources import open_shards
from stoker.data.text import READS
from stoker.data.tokenizer import ByteTokenizer
from stoker.parallel.batch import IGNORE_INDEX
from tests.data.batches import digest
from tests.data.streaming.conftest import documents, open_stream, write_lines
from tests.data.streaming.simulated import World, batches, digests, stream_tokens
from tests.extent import some
from tests.fake_cuda import install

END = (1 << 20) - 1
TEXTS = documents(300)
LAYOUTS = [
    {"dp": 1, "workers": 1},
    {"dp": 2, "workers": 2, "prefetch": 1},
    {"dp": 3},
    {"dp": 4, "prefetch": 7},
    {"dp": 6},
    {"dp": 8, "workers": 1},
    {"dp": 12},
    {"dp": 2, "peers": 2},
    {"dp": 1, "peers": 4, "workers": 3, "prefetch": 3},
    {"dp": 1, "workers": 4},
]


@pytest.mark.long
def test_every_layout_worker_count_and_prefetch_reads_the_same_batches(config, opener):
    config.data.streams, config.seq_len = 24, 16
    expected = digests(batches(opener, None))
    assert len(set(expected)) == len(expected) > 20
    for layout in LAYOUTS:
        assert digests(batches(opener, None, [layout])) == expected, layout


@pytest.mark.long
@pytest.mark.parametrize("packing", some(["best_fit", "concatenated", "padded"], 3))
def test_any_split_into_resumes_reads_the_same_batches(config, packing):
    config.data.epochs = 2  # so that some split is at an epoch's edge
    opener = partial(open_stream, config, packing=packing)
    expected = digests(batches(opener, None))
    assert digests(batches(opener, None, [{"dp": 12, "batches": 0}, {"dp": 3}])) == expected
    for first in range(1, len(expected), 3):
        splits = [
            {"dp": 6, "batches": first},
            {"dp": 2, "batches": 0},  # two in a row
            {"dp": 3, "batches": 2},
            {"dp": 1},
        ]
        assert digests(batches(opener, None, splits)) == expected, first


def test_batches_that_a_rollback_leaves_out_are_passed_over_once(opener):
    expected = digests(batches(opener, None))
    with World(opener, dp=2) as world:
        found = world.batches(2)
        world.each(lambda stream: stream.pass_over(6))
        found += world.batches(1)
        state = world.state()
        assert digests(found + world.batches()) == [*expected[:2], *expected[5:]]
        world.each(lambda stream: stream.pass_over(len(expected) + 100))
        assert world.batches() == []
    with World(opener, dp=3) as world:
        world.load(state)
        assert digests(world.batches()) == expected[6:]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_token_of_every_document_is_in_exactly_one_row_of_an_epoch(config, tmp_path, mask, epochs):
    ends = list(itertools.accumulate(len(text) for text in TEXTS))
    numbered = [list(range(end - len(text) + 1, end + 1)) for end, text in zip(ends, TEXTS, strict=True)]
    write_lines(tmp_path / "texts", numbered)
    config.data.document_mask, config.data.epochs, config.data.split_bytes = mask, epochs, 2048
    opener = partial(open_stream, config, tokenizer=Numbers())
    found = batches(opener, None, [{"dp": 4, "batches": 7}, {"dp": 3, "workers": 2}])
    counted = Counter(token for rows in found for row in range(len(rows)) for token in used(rows, row))
    missing = [number for number in range(1, ends[-1] + 1) if counted[number] != epochs]
    assert not missing  # the one token that is only ever a label is an end of document
    assert counted[END] in (epochs * 300, epochs * 300 - 1)
    cuts = sum(
        after not in (before + 1, 0, END) and before != END
        for rows in found
        for row in rows.tokens.tolist()
        for before, after in itertools.pairwise(row)
    )
    assert cuts < config.data.streams  # a document is read on where it was, but for the rest divided at the end


class Numbers(ByteTokenizer):
    """For documents that are token ids already."""

    vocab_size = 1 << 20
    end_of_document = END


def used(rows, row):
    """Tokens of a row before its padding, of which every number is 0."""
    tokens = rows.tokens[row].tolist()
    while tokens and tokens[-1] == 0:
        tokens.pop()
    return tokens


def held() -> int:
    return sum(len(text) + 1 for text in TEXTS)


def test_every_epoch_holds_the_same_documents_in_another_order(config, opener):
    config.data.epochs = 3
    found = batches(opener, None)
    text = bytes(t for stream in stream_tokens(found, 12) for t in stream if t < 256).decode()
    numbers = [int(number) for number in re.findall(r"\[(\d+)\]", text)]
    assert sorted(numbers) == sorted([*range(300)] * 3)
    streams = [stream[:200] for stream in stream_tokens(found, 12)]
    config.run.seed = 1
    assert [stream[:200] for stream in stream_tokens(batches(opener, 8), 12)] != streams


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_packings_keep_every_document_whole(config, packing):
    found = batches(partial(open_stream, config, packing=packing), None)
    rows = [text_of(used(batch, row)) for batch in found for row in range(len(batch))]
    assert sorted(int(n) for row in rows for n in re.findall(r"\[(\d+)\]", row)) == list(range(300))
    short = {n for n, text in enumerate(TEXTS) if len(text) + 1 <= 32}
    assert short <= {int(n) for row in rows for n, m in re.findall(r"\[(\d+)\]x*\((\d+)\)", row) if n == m}
    if packing == "padded":
        assert all(row.count("[") <= 1 for row in rows)


def text_of(tokens) -> str:
    return bytes(token for token in tokens if token < 256).decode()


def test_all_ranks_end_at_the_same_batch_with_less_than_one_of_padding(config, opener):
    with World(opener, dp=3, peers=2) as world:
        found = world.batches()
        assert all(world.each(lambda stream: stream.exhausted))
        with pytest.raises(EndOfData, match="the data end after"):
            world.next()
    labels = sum(int(rows.valid_tokens()) for rows in found)
    assert labels == held() - 1  # every token but the very first of a stream, and the last of all, is a label
    assert sum(rows.labels.numel() for rows in found) - labels < config.batch.size * config.seq_len
    assert all((rows.labels != IGNORE_INDEX).all() for rows in found[:-2])


def test_the_rows_do_not_depend_on_the_batch_size(config, opener):
    large = [row for rows in batches(opener, None) for row in rows.tokens.tolist()]
    config.batch.size = 12
    small = [row for rows in batches(opener, None) for row in rows.tokens.tolist()]
    assert large[: len(small)] == small
    assert all(token == 0 for row in large[len(small) :] for token in row)


def test_a_state_saved_again_without_a_step_is_unchanged(opener):
    with World(opener, dp=2) as world:
        world.batches(5)
        state = world.state()
        following = digest(world.next())
        for _ in range(2):
            world.load(state)
            assert world.state() == state
        assert digest(world.next()) == following


def test_the_state_counts_what_was_handed_out_not_what_was_made_ahead(opener):
    with World(opener, prefetch=6) as world:
        world.batches(1)
        deadline = time.monotonic() + 10
        while len(world.streams[0]._ready) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        world.next()
        assert world.state()["row"] == 2 * 24


def test_a_state_of_other_data_is_refused_and_both_are_shown(config, opener, tmp_path):
    with World(opener) as world:
        state = world.state()
    config.data.assign_every, config.seq_len = 5, 16
    with (
        World(opener) as world,
        pytest.raises(ValueError, match=r"assign_every was 3 and is 5, seq_len was 32 and is 16"),
    ):
        world.load(state)
    config.data.assign_every, config.seq_len = 3, 32
    write_lines(tmp_path / "texts", documents(301))
    with World(opener) as world, pytest.raises(ValueError, match=r"texts.shards \(the .*\) was \w+ and is \w+"):
        world.load(state)


def test_data_that_changed_under_a_resumed_run_are_noticed(opener, tmp_path):
    with World(opener) as world:
        world.batches(3)
        state = world.state()
    for path in (tmp_path / "texts").glob("*.jsonl"):  # as many bytes, fewer documents
        path.write_bytes(path.read_bytes().replace(b"xx", b"\\n"))
    with World(opener) as world:
        with pytest.raises(
            ValueError, match=r"read 72 rows of other data: texts.content \(the documents\) was \w+ and is \w+$"
        ):
            world.load(state)
        del state["fingerprint"]["texts.content"]  # which earlier versions did not record
        world.load(state)
        with pytest.raises(
            ValueError, match=r"texts: the splits \[.*\] make \d+ and made \d+ tokens .* the data changed"
        ):
            world.next()


def test_lanes_that_do_not_divide_are_refused(config, opener):
    with pytest.raises(ValueError, match=r"data.streams=12 do not divide over 5 data-parallel ranks"):
        opener(0, 5)
    config.data.streams = 5
    with pytest.raises(ValueError, match=r"batch.size=24 is no multiple of data.streams=5"):
        opener()


def test_documents_kept_for_validation_are_in_no_row(config, opener):
    config.data.validation = 0.3
    text = bytes(t for stream in stream_tokens(batches(opener, None), 12) for t in stream if t < 256).decode()
    numbers = {int(number) for number in re.findall(r"\[(\d+)\]", text)}
    assert 180 < len(numbers) < 240


def test_metrics_count_what_was_read_and_assigned(config, opener):
    with World(opener, dp=2) as world:
        world.batches()
        values = world.streams[1].metrics()
    assert values["data.texts.documents"] == 300
    assert values["data.texts.tokens"] == held()
    assert values["data.texts.epoch"] == 1
    assert values["data.texts.skips"] == values["data.retries"] == 0
    assert held() < values["data.bytes"]


def test_every_lane_takes_new_windows_only_when_it_needs_them(opener):
    """What is assigned and not yet used stays below three periods and two windows, in every stream, all the way."""
    with World(opener) as world:
        for _ in itertools.count():
            if not world.batches(1):
                break
            assign = world.streams[0]._place.assignments[0]
            if assign.tail is None:
                assert max(len(queue) for queue in assign.queues) <= 4


def test_a_source_that_has_ended_does_not_continue_with_more_epochs(config, opener):
    with World(opener) as world:
        world.batches()
        state = world.state()
    config.data.epochs = 2
    with (
        World(opener) as world,
        pytest.raises(ValueError, match=r"texts has reached the end .* after 1 epochs: no more"),
    ):
        world.load(state)


def test_what_is_no_document_is_counted(config, opener, tmp_path):
    write_lines(tmp_path / "texts", ["", *documents(100), ""])
    config.data.splits, config.data.args = "tests.data.streaming.test_loader:open_some", {"text": "text"}
    with World(opener, dp=2) as world:
        world.batches()
        metrics = world.streams[1].metrics()
        assert (metrics["data.texts.documents"], metrics["data.texts.leftovers"]) == (99, 3)
        state = world.state()
    with World(opener) as world:
        world.load(state)
        assert world.streams[0].metrics()["data.texts.leftovers"] == 3


def open_some(data):
    return open_shards(data, "*", READS, "auto", "text", "tests.data.streaming.test_loader:some")


def some(values):
    return None if values["id"] == 7 else values["text"]


def test_the_loaders_thread_uses_the_gpu_of_its_rank(config, opener, monkeypatch):
    """Page-locked memory is the GPU's too: a thread that has set none would take it from GPU 0."""
    cuda, seen = install(monkeypatch), []
    unpacked = loader.unpack

    def unpack(packed, pin):
        seen.append((cuda.current, pin))
        return unpacked(packed)

    monkeypatch.setattr(loader, "unpack", unpack)
    stream = opener(pin=torch.device("cuda", 5))
    stream.next()
    stream.close()
    assert set(seen) == {(5, True)} and cuda.current == 0
