"""What runtime bookkeeping costs a step: flags, stamps, requests, stragglers, goodput.

    python -m benchmarks.bookkeeping [--steps 800] [--ranks 2] [--limit 0.01] [overrides ...]

First the processor time of each part in one step, measured separately, which other processes hardly disturb; with
--steps 0 only that.

Then, for an idle machine, one run of the tiny model in which blocks of steps do all of it and none of it in turn, on
all ranks, so that other load on the machine affects both. Without it nothing is stamped, no file is checked, no work is
measured, no second is booked, and the message with the gradient norm has no other contents. A
block's median step time over that of the blocks before and after is a ratio; printed are their median and its standard
error (1.25 x 0.74 x the interquartile range over the root of their number). Writing metrics.jsonl belongs to training
itself and is in both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.data import prepare
from stoker.parallel import native
from stoker.parallel.mesh import Mesh
from stoker.parallel.update import ControlFlag, StepFlags, StepResult, UpdateDecision
from stoker.trainer.loop import Trainer
from stoker.trainer.main import main as rank
from stoker.trainer.report.goodput import Booking
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.faults import Faults
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.process import Phase, Phases
from stoker.trainer.runtime.requests import Requests
from stoker.trainer.runtime.stragglers import Stragglers, WorkClock

BLOCK = 10  # steps
LEFT_OUT = 2  # first steps of a block: what was done before still has its effect
SETTINGS = ["model=tiny", "seq_len=256", "batch.size=8", "batch.micro_size=4", "precision=bf16", "log.every=1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, help="fail when the cost is above this share of a step")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    for name, seconds in parts().items():
        print(f"{seconds * 1e6:6.1f} us  {name}")
    if not options.steps:
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [*SETTINGS, *options.overrides, f"steps={options.steps}", "checkpoint.every=0", f"run.dir={run}"]
        prepare(compose(words))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
        ended = subprocess.run(
            [sys.executable, *torchrun, "-m", "benchmarks.bookkeeping", "--rank", *words],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        if ended.returncode != 0:
            sys.exit(ended.stdout[-2000:] + ended.stderr[-4000:])
        seconds = [step["step_seconds"] for step in read(run / "metrics.jsonl")]
    blocks = [statistics.median(seconds[at + LEFT_OUT : at + BLOCK]) for at in range(BLOCK, len(seconds), BLOCK)]
    ratios = [
        blocks[at] / ((blocks[at - 1] + blocks[at + 1]) / 2) for at in range(1, len(blocks) - 1) if _keeps(at + 1)
    ]
    step, cost = statistics.median(blocks), statistics.median(ratios) - 1
    low, _, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * 0.74 * (high - low) / len(ratios) ** 0.5
    print(
        f"{options.ranks} ranks, {len(ratios)} blocks: {cost:+.2%} +- {error:.2%} of a step of {step * 1e3:.1f} ms "
        f"({cost * step * 1e6:.0f} us)"
    )
    sys.exit(options.limit is not None and cost > options.limit)


def parts() -> dict[str, float]:
    """Seconds of processor time that rank 0's thread spends on each part of a step, and on all."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        run.attempt(1).mkdir(parents=True)
        phase, requests = Phases(run.attempt(1) / "rank-0.stamp"), Requests()
        requests.watch(run, 1, forget=True)
        clock, stragglers, booking = WorkClock(), Stragglers(), Booking(run.seconds(1), phase, 0)
        message = torch.zeros(3, dtype=torch.float64)
        flags = [0.0] * (len(ControlFlag) + 2)
        found = {
            "stamps, six a step": 6 * _seconds(lambda: phase(1, Phase.DATA)),
            "checking for request files": _seconds(requests.votes),
            "measuring its work, and comparing that of ranks": _seconds(
                lambda: (clock.take(), stragglers.book([0.1, 0.1]))
            ),
            "booking seconds, without writing them": _seconds(lambda: (phase.take_seconds(), booking.step())),
            "flags and timings, beside the norm": _seconds(
                lambda: torch.cat([message, torch.tensor(flags, dtype=torch.float64)])
            ),
        }
        return found | {
            "all of it": sum(found.values()),
            "writing the books, twice a second": _seconds(booking.write, 50),
        }


def _seconds(call: Callable[[], object], repeats: int = 1000) -> float:
    call()
    began = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - began) / repeats


def _keeps(block: int) -> bool:
    """Whether the books are kept in this block of steps, counted from 0."""
    return block % 2 == 0


def work(trainer: Trainer) -> Outcome:
    """In the place of `Trainer.fit`: the same, with blocks of steps in which nothing is kept."""
    steps = trainer.steps

    def switching(last: int) -> Iterator[int]:
        with ExitStack() as off:
            for step in steps(last):
                if (step - 1) % BLOCK == 0:
                    off.close()
                    if not _keeps((step - 1) // BLOCK):
                        _switch_off(off)
                yield step

    trainer.steps = switching  # type: ignore[method-assign]
    return trainer.fit()


def _switch_off(stack: ExitStack) -> None:
    for owner, name, result in (
        (Phases, "__call__", None), (Phases, "take_seconds", {}), (Phases, "spent", 0.0), (Booking, "step", None),
        (Requests, "votes", frozenset()), (WorkClock, "take", 0.0), (Stragglers, "book", []),
        (Faults, "strike", None), (Faults, "in_passes", nullcontext()),
    ):  # fmt: skip
        stack.enter_context(patch.object(owner, name, lambda *_, result=result, **__: result))
    stack.enter_context(patch.object(native, "reduce_step", _agree_on_the_norm))


def _agree_on_the_norm(
    mesh: Mesh,
    gradients: Sequence[Tensor],
    loss_sum: Tensor,
    count: Tensor,
    flags: StepFlags,
    *,
    loss_scale: Tensor,
    nominal_count: int,
    grad_clip_norm: float | None,
    **_: object,
) -> UpdateDecision:
    """`stoker.parallel.update.reduce_step` without flags and timings."""
    squares = torch.stack(list(torch._foreach_norm(list(gradients)))).double().square().sum()
    message = torch.stack([squares, loss_sum, count])
    mesh.all_reduce(message)
    tokens = message[2]
    counted = tokens.clamp(min=1.0)
    loss = message[1] / counted
    divisor = loss_scale.double() * counted / nominal_count
    grad_norm = message[0].sqrt() / divisor
    sound = torch.isfinite(loss) & torch.isfinite(grad_norm) & (tokens > 0)
    if grad_clip_norm is not None:
        divisor = divisor / (grad_clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    skipped = (~sound).double()
    result = torch.stack([loss, grad_norm, tokens, skipped, loss_scale.double(), torch.zeros_like(skipped)])
    divisor = torch.where(sound, divisor, torch.ones_like(divisor)).float()
    others = result.new_zeros(len(ControlFlag) + mesh.layout.world)
    return UpdateDecision(StepResult(torch.cat([result, others])), divisor, skipped.float())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank(sys.argv[2:], work))
    main()
