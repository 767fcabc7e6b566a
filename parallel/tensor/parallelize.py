"""Cutting a model over the tp axis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import Entry, Registry, entries_of, whole_registry
from stoker.parallel.sharding import replace_parameters
from stoker.parallel.shards import whole
from stoker.parallel.tensor.axis import tensor_axis
from stoker.parallel.tensor.dropout import token_numbers
from stoker.parallel.tensor.layers import TensorLayer


def parallelize_tensors(model: nn.Module, mesh: Mesh, sequence: bool, experts: bool = False) -> Registry:
    """Cut `model`, whole or one stage of it, over the tp axis of `mesh`; what this rank holds of each parameter.

    `sequence`: share the tokens too, wherever a rank is not inside a region. `experts`: share the channels of experts,
    which are whole on every rank otherwise. Values, if the parameters have any, are
    kept; what is tied stays tied. Raises ValueError for a model that cannot be shared by so many ranks.
    """
    axis = tensor_axis(mesh, sequence, experts)
    if axis is None:
        return whole_registry(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TensorLayer)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} cannot be cut over {axis.size} tensor-parallel ranks: it is built from none of "
            f"the layers of stoker.parallel.tensor.layers (CopyToTensorParallel, ColumnLinear, RowLinear, ...); "
            "parallel.tp=1 works"
        )
    found: dict[nn.Parameter, Entry] = {}
    for name, layer in layers.items():
        try:
            entries = layer.cut(axis)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for entry in entries:
            same = found.setdefault(layer.get_parameter(entry.name), entry)
            assert same == entry, f"{name}.{entry.name} is tied to a parameter that is cut otherwise"

    if sequence and (numbers := token_numbers(model)) is not None:
        numbers.axis = axis
    parameters = dict(model.named_parameters())

    def placed(entry: Entry) -> Entry:
        cut = found.get(parameters[entry.name]) if entry.name in parameters else None
        if cut is None:
            partial = ("tp",) if sequence and not entry.buffer else ()
            return replace(entry, replica=axis.rank, replicas=axis.size, partial=partial)
        return replace(
            entry, pieces=cut.pieces, replica=cut.replica, replicas=cut.replicas, partial=cut.partial, inside=True
        )

    registry = Registry(placed(entry) for entry in entries_of(model))
    replace_parameters(model, lambda name, old: _local(old, registry.entries[name]))
    return registry


def _local(old: nn.Parameter, entry: Entry) -> nn.Parameter:
    """This rank's pieces of the global parameter `old`, on the same device."""
    ends = [[n + m for n, m in zip(p.local_chunk.offsets, p.local_chunk.sizes, strict=True)] for p in entry.pieces]
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    if shape == entry.shape:
        return old
    local = torch.empty(shape, dtype=old.dtype, device=old.device)
    for piece in entry.pieces:
        local[piece.local_chunk.within(whole(shape))] = old.detach()[piece.global_chunk.within(whole(entry.shape))]
    return nn.Parameter(local, old.requires_grad)
