"""`stoker check`: does a layout compute what one process computes, or what another layout does?

Both run from the same initial weights on the same rows for a few steps. What is compared: every loss and gradient norm,
each gradient of the first step, and each parameter after the last.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stoker.checkpoint import newest, read_state, read_tensors
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.scratch import Scratch
from stoker.conf.values import ConfigError
from stoker.data import prepare
from stoker.launch.differences import (
    LIMITS,
    SMALL_GRADIENT,
    Difference,
    Limits,
    show,
    worst_number,
    worst_tensor,
)
from stoker.launch.local import launch
from stoker.launch.train import ranks_for, say, where
from stoker.parallel.layout import layout_of
from stoker.parallel.shards import GRADIENT, PARAMETER
from stoker.trainer.checking import GRADIENTS
from stoker.trainer.settle import settle_config

ONE_PROCESS = [
    "launch.nproc=1",
    "parallel.tp=1",
    "parallel.pp=1",
    "parallel.cp=1",
    "parallel.ep=1",
    "parallel.zero=0",
    "parallel.dp_replicate=null",
    "parallel.schedule=1f1b",
    "parallel.stages_per_rank=1",
    "parallel.engine=fsdp",
    "parallel.offload=none",
    "compile=false",
    "activation_checkpointing=none",
]
NO_TASKS = [
    "eval.tasks=[]",
    "eval.tasks_every=null",
    "eval.include=null",
    "eval.fewshot=null",
    "eval.limit=null",
]
QUIET = [
    "launch.max_restarts=0",
    "eval.sequences=0",
    "eval.every=0",
    *NO_TASKS,
    "tracker=none",
    "observers=[]",
    "alerts.command=null",
    "prometheus.port=null",
    "log.progress=none",
    "profile.steps=null",
    "profile.phases_every=0",
    "checkpoint.dir=null",
    "checkpoint.remote=null",
]

# Of both runs, unless they are given: with these a difference is more than rounding. AdamW divides by the root of the
# second moment plus eps: at 1e-8 a gradient that is nothing but rounding moves its parameter by a whole learning rate.
EXACT = {"precision": "fp32", "optim.eps": "1e-6"}


@dataclass(frozen=True)
class Recording:
    """The results that a run wrote."""

    layout: str
    losses: list[float]
    norms: list[float]
    gradients: Path  # checkpoint
    parameters: Path


def check(overrides: Sequence[str], against: str | None, steps: int) -> int:
    """Print the table; status 0 if both compute the same. Raises ConfigError for a start that is refused.

    `against` is the other layout; default: one process.
    """
    if steps < 1:
        raise ConfigError(f"--steps={steps}: at least one step has to be compared")
    reference = ONE_PROCESS if against is None else shlex.split(against)
    spoken = {parse(override).key for override in (*overrides, *reference)}
    exact = [f"{key}={value}" for key, value in EXACT.items() if key not in spoken]
    scratch = Scratch("stoker-check-")
    folder = scratch.path
    asked = together(overrides, exact)
    configs = [
        settle(together(asked, reference), folder / "reference", steps),
        settle(asked, folder / "asked", steps),
    ]
    prepare(configs[0])
    for config in configs:
        ranks = ranks_for(config)
        say(f"{steps} steps: {layout_of(config, ranks)}")
        RunDirectory(Path(str(config.run.dir))).attempts.mkdir(parents=True)
        status = launch(config, ranks, say, "--measure")
        if status != 0:
            say(f"that run failed; its files are in {scratch.keep() / Path(str(config.run.dir)).name}")
            return status
    one, other = (_recording(config) for config in configs)
    differences = compare(one, other, LIMITS[configs[1].precision])
    show(one.layout, other.layout, configs[1].precision, differences)
    return 0 if all(difference.sound for difference in differences) else 1


def compare(one: Recording, other: Recording, limits: Limits) -> list[Difference]:
    """The worst loss, gradient norm, gradient and parameter of `other`, against `one`."""
    steps = 1 if limits.parameter is None else len(one.norms)
    found = [
        worst_number("loss", one.losses, other.losses, limits.loss),
        worst_number("gradient norm", one.norms[:steps], other.norms[:steps], limits.grad_norm),
        worst_tensor("gradient", *_both(one.gradients, other.gradients, GRADIENT), limits.gradient, SMALL_GRADIENT),
    ]
    if limits.parameter is not None:
        parameters = _both(one.parameters, other.parameters, PARAMETER)
        found.append(worst_tensor("parameter", *parameters, limits.parameter, 0.0))
    return found


def _both(one: Path, other: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(read_tensors(one, kind)), dict(read_tensors(other, kind))


def together(overrides: Sequence[str], winning: Sequence[str]) -> list[str]:
    """Both, without the settings that `winning` overrides."""
    keys = {parse(override).key for override in winning}
    return [*(override for override in overrides if parse(override).key not in keys), *winning]


def settle(overrides: Sequence[str], run: Path, steps: int) -> Config:
    """The config of one of the two runs: as given, but short, in a separate directory and without observers."""
    ours = [f"run.dir={run}", "run.name=check", "run.fresh=false", "run.change=false", *QUIET]
    config, _ = settle_config(together(overrides, ours), where, tell=say)
    config.steps = steps  # the schedule keeps its length
    return config


def _recording(config: Config) -> Recording:
    run = RunDirectory(Path(str(config.run.dir)))
    state = read_state(newest(run.checkpoints)[0])
    gradients = newest(run.path / GRADIENTS)[0]
    return Recording(state["layout"], state["losses"], state["norms"], gradients, newest(run.checkpoints)[0])
