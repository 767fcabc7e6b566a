"""What is about to start: a config and the machine's ranks and GPUs, and what a room refuses of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from stoker.conf.ramp import sizes_of
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan, Layout, batch_plan, layout_of


class Ranks(NamedTuple):
    """How many ranks are about to start, and on what. A plain pair (ranks, GPUs) stands for one machine."""

    world: int  # over all machines
    gpus: int  # that a process of this machine sees
    here: int | None = None  # ranks on this machine; default: all
    one_each: bool = False  # the process that counted is itself a rank: a single GPU may be its own


@dataclass(frozen=True)
class Start:
    """What is about to start: `config` on `world` ranks; the other fields are those of `Ranks`."""

    config: Config
    world: int
    gpus: int
    here: int | None = None
    one_each: bool = False

    @property
    def local(self) -> int:
        """Ranks on this machine."""
        return self.world if self.here is None else self.here

    @property
    def cuda(self) -> bool:
        """Whether the ranks compute on GPUs."""
        device = self.config.launch.device
        return device == "cuda" or (device is None and self.gpus > 0)

    @property
    def gloo_on_gpus(self) -> bool:
        """Whether ranks that compute on GPUs communicate over gloo, through the memory of the host."""
        return self.cuda and self.config.launch.backend == "gloo"

    @property
    def dp(self) -> int | None:
        """The data-parallel degree, or None where the axes do not fit the ranks, which is refused by its own entry."""
        wanted = self.config.parallel
        block = wanted.tp * wanted.pp * wanted.cp
        if min(self.world, wanted.tp, wanted.pp, wanted.cp) < 1 or self.world % block:
            return None
        return self.world // block

    @property
    def layout(self) -> Layout | None:
        """The layout, or None where the axes or replicas do not fit, which is refused by their own entries."""
        wanted = self.config.parallel
        if self.dp is None or (wanted.dp_replicate is not None and wanted.dp_replicate < 1):
            return None
        try:
            return layout_of(self.config, self.world)
        except ValueError:
            return None

    @property
    def without_ep(self) -> Layout | None:
        """The layout whose experts are whole on every rank, or None where the rest of it does not fit."""
        wanted = dataclasses.replace(self.config.parallel, ep=1)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, parallel=wanted)).layout

    @property
    def plan(self) -> BatchPlan | None:
        """The split of the rows, or None where they do not divide, which is refused by its own entry."""
        if self.dp is None or self.config.batch.size < 1:
            return None
        try:
            return batch_plan(self.config, Layout(dp_replicate=self.dp))
        except ValueError:
            return None

    @property
    def plans(self) -> list[BatchPlan]:
        """`plan` for each size that steps have with `batch.ramp`, the smallest first; without it the one."""
        plan, dp = self.plan, self.dp
        if plan is None or not dp:
            return []
        return [replace(plan, rows=size, rank_rows=size // dp) for size in sizes_of(self.config)]


@dataclass(frozen=True)
class Refusal:
    """An entry of a room's table. `check` returns a message for the user, or None where there is nothing to refuse."""

    name: str
    what: str
    why: str
    check: Callable[[Start], str | None]


class Refusals(list[Refusal]):
    """The combinations of values that a room refuses: `stoker.trainer.validate` collects those of all rooms."""

    def entry(self, name: str, what: str, why: str) -> Callable[[Callable[[Start], str | None]], Callable]:
        """Adds the function below it."""

        def add(check: Callable[[Start], str | None]) -> Callable[[Start], str | None]:
            self.append(Refusal(name, what, why, check))
            return check

        return add
