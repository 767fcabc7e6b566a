"""Modes that watch what runs inside them: operations that would make the host wait for a GPU, and collectives.

On CPUs nothing waits, but the same calls are made: that is what is counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.parallel.mesh import Mesh

aten = torch.ops.aten
# These give the host a value, or need one to know the size of their result.
SYNCHRONISING = {
    aten._local_scalar_dense.default,  # item(), float(), int(), bool()
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
TO_THE_HOST = {"tolist", "numpy", "cpu", "__array__"}  # methods that are no operations for a tensor on the CPU


def place() -> str:
    """The innermost line of Stoker's code that is running."""
    rooms = ("launch", "trainer", "checkpoint", "models", "data", "parallel", "stoker")
    root = Path(__file__).resolve().parents[2]
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in rooms:
            return f"{path.relative_to(root)}:{frame.lineno}"
    return "torch"


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__name__", "") in TO_THE_HOST:
            self._found.append(f"{function.__name__} at {place()}")
        return function(*args, **(kwargs or {}))


class Syncs(TorchDispatchMode):
    """`with Syncs() as syncs:` lists in `found` each call that would wait for a GPU, with its place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._calls = _Calls(self.found)

    def __enter__(self) -> Syncs:
        self._calls.__enter__()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        self._calls.__exit__(*arguments)

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        if function in SYNCHRONISING or _selects_by_mask(function, args):
            self.found.append(f"{function} at {place()}")
        return function(*args, **(kwargs or {}))


def _selects_by_mask(function: Any, args: Sequence) -> bool:
    """`x[mask]`: how many there are has to be known."""
    if function not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@dataclass
class Traffic:
    """Messages of one kind over one group: how many, and bytes of this rank's tensors together."""

    count: int = 0
    bytes: int = 0


@dataclass
class Collectives(TorchDispatchMode):
    """`with Collectives(mesh) as collectives:` counts by (kind, group): `found["all_gather", "dp_shard"]`.

    Bytes are those of the whole that is gathered, scattered, reduced or sent.
    """

    mesh: Mesh
    found: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {self.mesh.world.group_name: "world"}
        for name, group in self.mesh.groups.items():
            if group is not None and group.group_name not in self._names:
                self._names[group.group_name] = name

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        name = str(function).rpartition(".")[0].split("::")[-1].split(".")
        if name[0] in ("c10d", "_c10d_functional") and name[1] in KINDS:
            kind, sized = KINDS[name[1]]
            group = next(self._group(argument) for argument in args if self._group(argument) is not None)
            traffic = self.found.setdefault((kind, group or ""), Traffic())
            traffic.count += 1
            traffic.bytes += sized(args, self.mesh)
        return function(*args, **(kwargs or {}))

    def _group(self, argument: Any) -> str | None:
        if isinstance(argument, str):
            return self._names.get(argument)
        if isinstance(argument, torch.ScriptObject):
            try:
                return self._names.get(dist.ProcessGroup.unbox(argument).group_name)
            except RuntimeError:  # an operation of a reduction
                return None
        return None


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_bytes_of, argument)) if isinstance(argument, list | tuple) else 0


def _first(args: Sequence, _: Mesh) -> int:
    return _bytes_of(args[0])


def _second(args: Sequence, _: Mesh) -> int:
    return _bytes_of(args[1])


def _times_size(args: Sequence, _: Mesh) -> int:
    return _bytes_of(args[0]) * next(argument for argument in args[1:] if isinstance(argument, int))


KINDS: dict[str, tuple[str, Callable[[Sequence, Mesh], int]]] = {
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
    "all_to_all_single": ("reduce_scatter", _first),  # over gloo, by which `regions` scatters
}
