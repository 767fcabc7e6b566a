"""Collectives may take longer than the watchdog waits, in every phase, so that a hang is reported before they end."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from stoker.parallel.layout import Layout
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.runtime.process import Phase, Stamp
from stoker.trainer.runtime.timeouts import LATE_SECONDS, PACES, Timeouts
from stoker.trainer.runtime.watchdog import Watch
from tests import world


def watch_of(hang_seconds: float | None, pace: float) -> Watch:
    watch = Watch(hang_seconds)
    for step in range(1, 9):
        watch.see({0: Stamp(step, Phase.DATA, 0.0, 1, "host", 1)}, step * pace)
    return watch


@pytest.mark.parametrize("hang_seconds", [None, 5.0, 400.0])
@pytest.mark.parametrize("pace", [0.1, 1.0, 60.0])
def test_no_phase_may_take_longer_than_a_collective(hang_seconds: float | None, pace: float) -> None:
    timeouts, found = Timeouts(600.0, hang_seconds), []
    mesh = SimpleNamespace(set_timeout=found.append)
    fresh = Watch(hang_seconds)
    for phase in Phase:
        for stamp in (Stamp(0, phase, 0.0, 1, "host", 0), Stamp(1, phase, 0.0, 1, "host", 1)):
            assert timeouts.at_start() >= fresh.limit(stamp) + LATE_SECONDS
    for _ in range(2 * PACES):
        timeouts.after_step(pace, mesh)  # type: ignore[arg-type]
    assert len(found) == 3, "after the first steady step, and then now and then"
    watch = watch_of(hang_seconds, pace)
    for phase in Phase:
        assert found[-1] >= watch.limit(Stamp(8, phase, 0.0, 1, "host", 1)) + LATE_SECONDS
    assert min(timeouts.at_start(), *found) >= 600.0


def test_the_first_step_does_not_count_as_the_pace() -> None:
    timeouts, found = Timeouts(600.0, None), []
    mesh = SimpleNamespace(set_timeout=found.append)
    timeouts.after_step(900.0, mesh)  # type: ignore[arg-type]  # it has compiled
    timeouts.after_step(1.0, mesh)  # type: ignore[arg-type]
    assert found == [Timeouts(600.0, None).at_start()]


def waited() -> float:
    """Seconds until a rank gives up on a group whose timeout has been set after it was made."""
    mesh = mesh_over_default_group(Layout(1, 2), torch.device("cpu"), 60.0)
    dist.barrier()
    mesh.set_timeout(0.5)
    if mesh.rank == 1:
        time.sleep(2.0)
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        dist.all_reduce(torch.ones(1), group=mesh.group("dp_shard"))
    return time.monotonic() - began


def test_the_timeout_of_groups_that_exist_can_be_set() -> None:
    assert 0.3 < world.run(waited, 2, fresh=True)[0] < 20.0


def test_groups_are_made_with_the_timeout_of_the_start() -> None:
    assert timedelta(seconds=Timeouts(600.0, None).at_start()) == timedelta(seconds=1260)
