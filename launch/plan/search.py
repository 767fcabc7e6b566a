"""`stoker plan --search`: every layout of a model on so many devices, the fastest that fit rehearsed and ranked.

All layouts that `stoker train` does not refuse are ranked by closed form (`guess`). Then those are rehearsed, in that
order, that could fit, until TRIED of them do; they are ranked by what was counted. A key that the user has set stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stoker.conf.ramp import unit_rows
from stoker.conf.schema import Config, lookup
from stoker.conf.values import ConfigError
from stoker.launch.plan.guess import guessed_seconds
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.start import Ranks
from stoker.trainer.need import need_of
from stoker.trainer.parallelize import parameters_of, trained_and_frozen
from stoker.trainer.plan.make import GIB, HOLES, RESERVED, Asked, Machine, Plan, make_plan
from stoker.trainer.plan.times import rates_of
from stoker.trainer.validate import validate

TRIED = 5  # layouts that fit and are ranked by their rehearsal
MOST_TRIES = 9
UNSURE = 1.1  # by how much a guess of memory may be over that of the device before a layout is left out
MACHINE = 8  # devices: tensor parallelism stays within one
MOST_STAGES, MOST_ROWS = 16, 16
KEYS = (
    "parallel.zero",
    "parallel.tp",
    "parallel.pp",
    "parallel.sequence_parallel",
    "batch.micro_size",
    "activation_checkpointing",
)


@dataclass(frozen=True)
class Found:
    """What a search found: the rehearsed ones that fit, the fastest first."""

    ranked: list[Plan]
    layouts: int  # that are not refused
    likely: int  # of them, by the guess, within the memory of the device
    rehearsed: int


def search(config: Config, ranks: Ranks, machine: Machine, given: Sequence[str]) -> Found:
    """Rank the layouts of `config`, with `model.vocab_size` set; keys in `given` keep their values.

    Raises ConfigError where the device's rates are not known, and where every layout is refused.
    """
    device = machine.device
    if device is None or rates_of(device, config.precision) is None:
        raise ConfigError(f"--search ranks by time, and the rates of this device in {config.precision} are not known")
    parameters, capacity = parameters_of(config), device.memory_gib * GIB
    allowed = [each for each in layouts(config, ranks.world, given) if not _refused(each, ranks)]
    if not allowed:
        raise ConfigError(f"--search: every layout on {ranks.world} ranks is refused; batch.size may not divide")
    trained, frozen = trained_and_frozen(config)
    guessed = []
    for place, each in enumerate(allowed):
        layout = layout_of(each, ranks.world)
        if need_of(each, layout, trained + frozen, frozen).total * HOLES + RESERVED <= UNSURE * capacity:
            guessed.append((guessed_seconds(each, layout, device, parameters), place))
    ranked: list[Plan] = []
    tries = 0
    for _, place in sorted(guessed):
        if len(ranked) == TRIED or tries == MOST_TRIES:
            break
        tries += 1
        plan = make_plan(allowed[place], ranks.world, machine, Asked(), ends=True)
        if plan.fits:
            ranked.append(plan)
    ranked.sort(key=lambda plan: plan.times.seconds if plan.times is not None else float("inf"))
    return Found(ranked, len(allowed), len(guessed), tries)


def layouts(config: Config, world: int, given: Sequence[str]) -> Iterator[Config]:
    """Every combination of KEYS that divides, also such as are refused."""

    def values(key: str, of: Sequence[Any]) -> Sequence[Any]:
        return [lookup(config, key)] if key in given else of

    tps = values("parallel.tp", _divisors(world, MACHINE))
    pps = values("parallel.pp", _divisors(world, min(MOST_STAGES, config.model.num_hidden_layers)))
    modes = values("activation_checkpointing", ("none", "selective", "full"))
    for zero, tp, pp in itertools.product(values("parallel.zero", range(4)), tps, pps):
        shared = values("parallel.sequence_parallel", (True, False) if tp > 1 else (config.parallel.sequence_parallel,))
        dp, rest = divmod(world, tp * pp * config.parallel.cp)
        if rest or not dp or unit_rows(config) % dp or (zero and dp * config.parallel.cp == 1):
            continue
        rows = unit_rows(config) // dp
        micros = values("batch.micro_size", [n for n in _divisors(rows, MOST_ROWS) if n & (n - 1) == 0])
        for sequence, micro, mode in itertools.product(shared, micros, modes):
            parallel = replace(config.parallel, zero=zero, tp=tp, pp=pp, sequence_parallel=sequence)
            yield replace(
                config,
                parallel=parallel,
                batch=replace(config.batch, micro_size=micro),
                activation_checkpointing=mode,
            )


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _refused(config: Config, ranks: Ranks) -> bool:
    try:
        validate(config, *ranks)
        batch_plan(config, layout_of(config, ranks.world))
    except ValueError:
        return True
    return False


def settings(config: Config, given: Sequence[str]) -> list[str]:
    """The words for `stoker train` that choose the layout of `config`, without those that are given."""
    words = []
    for key in KEYS:
        value = lookup(config, key)
        if key in given or (key == "parallel.sequence_parallel" and config.parallel.tp == 1):
            continue
        words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return words
