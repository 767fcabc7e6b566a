"""Which layers of a model are alike, so that a few of them stand for all.

A stage is shortened by whole periods of a pattern of layers: one layer where all are alike, four where every fourth
attends to all tokens. Layers before the pattern begins stay. Two lengths are rehearsed, of which the longer has one
period more, and `stoker.trainer.rehearsal.extrapolate` continues the line through them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from stoker.conf.schema import Config
from stoker.parallel.layout import Layout
from stoker.parallel.model import ParallelizableModel, Part, whole_model
from stoker.parallel.stages import stages_of
from stoker.trainer.parallelize import part_builder, parts_of

KEPT = 2  # periods of the shorter length

Kind = Hashable


@dataclass(frozen=True)
class Short:
    """The parts of all stages with layers left out, for two rehearsals of a rank."""

    shorter: list[Part]
    longer: list[Part]
    period: int  # layers by which the longer ones are longer
    begins: dict[int, int]  # by stage of this rank in its order: layers before the place where the longer has more
    missing: int  # periods that the longer lacks


def shortened(config: Config, layout: Layout, rank: int) -> Short | None:
    """None where so few layers, or so different ones, can be left out that all are rehearsed in less time.

    `config.model.vocab_size` must be set.
    """
    if config.fp32_modules:  # by names, which may be those of single layers
        return None
    build = part_builder(config)
    whole = build(whole_model(config.model.num_hidden_layers))
    kinds = kinds_of(list(cast(ParallelizableModel, whole).blocks().values()))
    every = parts_of(config, layout, whole, build)
    own = stages_of(layout.coordinate(rank).pp, layout.pp, config.parallel.stages_per_rank)
    held = [kinds[every[number].layers.start : every[number].layers.stop] for number in own]
    for period in range(1, len(held[0]) // KEPT + 1):
        before = [_irregular(stage, period) for stage in held]
        whole_periods = ((len(stage) - first) // period for stage, first in zip(held, before, strict=True))
        missing = min(whole_periods) - KEPT - 1
        rehearsed = sum(2 * (len(stage) - (missing + 1) * period) + period for stage in held)
        if missing > 0 and rehearsed < sum(map(len, held)):
            shorter, longer = (
                [_cut(part, n in own, less * period) for n, part in enumerate(every)] for less in (missing + 1, missing)
            )
            begins = {place: first + period for place, first in enumerate(before)}
            return Short(shorter, longer, period, begins, missing)
    return None


def _cut(part: Part, held: bool, layers: int) -> Part:
    """`part` without its last so many layers; of another rank's only the size of its output matters."""
    stop = part.layers.stop - layers if held else part.layers.start + 1
    return replace(part, layers=range(part.layers.start, stop))


def _irregular(kinds: Sequence[Kind], period: int) -> int:
    """How many layers come before each is like the one a period later."""
    alike = len(kinds) - period
    while alike > 0 and kinds[alike - 1] == kinds[alike - 1 + period]:
        alike -= 1
    return max(alike, 0)


def kinds_of(blocks: Sequence[nn.Module]) -> list[Kind]:
    """Equal values for blocks of which one could stand in the other's place: same modules, shapes and attributes.

    An attribute that is the number of the layer in every block does not count.
    """
    found = [_attributes(block) for block in blocks]
    numbers = {
        place
        for place, value in (found[0].items() if found else ())
        if all(type(each.get(place)) is int and each[place] == number for number, each in enumerate(found))
    }
    kinds: list[Kind] = []
    for block, attributes in zip(blocks, found, strict=True):
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        tensors = [*block.named_parameters(), *block.named_buffers()]
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors)
        others = tuple((place, value) for place, value in attributes.items() if place not in numbers)
        kinds.append((modules, shapes, others))
    return kinds


_OF_MODULES = frozenset(vars(nn.Module()))


def _attributes(block: nn.Module) -> dict[tuple[str, str], Hashable]:
    """Of all modules of a block: values that can be compared, and which object it is of any other kind."""
    return {
        (name, key): _comparable(value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if key not in _OF_MODULES
    }


def _comparable(value: Any) -> Hashable:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return "object", id(value)
