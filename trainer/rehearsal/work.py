"""Work of a rehearsal: floating-point operations, bytes that pass through memory, and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from stoker.parallel.mesh import Mesh

aten = torch.ops.aten


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind over one group: how many, and bytes of this rank's tensors together."""

    count: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Work:
    """What a rank does in a span.

    `flops` are those of matrix products and of attention, without those that a kernel repeats inside; `moved` bytes are
    read and written by all other operations, each by itself; `calls` are all operations that the host dispatches, views
    included; `messages` go by (kind, group). Bytes of a message are those of the whole that is gathered, scattered,
    reduced or sent.
    """

    flops: int = 0
    moved: int = 0
    calls: int = 0
    messages: Mapping[tuple[str, str], Traffic] = field(default_factory=dict)

    def plus(self, other: Work, times: int = 1) -> Work:
        """This and `times` the other."""
        messages = dict(self.messages)
        for key, traffic in other.messages.items():
            own = messages.get(key, Traffic())
            messages[key] = Traffic(own.count + times * traffic.count, own.bytes + times * traffic.bytes)
        kept = {key: traffic for key, traffic in messages.items() if traffic != Traffic()}
        flops, moved = self.flops + times * other.flops, self.moved + times * other.moved
        return Work(flops, moved, self.calls + times * other.calls, kept)


class Messages:
    """Counts the collectives of a rank by (kind, group): `found["all_gather", "dp_shard"]`."""

    def __init__(self, mesh: Mesh) -> None:
        self.found: dict[tuple[str, str], Traffic] = {}
        self._mesh = mesh
        self._names: dict[str, str] = {mesh.world.group_name: "world"}

    def see(self, function: Any, args: Sequence) -> bool:
        """Count an operation, if it is a message."""
        if function.namespace not in ("c10d", "_c10d_functional"):
            return False
        known = KINDS.get(function._schema.name.split("::")[1])
        if known is not None:
            kind, sized = known
            group = next(name for argument in args if (name := self._group(argument)) is not None)
            own = self.found.get((kind, group), Traffic())
            self.found[kind, group] = Traffic(own.count + 1, own.bytes + sized(args))
        return True

    def _group(self, argument: Any) -> str | None:
        if isinstance(argument, torch.ScriptObject):
            try:
                argument = dist.ProcessGroup.unbox(argument).group_name
            except RuntimeError:  # an operation of a reduction
                return None
        if not isinstance(argument, str):
            return None
        if argument not in self._names:  # a group that the engine added
            for name, group in self._mesh.groups.items():
                if group is not None:
                    self._names.setdefault(group.group_name, name)
        return self._names.get(argument)


class WorkLog:
    """Counts all work of operations that it is given."""

    def __init__(self, mesh: Mesh) -> None:
        self._messages = Messages(mesh)
        self._flops = self._moved = self._calls = 0

    def count(self, flops: int) -> None:
        """Add operations that no function given to `see` stands for."""
        self._flops += flops

    def see(self, function: Any, args: Sequence, kwargs: Mapping[str, Any], result: Any) -> None:
        packet = function._overloadpacket
        self._calls += 1
        if self._messages.see(function, args):
            return
        if packet in KERNELS:
            self._flops += KERNELS[packet](*args)
        elif packet in flop_registry:
            self._flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet not in _IDLE and not function.is_view:
            self._moved += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))

    def take(self) -> Work:
        """Since the last call, or the beginning."""
        found = Work(self._flops, self._moved, self._calls, self._messages.found)
        self._flops, self._moved, self._calls, self._messages.found = 0, 0, 0, {}
        return found


def _scores_and_values(q: Tensor, k: Tensor, *_: Any) -> int:
    """Two products of attention for `[rows, heads, tokens, head_dim]`, as if it were not causal."""
    rows, heads, queries, head_dim = q.shape
    return 4 * rows * heads * queries * k.shape[2] * head_dim


def _gradients(_: Tensor, q: Tensor, k: Tensor, *__: Any) -> int:
    """The four products of its gradients. That the kernel computes the scores again is left out, as utilisations do."""
    return 2 * _scores_and_values(q, k)


def _grouped(a: Tensor, b: Tensor, *_: Any) -> int:
    """Products of groups of the rows of `a` `[rows, k]`, and `b` `[groups, k, n]`; for a weight's gradient `a` is
    `[m, rows]` and `b` `[rows, n]`."""
    return 2 * a.numel() * b.shape[-1]


KERNELS: dict[Any, Callable[..., int]] = {  # that torch's counter does not know
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention: _scores_and_values,
    aten._scaled_dot_product_flash_attention_backward: _gradients,
    aten._scaled_dot_product_efficient_attention: _scores_and_values,
    aten._scaled_dot_product_efficient_attention_backward: _gradients,
    aten._scaled_dot_product_flash_attention_for_cpu: _scores_and_values,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _gradients,
}
_IDLE = {aten.empty, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_strided, aten.detach}


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes_of, argument)) if isinstance(argument, list | tuple) else 0


def _first(args: Sequence) -> int:
    return _bytes_of(args[0])


def _second(args: Sequence) -> int:
    return _bytes_of(args[1])


def _times_size(args: Sequence) -> int:
    return _bytes_of(args[0]) * next(argument for argument in args[1:] if isinstance(argument, int))


KINDS: dict[str, tuple[str, Callable[[Sequence], int]]] = {
    "allreduce_": ("all_reduce", _first),
    "_allgather_base_": ("all_gather", _first),  # output, input, group
    "_reduce_scatter_base_": ("reduce_scatter", _second),
    "broadcast_": ("broadcast", _first),
    "send": ("send", _first),
    "recv_": ("receive", _first),
    "alltoall_base_": ("reduce_scatter", _second),
    "all_reduce": ("all_reduce", _first),
    "all_gather_into_tensor": ("all_gather", _times_size),
    "reduce_scatter_tensor": ("reduce_scatter", _first),
    "all_to_all_single": ("reduce_scatter", _first),  # over gloo, by which `regions` scatters; as much is exchanged
}
