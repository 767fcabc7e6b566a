"""Reading over a network that breaks."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import pytest

from stoker.data.remote import Damaged
from stoker.data.remote.blocks import BlockCache
from stoker.data.remote.lookup import look_up
from stoker.data.remote.retries import Patience
from stoker.data.remote.shards import Shard, addresses, expand, scheme
from stoker.data.remote.store import Store
from tests.data.server import RangeServer, serving
from tests.data.streaming.conftest import open_stream
from tests.data.streaming.simulated import batches, digests

DATA = random.Random(0).randbytes(300_000)
QUICK = Patience(retries=2, first_seconds=0.001, stall_seconds=0.4)


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        yield server


def shard_of(server: RangeServer) -> Shard:
    found = look_up([f"{server.url}/a.bin"], QUICK)[0]
    server.requests.clear()
    server.sent.clear()
    return found


def test_any_range_is_read_as_it_is_in_the_file(server):
    shard, store = shard_of(server), Store(QUICK)
    assert shard.size == len(DATA) and shard.version
    chance = random.Random(1)
    for _ in range(20):
        begin, end = sorted(chance.choices(range(len(DATA) + 50), k=2))
        assert store.read(shard, begin, end) == DATA[begin:end]
    assert store.traffic.bytes == sum(server.sent.values())


@pytest.mark.parametrize("fault", ["short 70000", "stall 70000"])
def test_a_connection_that_breaks_or_stalls_is_taken_up_at_the_broken_byte(server, fault):
    shard, store = shard_of(server), Store(QUICK)
    server.faults = [("a.bin", fault), ("a.bin", fault)]
    assert store.read(shard, 1000, 251_000) == DATA[1000:251_000]
    begins = [begin for _, begin, _ in server.requests]
    assert begins == [1000, 71_000, 141_000]
    assert store.traffic.retries == 2
    assert sum(server.sent.values()) == 250_000  # no byte was sent twice


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_to_a_busy_server_is_retried(server, status):
    shard, store = shard_of(server), Store(QUICK)
    server.faults = [("a.bin", f"status {status}")] * 2
    assert store.read(shard, 0, 10) == DATA[:10]
    assert store.traffic.retries == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status 503", "the server answers 503 Service Unavailable, 3 times in a row"),
        ("short 0", "IncompleteRead.*, 3 times in a row"),
        ("stall 0", "Read timed out"),
        ("status 404", "the server answers 404 Not Found"),
        ("status 403", "the server answers 403 Forbidden"),
        ("changed", "its ETag is .* it changed"),
        ("whole", "the server answers 200 to a range request"),
    ],
)
def test_what_cannot_be_had_is_an_error_with_url_and_byte(server, fault, words):
    shard, store = shard_of(server), Store(QUICK)
    server.always = {"a.bin": fault}
    with pytest.raises(Damaged, match=f"{server.url}/a.bin at byte 1000: .*{words}"):
        store.read(shard, 1000, 10_000)


def test_progress_gives_new_patience(server):
    shard, store = shard_of(server), Store(QUICK)
    server.faults = [("a.bin", "short 1000")] * 9
    assert store.read(shard, 0, 100_000) == DATA[:100_000]
    assert store.traffic.retries == 9


def test_a_file_that_grew_or_shrank_is_not_read_on(server, tmp_path):
    shard, store = shard_of(server), Store(QUICK)
    (tmp_path / "served" / "a.bin").write_bytes(DATA + b"more")
    with pytest.raises(Damaged, match="requested bytes 0-9/300000, the server returns bytes 0-9/300004: it changed"):
        store.read(shard, 0, 10)
    local = look_up([str(tmp_path / "served" / "a.bin")])[0]
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    with pytest.raises(Damaged, match=r"a.bin: it has 300000 bytes now and had 300004: it changed"):
        store.read(local, 0, 10)


def test_waits_double_and_differ():
    waits = list(Patience(retries=8, first_seconds=1, most_seconds=10).waits())
    assert all(0.5 * wait <= found <= wait for found, wait in zip(waits, [1, 2, 4, 8, 10, 10, 10, 10], strict=True))
    assert len(set(waits)) == 8


def test_shards_that_are_not_there_are_named_at_once(server):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot read http://.*/b.bin: the server answers 404"):
        look_up([f"{server.url}/a.bin", f"{server.url}/b.bin"])
    assert time.monotonic() - began < 5
    server.faults = [("a.bin", "status 503")] * 2
    assert look_up([f"{server.url}/a.bin"], QUICK)[0].size == len(DATA)


def test_an_empty_shard_has_no_bytes(server, tmp_path):
    (tmp_path / "served" / "empty").write_bytes(b"")
    shard = look_up([f"{server.url}/empty"])[0]
    assert shard.size == 0 and Store().read(shard, 0, 10) == b""


def test_cached_blocks_are_not_requested_again(server, tmp_path):
    shard = shard_of(server)
    store = Store(QUICK, BlockCache(tmp_path / "blocks", 1 << 20, block=10_000))
    assert store.read(shard, 15_000, 44_000) == DATA[15_000:44_000]
    assert server.requests == [("/a.bin", 10_000, 50_000)]
    assert store.read(shard, 5_000, 60_000) == DATA[5_000:60_000]
    assert server.requests[1:] == [("/a.bin", 0, 10_000), ("/a.bin", 50_000, 60_000)]
    other = Store(QUICK, BlockCache(tmp_path / "blocks", 1 << 20, block=10_000))
    assert other.read(shard, 0, 60_000) == DATA[:60_000]
    assert len(server.requests) == 3 and other.traffic.bytes == 0
    assert other.read(shard, 290_000, 300_000) == DATA[290_000:]


def test_a_damaged_block_of_the_cache_is_fetched_again(server, tmp_path):
    shard = shard_of(server)
    store = Store(QUICK, BlockCache(tmp_path / "blocks", 1 << 20, block=10_000))
    store.read(shard, 0, 30_000)
    for number, path in enumerate(sorted((tmp_path / "blocks").glob("*/*"))):
        data = bytearray(path.read_bytes())
        data[77] ^= 4
        path.write_bytes(data[: 10_004 if number else 500])
    assert store.read(shard, 0, 30_000) == DATA[:30_000]
    assert server.requests == [("/a.bin", 0, 30_000)] * 2


def test_the_cache_keeps_to_its_cap_and_to_what_was_used_last(server, tmp_path):
    shard = shard_of(server)
    store = Store(QUICK, BlockCache(tmp_path / "blocks", 100_000, block=1000))
    for begin in range(0, 200_000, 1000):
        store.read(shard, begin, begin + 1000)
    held = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("*/*"))
    assert 50_000 < held < 120_000
    server.requests.clear()
    store.read(shard, 199_000, 200_000)
    assert not server.requests


def test_a_cache_that_cannot_be_written_costs_only_time(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = Store(QUICK, BlockCache(tmp_path / "file", 1 << 20))
    assert store.read(shard_of(server), 0, 1000) == DATA[:1000]


def test_brace_patterns_are_ranges_and_lists():
    assert list(expand("s-{08..10}.tar")) == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert list(expand("{a,b}/{0..1}")) == ["a/0", "a/1", "b/0", "b/1"]
    with pytest.raises(ValueError, match=r"the range \{3..1\} goes backwards"):
        list(expand("{3..1}"))
    assert addresses("{a,b}") == ["a", "b"] == addresses(["a", "b"]) and addresses(None) == []
    with pytest.raises(ValueError, match=r"data.urls=3: must be an address, a brace pattern"):
        addresses(3)
    assert [scheme(url) for url in ("a/b:c", "s3://b/k", "pipe:cat x", "file:///x", "https://h/x")] == [
        "file", "s3", "pipe", "file", "https"
    ]  # fmt: skip


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_with_much_stderr_is_read_to_its_end(status):
    """More on stderr than a pipe holds, before the first byte of output."""
    command = f"head -c 300000 /dev/zero | tr '\\\\0' x >&2; echo >&2; echo last words >&2; echo found; exit {status}"
    with Store().stream(Shard(f"pipe:{command}", -1)) as output:
        if not status:
            assert output.read(100) == b"found\n"
        else:
            with pytest.raises(Damaged, match="the command ended with status 3: last words"):
                output.read(100)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import os

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value
    server.stop()


def test_s3_is_read_by_range_and_what_is_missing_is_named(s3):
    import fsspec

    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("texts")
    with system.open("texts/a.bin", "wb") as file:
        file.write(DATA)
    shard = look_up(["s3://texts/a.bin"], QUICK)[0]
    assert shard.size == len(DATA)
    store = Store(QUICK)
    assert store.read(shard, 1000, 200_000) == DATA[1000:200_000]
    assert store.traffic.bytes == 199_000
    with pytest.raises(ValueError, match=r"cannot read s3://texts/b.bin: it does not exist"):
        look_up(["s3://texts/b.bin"], QUICK)
    system.rm("texts/a.bin")
    with pytest.raises(Damaged, match=r"s3://texts/a.bin at byte 5: it does not exist"):
        Store(QUICK).read(shard, 5, 10)


@pytest.mark.long
def test_a_stream_from_s3_is_the_stream_of_the_same_files(s3, config, tmp_path):
    import fsspec

    opener = partial(open_stream, config)
    expected = digests(batches(opener, None))
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("streamed")
    for path in (tmp_path / "texts").glob("*.jsonl"):
        system.put(str(path), f"streamed/{path.name}")
    config.data.path, config.data.urls = None, ["s3://streamed/{0..2}.jsonl"]
    splits = [{"dp": 2, "workers": 1, "batches": 3}, {"dp": 3}]
    assert digests(batches(opener, None, splits)) == expected
