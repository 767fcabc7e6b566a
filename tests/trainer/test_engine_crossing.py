"""A checkpoint of either engine continues on the other: the losses are those of one process that never stopped.

All ordered pairs, and a run whose number of ranks and engine change at every start. The layouts of a world size share
their ranks: one start of processes saves all of theirs, one resumes from all others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from stoker.parallel.shards import Shard
from tests import world
from tests.extent import FULL, some
from tests.parallel.parity import Case
from tests.parallel.reference import Trace, assemble, normwise, one_process
from tests.trainer.test_resume import HALF, half


def config_of(layout: Layout, offload: str = "none", micro: int = 2, rows: int = 16) -> Config:
    config = Case(micro, tied=True).config(layout)
    config.batch.size = rows
    config.parallel.engine, config.parallel.offload = layout.engine, offload
    config.parallel.dp_replicate = layout.dp_replicate if layout.zero else None
    return config


def deepspeed(zero: int, shard: int = 2, pp: int = 1) -> Layout:
    return Layout(1, shard, 1, pp, zero, "deepspeed")


PARTIES = {
    "fsdp z0": config_of(Layout(2)),
    "fsdp z3": config_of(Layout(1, 2, zero=3)),
    "fsdp z2 tp2": config_of(Layout(1, 2, 2, zero=2)),
    "deepspeed z1": config_of(deepspeed(1)),
    "deepspeed z2": config_of(deepspeed(2)),
    "deepspeed z3": config_of(deepspeed(3)),
    "deepspeed z3 offload": config_of(deepspeed(3), offload="cpu"),
    "deepspeed z1 pp2": config_of(deepspeed(1, shard=2, pp=2)),
}
RANKS = {name: config.parallel.tp * config.parallel.pp * 2 for name, config in PARTIES.items()}
Found = tuple[list[tuple[float, float]], list[Shard]]


def halves(work: Sequence[tuple[Config, Path]]) -> list[Found]:
    """On a rank: one run after the other, each from what its directory holds."""
    found = []
    for config, directory in work:
        trained, shards = half(config, directory)
        found.append((trained, [Shard(**{**vars(shard), "data": shard.data.clone()}) for shard in shards]))
    return found


@cache
def expected(steps: int, rows: int = 16) -> Trace:
    return one_process(config_of(Layout(), rows=rows), steps)


def assert_continues(name: str, ranks: Sequence[Found], trace: Trace, done: int) -> None:
    losses, norms = zip(*ranks[0][0], strict=True)
    assert losses == pytest.approx(trace.losses[done : done + HALF], rel=1e-5), name
    assert norms == pytest.approx(trace.norms[done : done + HALF], rel=1e-5), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of every party's run."""
    folder = tmp_path_factory.mktemp("saved")
    for size in sorted(set(RANKS.values())):
        names = [name for name in PARTIES if RANKS[name] == size]
        work = [(PARTIES[name], folder / name) for name in names]
        for name, *found in zip(names, *world.run(halves, size, work, timeout=200.0, fresh=True), strict=True):
            assert_continues(name, found, expected(2 * HALF), 0)
    return folder


def pairs_of(heirs: Sequence[str]) -> list[tuple[str, str]]:
    """(giver, heir): to each heir, of each engine's givers one, which take turns. `FULL`: all."""
    found = []
    for turn, heir in enumerate(heirs):
        for engine in ("fsdp", "deepspeed"):
            givers = [name for name in PARTIES if name.startswith(engine) and name != heir]
            found += [(giver, heir) for giver in (givers if FULL else [givers[turn % len(givers)]])]
    return found


@pytest.mark.long
@pytest.mark.parametrize("size", some(sorted(set(RANKS.values()), reverse=True), 2))
def test_every_layout_resumes_from_one_of_each_engine(saved: Path, tmp_path: Path, size: int) -> None:
    pairs = pairs_of([name for name in PARTIES if RANKS[name] == size])
    work = []
    for number, (giver, heir) in enumerate(pairs):
        directory = tmp_path / str(number)
        directory.mkdir()
        checkpoint = f"step-{HALF:08}"
        (directory / checkpoint).symlink_to(saved / giver / checkpoint)
        work.append((PARTIES[heir], directory))
    trace = expected(2 * HALF)
    for (giver, heir), *found in zip(pairs, *world.run(halves, size, work, timeout=300.0, fresh=True), strict=True):
        assert_continues(f"{giver} -> {heir}", found, trace, HALF)
        parameters = assemble([shards for _, shards in found])
        for name, value in trace.parameters.items():
            assert normwise(parameters[name], value) < 1e-4, f"{giver} -> {heir}: {name}"


@pytest.mark.long
def test_a_run_resumes_on_any_number_of_ranks(tmp_path: Path) -> None:
    """4 -> 2 -> 3 -> 1 ranks, DeepSpeed's ZeRO 3, 2 and 1 and our own in between."""
    rows = 12
    starts = [
        config_of(deepspeed(3, shard=4), micro=1, rows=rows),
        config_of(deepspeed(2, shard=2), micro=2, rows=rows),
        config_of(deepspeed(1, shard=3), micro=2, rows=rows),
        config_of(Layout(), micro=4, rows=rows),
    ]
    trace = expected(len(starts) * HALF, rows)
    for number, (config, ranks) in enumerate(zip(starts, (4, 2, 3, 1), strict=True)):
        found = world.run(half, ranks, config, tmp_path, timeout=120.0, fresh=True)
        assert_continues(f"start {number + 1}", found, trace, number * HALF)
    parameters = assemble([shards for _, shards in found])
    for name, value in trace.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name
