"""What torch's schedules demand, tried on the real objects over a simulated network as strict as NCCL's."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from stoker.conf.schema import BatchConfig, Config, ParallelConfig
from stoker.parallel.refusals import REFUSALS
from stoker.parallel.start import Start
from tests.parallel.simulated import Deadlock, Network, Transfer, simulate

ABOUT_SCHEDULES = ("full pipeline", "interleaved rounds")
GRID = [
    *itertools.product(("gpipe", "1f1b"), range(2, 9), [1]),
    *itertools.product(["interleaved"], range(2, 9), [2]),
    *itertools.product(["interleaved"], range(2, 5), [3]),
]


def refused(schedule: str, pp: int, stages_per_rank: int, micro_batches: int) -> str | None:
    config = Config(batch=BatchConfig(size=micro_batches, micro_size=1))
    config.parallel = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=stages_per_rank)
    said = [entry.check(Start(config, pp, 0)) for entry in REFUSALS if entry.name in ABOUT_SCHEDULES]
    return next((message for message in said if message), None)


@pytest.mark.long
@pytest.mark.parametrize(("schedule", "pp", "stages_per_rank"), GRID)
def test_what_is_accepted_runs_and_what_is_refused_does_not(schedule: str, pp: int, stages_per_rank: int) -> None:
    for micro_batches in range(1, 17):
        if refused(schedule, pp, stages_per_rank, micro_batches):
            with pytest.raises((ValueError, Deadlock)):
                simulate(schedule, pp, stages_per_rank, micro_batches)
            continue
        stages = simulate(schedule, pp, stages_per_rank, micro_batches)
        for stage in stages:
            forwards = [chunk for kind, chunk in stage.computed if kind == "forward"]
            backwards = [chunk for kind, chunk in stage.computed if kind == "backward"]
            assert forwards == backwards == list(range(micro_batches))
            assert stage.last == [chunk == micro_batches - 1 for chunk in backwards]
            if schedule == "1f1b":
                assert stage.most_in_flight == min(micro_batches, pp - stage.stage_index)


def test_the_simulated_network_sees_a_deadlock() -> None:
    """Two ranks that both send first on one communicator: what NCCL hangs on."""
    network = Network(2)
    seen: list[BaseException] = []

    def both_send(rank: int) -> None:
        sent, awaited = (Transfer(sends, rank, 1 - rank, rank if sends else 1 - rank) for sends in (True, False))
        try:
            network.wait(rank, network.start("both", [sent]))
            network.wait(rank, network.start("both", [awaited]))
        except Deadlock as deadlock:
            seen.append(deadlock)
        finally:
            network.leave()

    threads = [threading.Thread(target=both_send, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(seen) == 2


def test_the_reason_to_refuse_zero_bubble_schedules_still_holds() -> None:
    """When this fails, torch has changed: see `_zero_bubble` in `stoker.trainer.validate`."""
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    reduced = []
    layer.weight.register_post_accumulate_grad_hook(reduced.append)
    for _ in range(2):
        x = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
        _, groups = stage_backward_input([layer(x).sum()], None, [x], iter(layer.parameters()))
        stage_backward_weight(iter(layer.parameters()), groups)
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    assert reduced == []
