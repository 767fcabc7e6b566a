"""`stoker replay`: recomputes one step of a run in one process, and finds the first number in it that is not finite.

The step is reached as the run reached it: from the newest checkpoint before it, over the same rows, with the same spans
passed over. Nothing in the run directory is touched.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from stoker.checkpoint import newest, read_state
from stoker.checkpoint.names import step_of
from stoker.conf.faults import read_faults
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.scratch import Scratch
from stoker.conf.values import ConfigError
from stoker.parallel.devices import backend_of, order_kernels, pick_device, set_exactness
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import start_mesh, stop_mesh, use_threads
from stoker.parallel.shards import PARAMETER
from stoker.parallel.update import StepFlags
from stoker.trainer.assemble import assemble
from stoker.trainer.loop import Trainer
from stoker.trainer.report.module_names import ModuleNames
from stoker.trainer.runtime.faults import NaNInjector
from stoker.trainer.runtime.process import Phases, Place
from stoker.trainer.runtime.requests import Requests
from stoker.trainer.runtime.starts import Start
from stoker.trainer.schedule import learning_rate


@dataclass
class Replayed:
    """Results of the recomputed step. `first_row` and `rows`: its global batch."""

    step: int
    from_step: int  # of the checkpoint; 0: from the initial weights
    first_row: int
    rows: int
    loss: float
    grad_norm: float
    weights: list[str]  # parameters that were not finite before the step
    output: str | None  # first module whose output was not finite, in the order of forward
    gradient: str | None  # first module whose output gradient was not finite, in the order of backward
    parameters: list[str] = field(default_factory=list)  # whose gradients were not


def replay(
    run: RunDirectory, config: Config, step: int, progress: Callable[[int, int], None] = lambda step, last: None
) -> Replayed:
    """Compute `step` again. `config`: the run's, for one process. `progress` is called with the last step that is done,
    first with that of the checkpoint, and with `step`. Raises ConfigError where the run has no such step."""
    if not 1 <= step <= config.steps:
        raise ConfigError(f"step {step}: the run has steps 1 to {config.steps}")
    struck = [
        run.struck(fault.name)
        for fault in read_faults(config.faults)
        if fault.do == "nan" and fault.at <= step < fault.at + fault.steps and run.struck(fault.name).exists()
    ]
    poison = NaNInjector(struck[0].read_text() or None) if struck else nullcontext()
    tracker = dataclasses.replace(config.tracker, names=[])
    config = dataclasses.replace(config, faults=[], tracker=tracker, observers=[])
    with (
        Scratch("stoker-replay-") as folder,
        _assembled(run, config, step, folder) as trainer,
    ):
        return _replay(trainer, step, poison, progress)


@contextmanager
def _assembled(run: RunDirectory, config: Config, step: int, folder: Path) -> Iterator[Trainer]:
    """A trainer in a scratch directory, in the state of the newest checkpoint before `step`."""
    scratch = RunDirectory(folder)
    scratch.attempt(1).mkdir(parents=True)
    scratch.checkpoints.mkdir()
    before = [path for path in newest(run.checkpoints) if (step_of(path) or 0) < step]
    if before:
        os.symlink(before[0], scratch.checkpoints / before[0].name)
    if run.tokenizer.exists():
        os.symlink(run.tokenizer, scratch.tokenizer)
    log = dataclasses.replace(config.log, progress="none")
    checkpoint = dataclasses.replace(config.checkpoint, remote=None)
    config = dataclasses.replace(config, log=log, checkpoint=checkpoint)
    use_threads(config.launch.threads, 1)
    set_exactness(config.deterministic)
    device = pick_device(config.launch.device, 0)
    order_kernels(device)
    backend = backend_of(config.launch.backend, device)
    mesh = start_mesh(layout_of(config, 1), device, dist.HashStore(), 0, config.parallel.timeout_seconds, backend)
    try:
        with open(os.devnull, "w") as screen:
            phase = Phases(scratch.attempt(1) / "rank-0.stamp")
            place = Place(0, 1, 0, 1, 0)
            trainer = assemble(config, mesh, place, Start(scratch, 1), Requests(), phase, screen)
            if before:  # spans passed over after that checkpoint are recorded in the newest one
                state = read_state(newest(run.checkpoints)[0])
                trainer.progress.passed_over = state["progress"].get("passed_over", [])
            try:
                yield trainer
            finally:
                trainer.rows.close()
                trainer.checkpoints.close()
    finally:
        stop_mesh()


def _replay(
    trainer: Trainer, step: int, poison: AbstractContextManager[Any], progress: Callable[[int, int], None]
) -> Replayed:
    config, from_step, step_log = trainer.config, trainer.progress.step, trainer.step_log()
    progress(from_step, step)
    for number in trainer.steps(step):
        first_row = trainer.rows.row
        rows = trainer.rows.next()
        wanted = number == step
        weights = _not_finite(trainer, gradients=False) if wanted else []
        watch = FirstNotFinite() if wanted else None
        with poison if wanted else nullcontext(), watch or nullcontext():
            trainer.engine.forward_backward(rows, first_row)
        parameters = _not_finite(trainer, gradients=True) if wanted else []
        lr = learning_rate(config.schedule, config.optim, number)
        result = trainer.engine.update(lr, StepFlags(frozenset(), 0.0, *step_log.ceilings(number)))
        if watch is not None:
            agreed = result.read()
            return Replayed(
                step, from_step, first_row, trainer.rows.row - first_row, agreed.loss, agreed.grad_norm,
                weights, watch.output, watch.gradient, parameters,
            )  # fmt: skip
        step_log.enter(number, lr, result, None, {})
        step_log.settle(everything=True)
        progress(number, step)
    raise ConfigError(f"step {step} was passed over: the run never took it")


def _not_finite(trainer: Trainer, gradients: bool) -> list[str]:
    shards = trainer.engine.gradient_shards() if gradients else trainer.engine.shards()
    return sorted(
        {shard.name for shard in shards if (gradients or shard.kind == PARAMETER) and not _finite(shard.data)}
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class FirstNotFinite:
    """While entered: checks the outputs of all modules and their gradients, on any model.

    Not those of modules that have no parameters and are given no floating-point tensor: they compute with integers, and
    an infinity is meant, as in a mask of attention scores.
    """

    def __init__(self) -> None:
        self.output: str | None = None
        self.gradient: str | None = None
        self._names = ModuleNames()

    def __enter__(self) -> FirstNotFinite:
        self._names.__enter__()
        self._hook = register_module_forward_hook(self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._names.__exit__()

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not _is_floating(output):
            return
        if not any(map(_is_floating, arguments)) and next(module.parameters(), None) is None:
            return
        where = f"{self._names[module]} (micro-batch {self._names.calls})"
        if self.output is None and not _finite(output):
            self.output = where
        if output.requires_grad:

            def check(gradient: Tensor) -> None:
                if self.gradient is None and not _finite(gradient):
                    self.gradient = where

            output.register_hook(check)


def lines_of(found: Replayed, recorded: dict[str, Any] | None) -> Iterator[str]:
    """Lines for the user. `recorded`: the line of metrics.jsonl, where the run still has it."""
    start = f"the checkpoint of step {found.from_step}" if found.from_step else "the initial weights"
    last = found.first_row + found.rows - 1
    yield f"step {found.step}, from {start}: rows {found.first_row} to {last}, in one process"
    for name, value in (("loss", found.loss), ("grad_norm", found.grad_norm)):
        before = "" if recorded is None else f" (in the run: {recorded.get(name)})"
        yield f"{name} {value:.6g}{before}"
    if recorded is not None and recorded.get("first_row", found.first_row) != found.first_row:
        yield f"other rows than in the run, whose step began at row {recorded['first_row']}"
    if found.weights:
        yield f"not finite before the step: {_some(found.weights)}"
    if found.output:
        yield f"first output that is not finite: {found.output}"
    if found.gradient:
        yield f"first gradient of an output that is not finite: {found.gradient}"
    if found.parameters:
        yield f"gradients that are not finite: {_some(found.parameters)}"
    if math.isfinite(found.loss) and math.isfinite(found.grad_norm):
        yield "every number is finite"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
