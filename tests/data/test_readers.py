"""Reader processes end with their rank, and only with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from stoker.conf.schema import to_dict
from stoker.data import IndexedLoader
from tests.data.plans import NumberPlan

ROOT = Path(__file__).resolve().parents[2]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def soon(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return holds()


RANK = """
    import os, signal, sys
    from stoker.data import IndexedLoader
    from tests.data.plans import NumberPlan
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    loader = IndexedLoader(NumberPlan(seconds=float(sys.argv[1])), 4, workers=2, prefetch=2)
    print("ready", flush=True)
    for line in sys.stdin:
        print(loader.next().tokens[0, 0].item(), *asked, flush=True)
    loader.close()
"""


@contextmanager
def started_rank(seconds_per_batch: float = 0.0) -> Iterator[subprocess.Popen]:
    """A rank in a separate process group, with the handlers of a trainer, that reads a batch on request."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK), str(seconds_per_batch)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def rank() -> Iterator[subprocess.Popen]:
    with started_rank() as process:
        yield process


def ask(rank: subprocess.Popen) -> list[int]:
    rank.stdin.write("\n")
    rank.stdin.flush()
    return [int(word) for word in rank.stdout.readline().split()]


def test_kill_9_of_a_rank_leaves_no_reader(rank):
    assert ask(rank) == [0]
    readers = children(rank.pid)
    assert len(readers) == 2 and all(map(alive, readers))
    os.kill(rank.pid, signal.SIGKILL)
    assert soon(lambda: not any(map(alive, readers)))


def test_kill_9_of_a_rank_ends_readers_in_the_middle_of_a_read():
    with started_rank(seconds_per_batch=120) as rank:
        readers = children(rank.pid)
        time.sleep(0.2)
        os.kill(rank.pid, signal.SIGKILL)
        assert soon(lambda: not any(map(alive, readers)))


def test_signals_to_the_whole_group_leave_the_readers_reading(rank):
    assert ask(rank) == [0]
    readers = children(rank.pid)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    for number in numbers:
        os.killpg(rank.pid, number)
        time.sleep(0.1)
    for reader in readers:
        os.kill(reader, signal.SIGHUP)  # of a terminal that closes, for which the rank has no handler
    for batch in range(1, 9):
        assert ask(rank) == [4 * batch, *numbers]
    assert all(map(alive, readers))


@pytest.mark.long
def test_a_rank_that_ends_without_closing_leaves_no_reader(rank):
    ask(rank)
    readers = children(rank.pid)
    rank.stdin.close()
    rank.wait(10)
    assert rank.returncode == 0
    assert soon(lambda: not any(map(alive, readers)))
    rank.stdin = None


def read_on(loader: IndexedLoader) -> None:
    while True:
        loader.next()


def test_a_killed_reader_is_one_clear_error_within_seconds():
    with closing(IndexedLoader(NumberPlan(), 4, workers=2, prefetch=2)) as loader:
        loader.next()
        victim, other = children(os.getpid())[-2:]
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"a data reader \(pid {victim}\) was killed by SIGKILL: .* memory"):
            read_on(loader)
        assert time.monotonic() - began < 5
        assert not alive(other)


def test_a_token_file_cut_during_reading_is_reported(config):
    program = """
        import json, os, sys
        from stoker.conf.schema import Config, from_dict
        from stoker.data import IndexedLoader, open_rows
        from tests.data.conftest import cache_of
        config = from_dict(json.loads(sys.argv[1]))
        plan = open_rows(config, "train")
        os.truncate(cache_of(config.data).folder / "train.tokens", 0)
        IndexedLoader(plan, 4, workers=1).next()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), json.dumps(to_dict(config))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "was killed by SIGBUS: a file it reads was cut short" in done.stderr.splitlines()[-1]


def test_a_reader_killed_while_it_reads_is_an_error_too():
    with closing(IndexedLoader(NumberPlan(seconds=30), 4, workers=1)) as loader:
        os.kill(children(os.getpid())[-1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="killed by SIGKILL"):
            loader.next()


def test_an_error_in_a_reader_is_raised_in_the_rank():
    with closing(IndexedLoader(NumberPlan(fails_at=9), 4, workers=2)) as loader:
        assert [loader.next().tokens[0, 0].item() for _ in range(2)] == [0, 4]
        with pytest.raises(RuntimeError, match=r"(?s)a data reader failed .*ValueError: row 9 is unreadable"):
            loader.next()


def test_closing_takes_no_time_even_while_readers_read():
    loader = IndexedLoader(NumberPlan(seconds=60), 4, workers=2)
    readers = children(os.getpid())[-2:]
    began = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - began < 5
    assert not any(map(alive, readers))


def test_readers_work_at_the_same_time():
    with closing(IndexedLoader(NumberPlan(seconds=0.5), 4, workers=4, prefetch=1)) as loader:
        began = time.monotonic()
        for _ in range(4):
            loader.next()
        assert time.monotonic() - began < 1.5


def test_nothing_is_left_in_shared_memory(rank):
    before = set(os.listdir("/dev/shm"))
    ask(rank)
    assert set(os.listdir("/dev/shm")) <= before
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    assert set(os.listdir("/dev/shm")) <= before
