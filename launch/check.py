"""`stoker check`: does a layout compute what one process computes, or what another layout does?

Both run from the same initial weights on the same rows for a few steps. What is compared: every loss and gradient norm,
each gradient of the first step, and each parameter after the last.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from stoker.checkpoint import newest, read_state, read_tensors
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.data import prepare
from stoker.launch.local import launch
from stoker.launch.train import gpus, ranks_for, say
from stoker.parallel.layout import layout_of
from stoker.parallel.shards import GRADIENT, PARAMETER
from stoker.trainer.checking import GRADIENTS
from stoker.trainer.start import settle_config

ONE_PROCESS = [
    "launch.nproc=1",
    "parallel.tp=1",
    "parallel.pp=1",
    "parallel.zero=0",
    "parallel.dp_replicate=null",
    "parallel.schedule=1f1b",
    "parallel.stages_per_rank=1",
    "parallel.engine=fsdp",
    "parallel.offload=none",
    "compile=false",
    "activation_checkpointing=none",
]
QUIET = [
    "launch.max_restarts=0",
    "eval.sequences=0",
    "eval.every=0",
    "tracker=none",
    "log.progress=none",
    "profile.steps=null",
    "profile.phases_every=0",
    "checkpoint.dir=null",
    "checkpoint.remote=null",
]


@dataclass(frozen=True)
class Limits:
    """The largest relative differences that rounding explains."""

    loss: float  # of every step
    grad_norm: float
    gradient: float  # of the first step, normwise
    parameter: float | None  # after the last step, normwise; None: not compared


# fp32 is the contract. In fewer bits a rounding is 2**-9 (bf16) or 2**-12 (fp16) of a number, and AdamW, which divides
# small gradients by small gradients, makes much of it: there norms are compared in the first step, from identical
# parameters, and parameters not at all. tests/parallel/test_precision.py holds the layouts to the same limits.
LIMITS = {
    "fp32": Limits(1e-5, 1e-5, 1e-5, 1e-4),
    "bf16": Limits(2e-2, 5e-3, 2e-2, None),
    "fp16": Limits(5e-3, 1e-3, 5e-3, None),
}
# A gradient that is zero in exact arithmetic is noise in floating point: below this share of the norm of all gradients
# together, a difference is measured against that share.
SMALL_GRADIENT = 1e-3


@dataclass(frozen=True)
class Recording:
    """What a run wrote for us."""

    layout: str
    losses: list[float]
    norms: list[float]
    gradients: Path  # checkpoint
    parameters: Path


@dataclass(frozen=True)
class Difference:
    """One line of the table: the worst of its kind."""

    what: str
    where: str
    one: float | None
    other: float | None
    relative: float
    limit: float

    @property
    def sound(self) -> bool:
        return self.relative <= self.limit  # nan is not


def check(overrides: Sequence[str], against: str | None, steps: int) -> int:
    """Print the table; status 0 if both compute the same. Raises ConfigError for a start that is refused."""
    if steps < 1:
        raise ValueError(f"--steps={steps}: at least one step has to be compared")
    reference = ONE_PROCESS if against is None else shlex.split(against)
    spoken = {parse(override).key for override in (*overrides, *reference)}
    precision = [] if "precision" in spoken else ["precision=fp32"]
    folder = Path(tempfile.mkdtemp(prefix="stoker-check-"))
    asked = _together(overrides, precision)
    configs = [
        _settle(_together(asked, reference), folder / "reference", steps),
        _settle(asked, folder / "asked", steps),
    ]
    prepare(configs[0])
    for config in configs:
        ranks = ranks_for(config)
        say(f"{steps} steps: {layout_of(config, ranks)}")
        RunDirectory(Path(str(config.run.dir))).attempts.mkdir(parents=True)
        status = launch(config, ranks, say, "--measure")
        if status != 0:
            say(f"that run failed; what it wrote is in {config.run.dir}")
            return status
    one, other = (_recording(config) for config in configs)
    differences = compare(one, other, LIMITS[configs[1].precision])
    _show(one, other, configs[1].precision, differences)
    shutil.rmtree(folder)
    return 0 if all(difference.sound for difference in differences) else 1


def compare(one: Recording, other: Recording, limits: Limits) -> list[Difference]:
    """The worst loss, gradient norm, gradient and parameter of `other`, against `one`."""
    steps = 1 if limits.parameter is None else len(one.norms)
    found = [
        _worst_number("loss", one.losses, other.losses, limits.loss),
        _worst_number("gradient norm", one.norms[:steps], other.norms[:steps], limits.grad_norm),
        _worst_tensor("gradient", one.gradients, other.gradients, GRADIENT, limits.gradient, SMALL_GRADIENT),
    ]
    if limits.parameter is not None:
        found.append(_worst_tensor("parameter", one.parameters, other.parameters, PARAMETER, limits.parameter, 0.0))
    return found


def _together(overrides: Sequence[str], winning: Sequence[str]) -> list[str]:
    """Both, without what `winning` says differently."""
    keys = {parse(override).key for override in winning}
    return [*(override for override in overrides if parse(override).key not in keys), *winning]


def _settle(overrides: Sequence[str], run: Path, steps: int) -> Config:
    """The config of one of the two runs: as asked, but short, in a directory of its own and without onlookers."""
    ours = [f"run.dir={run}", "run.name=check", "run.fresh=false", "run.change=false", *QUIET]
    config, _ = settle_config(_together(overrides, ours), lambda config: (ranks_for(config), gpus(config)))
    config.steps = steps  # the schedule keeps its length
    return config


def _recording(config: Config) -> Recording:
    run = RunDirectory(Path(str(config.run.dir)))
    state = read_state(newest(run.checkpoints)[0])
    gradients = newest(run.path / GRADIENTS)[0]
    return Recording(state["layout"], state["losses"], state["norms"], gradients, newest(run.checkpoints)[0])


def _worst_number(what: str, one: list[float], other: list[float], limit: float) -> Difference:
    found = [
        Difference(what, f"step {step}", a, b, _relative(abs(a - b), abs(a)), limit)
        for step, (a, b) in enumerate(zip(one, other, strict=True), 1)
    ]
    return _worst(found)


def _worst_tensor(what: str, one: Path, other: Path, kind: str, limit: float, small: float) -> Difference:
    """Normwise: |a - b| / |a|."""
    theirs = dict(read_tensors(other, kind))
    ours = dict(read_tensors(one, kind))
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        return Difference(what, f"{odd[0]} is in one of them only", None, None, float("inf"), limit)
    least = small * _norm(ours.values())
    found = []
    for name, value in ours.items():
        difference = float((value.double() - theirs[name].double()).norm())
        norm = float(value.double().norm())
        found.append(
            Difference(
                what, name, norm, float(theirs[name].double().norm()), _relative(difference, max(norm, least)), limit
            )
        )
    return _worst(found)


def _worst(found: list[Difference]) -> Difference:
    return max(found, key=lambda difference: (difference.relative != difference.relative, difference.relative))


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def _show(one: Recording, other: Recording, precision: str, differences: list[Difference]) -> None:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    right = [Column(name, justify="right", no_wrap=True) for name in ("A", "B", "differs by", "limit")]
    where = Column("worst at", overflow="fold")
    table = Table(Column(no_wrap=True), where, *right, Column(no_wrap=True), box=None, pad_edge=False)
    for line in differences:
        verdict = "[green]same" if line.sound else "[red]differs"
        numbers = (number(line.one), number(line.other), f"{line.relative:.1e}", f"{line.limit:.0e}")
        table.add_row(line.what, line.where, *numbers, verdict)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(f"A  {one.layout}\nB  {other.layout}\n")
    console.print(table)
    if all(line.sound for line in differences):
        console.print(f"\n[green]the same run[/green], as far as {precision} can tell")
    else:
        console.print("\n[red]not the same run")
