"""The stream on forked ranks that talk over gloo, and what becomes of it when processes are killed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from stoker.conf.schema import Config
from stoker.data.streaming.exchange import Ranks
from stoker.data.streaming.readers import WindowReaders
from stoker.data.streaming.shuffle_windows import Window
from stoker.parallel.batch import Batch
from stoker.parallel.layout import Layout
from stoker.parallel.mesh import mesh_over_default_group
from tests import world
from tests.data.batches import digest, together
from tests.data.streaming.conftest import open_stream
from tests.data.streaming.simulated import World, batches
from tests.data.test_readers import alive, children


def read_as_rank(config: Config, tp: int, pp: int, dp: int, count: int) -> list:
    import torch

    mesh = mesh_over_default_group(Layout(dp_shard=dp, tp=tp, pp=pp), torch.device("cpu"), 30.0)
    stream = open_stream(config, mesh.dp_rank, dp, exchange=Ranks(mesh), workers=1, prefetch=3)
    found = []
    while len(found) < count and not stream.exhausted:
        rows = stream.next()
        mesh.all_reduce(rows.tokens.sum())  # training talks at the same time
        found.append(rows)
    state = stream.state()
    stream.close()
    return [
        mesh.dp_rank,
        mesh.coordinate.tp + mesh.coordinate.pp,
        list(map(listed, found)),
        state,
    ]


def listed(rows: Batch) -> list[Any]:
    return [field.tolist() for field in vars(rows).values() if field is not None]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 2), (2, 1, 2), (1, 2, 1)])
def test_ranks_of_a_process_group_read_what_one_process_reads(config, opener, tp, pp, dp):
    import torch

    count = 1000  # to the end
    ranks = world.run(read_as_rank, tp * pp * dp, config, tp, pp, dp, count)
    expected = batches(opener, None)
    assert all(rank[3] == ranks[0][3] for rank in ranks)
    for rank in ranks:  # the peers of a model-parallel group hold equal rows
        assert rank[2] == next(other[2] for other in ranks if other[0] == rank[0])
    readers = sorted(rank for rank in ranks if rank[1] == 0)
    found = [together([Batch(*map(torch.tensor, rank[2][n])) for rank in readers]) for n in range(len(readers[0][2]))]
    assert list(map(listed, found)) == list(map(listed, expected))


def read_counted(folder: str, differing: bool, tp: int, pp: int) -> str:
    import torch

    from stoker.conf.schema import BatchConfig, DataConfig
    from stoker.data import open_stream as open_any

    mesh = mesh_over_default_group(Layout(tp=tp, pp=pp), torch.device("cpu"), 30.0)
    data = DataConfig(
        target="stoker.data.text:open_source",
        name="texts",
        path=f"{folder}/texts",
        cache=f"{folder}/cache",
        validation=0.0,
    )
    config = Config(data=data, seq_len=16, batch=BatchConfig(size=4))
    if differing:
        config.run.seed = mesh.rank
    stream = open_any(config, mesh)
    found = []
    try:
        for _ in range(65):  # the first is compared, and the last
            found.append(digest(stream.next()))
    except RuntimeError as error:
        return f"after {len(found)}: {error}"
    return found[-1]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_counted_rows_are_compared_over_a_model_parallel_group(config, tmp_path, tp, pp):
    (tmp_path / "cache").mkdir()
    last = world.run(read_counted, 2, str(tmp_path), False, tp, pp)
    assert last[0] == last[1]
    said = "after 0: the ranks of a model-parallel group hold different rows"
    assert world.run(read_counted, 2, str(tmp_path), True, tp, pp) == [said, said]


def test_a_killed_reader_is_an_error_and_nothing_is_left_behind(opener):
    before = set(os.listdir("/dev/shm"))
    with World(opener, workers=2) as run:
        run.batches(2)
        state, following = run.state(), None
        readers = children(os.getpid())[-2:]
        for reader in readers:
            os.kill(reader, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"a data reader \(pid \d+\) was killed by SIGKILL"):
            run.batches()
    assert not any(map(alive, readers))
    with World(opener, workers=1) as run:
        run.load(state)
        following = digest(run.next())
    assert following == digest(batches(opener, 3)[2])
    assert set(os.listdir("/dev/shm")) <= before


def test_all_readers_have_work_as_soon_as_there_is_some_for_each():
    def read(key, known):
        return Window(np.array([os.getpid()], np.uint32), np.zeros(1, np.int64), (), 0, 0)

    readers = WindowReaders(read, 3)
    try:
        for number in range(6):
            readers.ask((0, number), None)
        pids = [int(readers.take((0, number)).ids[0]) for number in range(6)]
    finally:
        readers.close()
    assert sorted(pids.count(pid) for pid in set(pids)) == [2, 2, 2]


def test_readers_end_with_their_rank(opener):
    pid = os.fork()
    if pid == 0:
        try:
            stream = opener(workers=2)
            stream.next()
            time.sleep(60)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 20
    while len(readers := children(pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while any(map(alive, readers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(readers) == 2 and not any(map(alive, readers))
