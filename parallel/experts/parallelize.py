"""Giving each rank of an expert group its part of the experts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from stoker.parallel.experts.axis import ExpertAxis
from stoker.parallel.experts.layer import Experts
from stoker.parallel.layout import View
from stoker.parallel.registry import Entry, Piece, Registry
from stoker.parallel.sharding import replace_parameters


def parallelize_experts(
    model: nn.Module, stages: Sequence[nn.Module], registry: Registry, axis: ExpertAxis
) -> Registry:
    """Leave of the experts of `stages` of the whole `model` this rank's part, an equal run of them.

    Returns `registry` with what this rank holds then. Values, if the parameters have any, are kept. Raises ValueError
    for a model without experts, and for a layer whose experts do not divide.
    """
    if not expert_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no experts to share over {axis.size} ranks: it is built without "
            "stoker.parallel.experts.Experts; parallel.ep=1 works"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, Experts) and layer.num % axis.size:
            raise ValueError(
                f"{name}: {layer.num} experts do not divide over parallel.ep={axis.size} ranks: a divisor does"
            )
    entries = dict(registry.entries)
    for stage in stages:
        for layer in expert_layers(stage):
            layer.experts = axis
        entries |= {name: _entry(entries[name], axis) for name in _names(stage)}
        parts = {name: _part(stage.get_parameter(name), axis) for name in _names(stage)}
        replace_parameters(stage, functools.partial(_chosen, parts))
    return Registry(entries.values())


def expert_layers(model: nn.Module) -> list[Experts]:
    """The layers of experts in `model`."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def divided_layers(model: nn.Module) -> list[Experts]:
    """Those of which each rank of an expert group has some of the experts."""
    return [layer for layer in expert_layers(model) if layer.experts is not None]


def _names(stage: nn.Module) -> list[str]:
    divided = {parameter for layer in divided_layers(stage) for parameter in layer.parameters()}
    return [name for name, parameter in stage.named_parameters() if parameter in divided]


def _chosen(parts: Mapping[str, nn.Parameter], name: str, old: nn.Parameter) -> nn.Parameter:
    return parts.get(name, old)


def _entry(entry: Entry, axis: ExpertAxis) -> Entry:
    """Of `entry`, whose first dim counts experts, this rank's."""
    own = entry.shape[0] // axis.size
    pieces = tuple(
        Piece(piece.local_chunk.rows(0, own), piece.global_chunk.rows(axis.rank * own, (axis.rank + 1) * own))
        for piece in entry.pieces
    )
    return replace(entry, pieces=pieces, view=View.EXPERTS)


def _part(old: nn.Parameter, axis: ExpertAxis) -> nn.Parameter:
    own = old.shape[0] // axis.size
    return nn.Parameter(old.detach()[axis.rank * own : (axis.rank + 1) * own].clone(), old.requires_grad)
