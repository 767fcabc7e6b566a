"""What damage and lost connections do to a stream, and what going on costs."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zstandard

from stoker.conf.schema import Config
from stoker.data.decompress import Limits
from stoker.data.formats import JSON_LINES, Kind
from stoker.data.remote import Damaged, refuse
from stoker.data.remote.lookup import look_up
from stoker.data.remote.retries import Patience
from stoker.data.remote.store import Store
from stoker.data.streaming.assignment import ALL, Skip
from stoker.data.streaming.lines import Lines
from stoker.data.streaming.opening import open_sources
from stoker.data.streaming.shuffle_windows import ShuffleWindows, Window
from stoker.data.streaming.sources import open_text
from stoker.data.streaming.splits import ByteBlocks
from stoker.data.tokenizer import ByteTokenizer
from tests.data.server import serving
from tests.data.streaming.conftest import documents, open_stream, write_lines
from tests.data.streaming.simulated import World, batches, digests, stream_tokens

QUICK = Patience(retries=2, first_seconds=0.001, stall_seconds=0.5)
TEXTS = documents(300)


@pytest.fixture
def server(config: Config, tmp_path: Path):
    """The texts of `config` on a server."""
    with serving(tmp_path / "texts") as server:
        config.data.path = None
        config.data.urls = [f"{server.url}/{{0..2}}.jsonl"]
        yield server


def read_all(config: Config) -> list[str]:
    splits = open_text(config.data)
    return [content for split in range(len(splits)) for _, content in splits.read(split, Store(QUICK), refuse)]


def test_more_skips_than_are_allowed_end_the_run_on_every_rank(config, server):
    config.data.on_damage = "skip"
    with World(partial(open_stream, config, store=Store(QUICK), skip_limit=1), dp=3) as world:
        server.always = {"1.jsonl": "status 404", "2.jsonl": "status 404"}
        said = world.each(lambda stream: failure(stream))
    assert len(set(said)) == 1
    assert re.match(r"texts: \d+ skips in \d+ windows, more than data.skip_limit=1, the last in split \d+", said[0])


def failure(stream) -> str:
    with pytest.raises(ValueError) as raised:
        drain(stream)
    return str(raised.value)


def drain(stream) -> None:
    while True:
        stream.next()


def numbers_in(found, streams: int = 12) -> list[int]:
    text = bytes(t for stream in stream_tokens(found, streams) for t in stream if t < 256).decode(errors="replace")
    return sorted(int(number) for number in re.findall(r"\((\d+)\)", text))


def test_a_server_that_fails_now_and_then_changes_no_row(config, server, tmp_path):
    config.data.urls, config.data.path = [], str(tmp_path / "texts")
    expected = digests(batches(partial(open_stream, config), None))
    config.data.urls, config.data.path = [f"{server.url}/{{0..2}}.jsonl"], None
    opener = partial(open_stream, config, store=Store(replace(QUICK, retries=20)))
    with World(opener, dp=2) as world:
        server.faults = [("jsonl", fault) for fault in ("short 100", "status 503", "short 0", "status 429") * 5]
        assert digests(world.batches()) == expected
        assert world.streams[1].metrics()["data.retries"] >= 20
    assert not server.faults


@pytest.mark.parametrize("workers", [0, 2])
def test_what_stays_broken_is_an_error_of_the_rank_that_reads_it(config, server, workers):
    with World(partial(open_stream, config, store=Store(QUICK)), workers=workers) as world:
        server.always = {"1.jsonl": "status 503"}
        with pytest.raises(ValueError, match=r"/1.jsonl at byte \d+: the server answers 503 .* 3 times in a row"):
            world.batches()


@pytest.mark.parametrize("layout", [{"dp": 1}, {"dp": 3, "workers": 1}])
def test_a_skip_is_recorded_in_the_state_and_stays_one(config, server, layout):
    config.data.on_damage = "skip"
    opener = partial(open_stream, config, store=Store(QUICK))
    server.always = {"1.jsonl": "status 404"}
    with pytest.raises(ValueError, match=r"1.jsonl: the server answers 404"):
        World(opener, **layout)  # what is not there at the start is no damage
    server.always = {}
    with World(opener, **layout) as world:
        server.always = {"1.jsonl": "status 404"}
        found = world.batches(6)
        state = world.state()
        skips = state["sources"]["texts"]["skips"]
        assert skips and world.streams[0].metrics()["data.texts.skips"] == len(skips)
    server.always = {}  # it is back: windows already assigned leave the same documents out, others do not
    with World(opener, **layout) as world:
        world.load(state)
        assert world.state() == state
        found += world.batches()
    splits = open_text(config.data)
    lost = [text for _, split, _, _ in skips for _, text in splits.read(split, Store(), refuse)]
    missing = {int(text[1 : text.index("]")]) for text in lost}
    assert missing and not missing & set(numbers_in(found))
    assert set(numbers_in(found)) | missing >= set(range(300)) - cut(found)


def cut(found) -> set[int]:
    """Documents whose closing number was cut in two when the rest was divided: at most one for each stream."""
    gone = set(range(300)) - set(numbers_in(found))
    whole = {
        n
        for n in gone
        if f"[{n}]" not in bytes(t for stream in stream_tokens(found, 12) for t in stream if t < 256).decode()
    }
    assert len(gone - whole) <= 12
    return gone - whole


def test_lines_that_are_no_documents_are_named_or_skipped(config, tmp_path):
    lines = [
        b'{"text": "fine"}',
        b'{"text": "\xff"}',
        b'{"text": ',
        b'{"body": "x"}',
        b"[]",
        b'{"text": "\\ud800"}',
        b"",
    ]
    lines.append(b'{"text": "also fine"}')
    path = tmp_path / "texts" / "0.jsonl"
    path.write_bytes(b"\n".join(lines))
    for other in (1, 2):
        (tmp_path / "texts" / f"{other}.jsonl").unlink()
    words = [
        "at byte 17, sample line 1 of its split: not UTF-8: byte 0xff at offset 10",
        "not JSON",
        "no column 'text': it has body",
        "it is no object",
        "not valid Unicode",
    ]
    found: list[str] = []
    splits = open_text(config.data)
    kept = list(splits.read(0, Store(), lambda loss: found.append(str(loss.damage))))
    assert kept == [(0, "fine"), (6, "also fine")]
    assert len(found) == len(words)
    for said, expected in zip(found, words, strict=True):
        assert re.search(expected, said) and str(path) in said


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_are_units_of_whole_shards_and_a_cut_one_is_damaged(config, tmp_path, ending):
    for path in (tmp_path / "texts").glob("*.jsonl"):
        data = path.read_bytes()
        packed = (
            gzip.compress(data) if ending == ".gz" else zstandard.compress(data[:999]) + zstandard.compress(data[999:])
        )
        Path(f"{path}{ending}").write_bytes(packed)
        path.unlink()
    assert sorted(read_all(config)) == sorted(TEXTS)
    path = tmp_path / "texts" / f"1.jsonl{ending}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Damaged, match=r"1.jsonl.*: it cannot be read: its last (gzip|zstd) stream is cut short"):
        read_all(config)


@pytest.mark.parametrize("block", [512, 700, 1024, 5000, 1 << 20])
def test_blocks_of_any_size_hold_every_line_once(config, block):
    config.data.split_bytes = block
    assert sorted(read_all(config)) == sorted(TEXTS)


def test_a_line_belongs_to_the_block_that_it_begins_in_wherever_the_edges_fall(tmp_path):
    """Blocks so small that an edge falls on every byte of every line, and lines longer than what is read at first."""
    texts = ["a", "", "bc", "d" * 700, "e", "f" * 300, "ghi", ""]
    lines = [json.dumps({"text": text}) for text in texts]
    begins = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1].tolist()
    for ending in ("", "\n"):
        (tmp_path / "a.jsonl").write_text("\n".join(lines) + ending)
        shards = look_up([str(tmp_path / "a.jsonl")])
        for block in range(1, 50):
            splits, store = (
                Lines(ByteBlocks(shards, block), {shard.url: Kind(JSON_LINES) for shard in shards}, "text", Limits()),
                Store(),
            )
            found = [(split, text) for split in range(len(splits)) for _, text in splits.read(split, store, refuse)]
            assert found == [(begin // block, text) for begin, text in zip(begins, texts, strict=True)], block


@pytest.mark.parametrize("skipping", [False, True])
def test_a_unit_that_breaks_off_is_an_error_or_loses_all_documents_from_there_on(skipping):
    windows = ShuffleWindows("broken", Breaking(), 3, 0, ByteTokenizer(), 0.0, skipping, None)
    if not skipping:
        with pytest.raises(Damaged, match=r"x/1 at byte 7: it broke off"):
            windows.read(0, Store())
        return
    window = windows.read(0, Store())
    assert window.skips == (Skip(0, 1, 2, ALL),)
    assert sorted(bytes(window.ids[window.ids < 256].tolist()).decode()) == sorted("0a0b0c1a1b2a2b2c")
    again = windows.read(0, Store(), window.skips)  # the same documents are left out, and that is no news
    assert again.skips == () and again.ids.tolist() == window.ids.tolist()


def test_a_unit_known_to_be_lost_is_not_waited_for_again():
    """Resuming from a state must not repeat requests to an unreachable server, with all their retries."""
    splits = Breaking(after=0)
    windows = ShuffleWindows("broken", splits, 3, 0, ByteTokenizer(), 0.0, True, None)
    window = windows.read(0, Store())
    assert window.skips == (Skip(0, 1, 0, ALL),) and sorted(splits.read_splits) == [0, 1, 2]
    again = windows.read(0, Store(), window.skips)
    assert again.ids.tolist() == window.ids.tolist() and sorted(splits.read_splits) == [0, 0, 1, 2, 2]


class Breaking:
    """Three splits of three documents, of which the second breaks off after some."""

    fingerprint: dict = {}  # noqa: RUF012

    def __init__(self, after: int = 2) -> None:
        self._after, self.read_splits = after, []

    def __len__(self) -> int:
        return 3

    def read(self, split, store, report):
        self.read_splits.append(split)
        for number in range(3):
            if split == 1 and number == self._after:
                raise Damaged("it broke off", f"x/{split}", 7)
            yield number, f"{split}{'abc'[number]}"


def test_a_document_of_fifty_megabytes_is_read_whole_and_once(config, tmp_path):
    long = "long " * (10 << 20)
    write_lines(tmp_path / "texts", ["before", long, "after"], shards=1)
    for other in (1, 2):
        (tmp_path / "texts" / f"{other}.jsonl").unlink()
    config.data.split_bytes = 1 << 20
    splits, store = open_text(config.data), Store()
    assert len(splits) > 50
    found = [(split, len(text)) for split in range(len(splits)) for _, text in splits.read(split, store, refuse)]
    assert found == [(0, 6), (0, len(long)), (len(splits) - 1, 5)]


def test_text_files_are_splits_of_consecutive_files(config, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for n, text in enumerate(TEXTS):
        (folder / f"{n:03}.txt").write_text(text)
    config.data.path = str(folder)
    assert read_all(config) == TEXTS
    assert 10 < len(open_text(config.data)) < 100
    (folder / "007.txt").write_bytes(b"ab\xff")
    with pytest.raises(Damaged, match=r"007.txt at byte 2, sample 007.txt: not UTF-8: byte 0xff"):
        read_all(config)


@pytest.mark.long
@pytest.mark.parametrize("at", [10, 100_000])
def test_going_on_reads_two_windows_of_each_lane_and_source_however_late_it_is(config, server, tmp_path, at):
    """Bytes counted by the server, and documents by the tokenizer."""
    for name, weight, lines in (("many", 3, 9000), ("few", 1, 2000)):
        write_lines(tmp_path / "texts" / name, [f"[{n}]" + "y" * (n * n % 120) for n in range(lines)])
        urls = [f"{server.url}/{name}/{{0..2}}.jsonl"]
        config.data.sources[name] = {"kind": "text", "urls": urls, "weight": weight, "validation": 0.0}
    config.data.urls = config.data.path = config.data.splits = config.data.epochs = None
    config.data.streams, config.data.assign_every, config.seq_len, config.batch.size = 4, 16, 16, 4
    config.data.split_bytes = 4096
    state = state_after(config, at)
    with World(partial(open_stream, config, store=Store(QUICK))) as world:
        if at < 1000:  # a state that was counted is one that was read
            world.batches(at)
            assert world.state() == state
        else:
            world.load(state)
        expected = digests(world.batches(3))
    tokenizer = Counting()
    with World(partial(open_stream, config, tokenizer=tokenizer, store=Store(QUICK)), dp=2) as world:
        world.load(state)
        server.sent.clear()
        assert digests(world.batches(3)) == expected
    windows = 2 * 4
    for name in ("many", "few"):
        sent = sum(count for path, count in server.sent.items() if name in path)
        assert 0 < sent <= windows * config.data.shuffle_window * (4096 + 256 + 1)
    assert tokenizer.documents <= 2 * windows * config.data.shuffle_window * (4096 // 30)


def state_after(config: Config, steps: int) -> dict:
    """The state after so many steps, whose windows are counted and not read: only assignment takes part."""
    with World(partial(open_stream, config, store=Store(QUICK))) as world:
        (stream,) = world.streams
        rows, streams = stream._rows, config.data.streams
        rows._readers = Sized(stream._sources)
        place = rows.start()
        for first in range(0, steps, config.data.assign_every):
            place = rows._assign(place)
            count = min(steps - first, config.data.assign_every)
            of, _ = stream._mixture.assign(np.arange(first * streams, (first + count) * streams), place.limits)
            done = [d + (of.reshape(-1, streams) == source).sum(0) for source, d in enumerate(place.done)]
            place = replace(place, rows=first + count, done=tuple(done))
            rows._held.clear()
        rows.forget()
        stream._place, stream._step = place, steps
        return json.loads(json.dumps(stream.state()))


class Sized:
    """In place of `WindowReaders`: windows of the right size and nothing in them. Every split is read once."""

    def __init__(self, sources) -> None:
        self.sources = sources
        self.splits = [[self.of_split(source, split) for split in range(len(source.splits))] for source in sources]

    def of_split(self, source, split: int) -> list[int]:
        return [len(text) + 1 for _, text in source.splits.read(split, Store(QUICK), refuse)]

    def ask(self, key, known) -> None:
        pass

    def take(self, key) -> Window:
        lengths = [size for split in self.sources[key[0]].splits_of(key[1]) for size in self.splits[key[0]][split]]
        starts = np.cumsum([0, *lengths])
        return Window(np.zeros(starts[-1], np.uint16), starts[:-1], (), 0, 0)

    def discard(self) -> None:
        pass

    def close(self) -> None:
        pass


class Counting(ByteTokenizer):
    documents = 0

    def encode_batch(self, texts):
        self.documents += len(texts)
        return super().encode_batch(texts)


def test_windows_hold_what_their_units_hold(config):
    windows = open_sources(config, ByteTokenizer())[0][0]
    found = [windows.read(number, Store()) for number in range(windows.per_epoch)]
    assert sum(len(window.starts) for window in found) == 300
    assert sorted(split for number in range(windows.per_epoch) for split in windows.splits_of(number)) == [
        *range(len(windows.splits))
    ]
    assert all(window.ids[window.starts[1:] - 1].tolist() == [256] * (len(window.starts) - 1) for window in found)


def test_token_ids_beyond_the_tokenizer_are_damage_and_never_wrapped(config, tmp_path):
    write_lines(tmp_path / "texts", [[1, 2], [70_000, 3], [-1], [255, 319]], shards=1)
    for other in (1, 2):
        (tmp_path / "texts" / f"{other}.jsonl").unlink()
    with pytest.raises(Damaged, match=r"document 1: token ids 3 to 70000, and the tokenizer has 320"):
        open_sources(config, ByteTokenizer())[0][0].read(0, Store())
    config.data.on_damage = "skip"
    window = open_sources(config, ByteTokenizer())[0][0].read(0, Store())
    assert [tuple(skip[1:]) for skip in window.skips] == [(0, 1, 1), (0, 2, 1)]
    assert sorted(window.ids.tolist()) == [1, 2, 255, 256, 256, 319]
