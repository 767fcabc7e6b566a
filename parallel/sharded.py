"""Weights that are sharded over `Layout.sharding` by torch's `fully_shard`: ZeRO 1, 2 and 3.

The three stages differ in two switches: when gradients are reduce-scattered (after the last micro-batch, or after
each) and when gathered parameters are freed (after the step's last backward, or after every use). What is gathered and
reduced together is a unit: the embedding, each block, the head, and what is left. The units of the head and of what is
left are used last in forward and first in backward, so they stay gathered in between at every stage. With
several replicas shards are summed over them once, on the last micro-batch. In a pipeline several
micro-batches are in flight at once, so there gathered parameters are kept until the step's last backward.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import placement_types as placements

from stoker.parallel.experts import divided_layers
from stoker.parallel.layout import View
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import ParallelizableModel, Role
from stoker.parallel.registry import LocalShard
from stoker.parallel.sharding import Precision, materialise
from stoker.parallel.shards import Chunk
from stoker.parallel.tensor.layers import VocabularyLayer


class ShardedStrategy:
    """A `ShardingStrategy`. `stage` is 1, 2 or 3; with `offload` the shards are in the CPU's memory.

    Experts that the ranks of an expert group divide are units of their own, sharded over the ranks with the same ones.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, precision: Precision, stage: int, offload: bool = False) -> None:
        cuttable: ParallelizableModel = model  # type: ignore[assignment]
        self.module = model
        self._reduces_each = stage >= 2
        self._reshards_after_forward = stage == 3 and mesh.layout.pp == 1
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        home = torch.device("cpu") if offload else mesh.device
        policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()

        def shard(modules: list[nn.Module], dtype: torch.dtype, stays: bool, view: View = View.DATA) -> None:
            materialise(nn.ModuleList(modules), home)  # together: they may be tied
            fully_shard(
                modules if len(modules) > 1 else modules[0],
                mesh=mesh.expert_sharding_mesh if view is View.EXPERTS else mesh.sharding_mesh,
                shard_placement_fn=placement if view is View.EXPERTS else None,
                reshard_after_forward=self._reshards_after_forward and not stays,
                mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
                offload_policy=policy,
            )

        layout = mesh.layout
        at = {view: layout.position(mesh.rank, view) for view in View}

        def placement(parameter: nn.Parameter) -> placements.Shard:
            return placements.Shard(_dim(tuple(parameter.shape), at[View.EXPERTS].shards))

        # One unit is materialised at a time, so that no rank ever holds the whole model.
        full = {id(module) for module in precision.full}
        first, last = _ends(model)
        units = [*first, *cuttable.blocks().values(), *last]
        for unit in [*units, model]:
            stays = unit is model or unit in last
            for layer in divided_layers(unit) if unit is not model else ():
                dtype = torch.float32 if id(layer) in full else precision.dtype
                shard([layer], dtype, stays=False, view=View.EXPERTS)
            inside = [m for m in unit.modules() if id(m) in full and m is not unit and not isinstance(m, FSDPModule)]
            if inside:
                shard(inside, torch.float32, stays)
            shard([unit], torch.float32 if id(unit) in full else precision.dtype, stays)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # gradients are summed, never averaged
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        self._set_prefetch(units)

        self._parameters = dict(model.named_parameters())
        self.tensors = {name: _local(parameter) for name, parameter in self._parameters.items()}
        experts = {id(parameter) for layer in divided_layers(model) for parameter in layer.parameters()}
        self.held = {}
        for name, tensor in self.tensors.items():
            is_expert = id(self._parameters[name]) in experts
            here = at[View.EXPERTS if is_expert else View.DATA]
            # `fully_shard` cuts a dim as torch.chunk does: equal chunks, the last ones short or empty
            dim = _dim(shapes[name], here.shards) if is_expert else 0
            chunk = -(-shapes[name][dim] // here.shards)
            offsets = [0] * len(shapes[name])
            offsets[dim] = min(chunk * here.shard, shapes[name][dim])
            self.held[name] = LocalShard((Chunk(tuple(offsets), tuple(tensor.shape)),), here.replica, here.replicas)

    def _set_prefetch(self, units: list[nn.Module]) -> None:
        """Gather the next unit while this one computes, in both directions."""
        for this, following in itertools.pairwise(units):
            this.set_modules_to_forward_prefetch([following, *divided_layers(following)])  # type: ignore[operator]
            following.set_modules_to_backward_prefetch([this, *divided_layers(this)])  # type: ignore[operator]

    def on_backward_start(self, *, is_last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(is_last or self._reduces_each)
        self.module.set_requires_all_reduce(is_last)
        self.module.set_reshard_after_backward(is_last or self._reshards_after_forward)
        self.module.set_is_last_backward(is_last)

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                if parameter.grad is None:  # no loss of this rank reached it
                    parameter.grad = torch.zeros_like(parameter)
                found[name] = _local(parameter.grad)
        return found

    def on_optimizer_step(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
        for module in self._modules:
            module.reshard()  # parameters that an evaluation gathered and kept (ZeRO 1 and 2) are stale now


def _dim(shape: tuple[int, ...], shards: int) -> int:
    """Along which dim experts of this shape are cut: where there are too few of them, their rows, if those divide."""
    return 1 if shape[0] % shards and shape[1] % shards == 0 else 0


def _ends(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The vocabulary's layers before and behind the blocks that can be units: not one whose weight another shares."""
    ends: list[VocabularyLayer] = [module for module in model.modules() if isinstance(module, VocabularyLayer)]
    shared = Counter(id(end.weight) for end in ends)
    alone = [end for end in ends if shared[id(end.weight)] == 1]
    first = [end for end in alone if getattr(end, "role", None) == Role.EMBEDDING]
    return list(first), [end for end in alone if end not in first]


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory."""
    return tensor._local_tensor.detach()  # type: ignore[attr-defined]
