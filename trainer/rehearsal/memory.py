"""Live memory of a rehearsal: every storage that appears, its size over time, and its category.

Fake tensors hold no memory, but their storages have sizes and lives. A mode sees the result of every operation, and so
every storage when it appears; a weak reference shows when it goes. The changes are kept in order, so that the peak, and
what was live at it, are found afterwards, when the category of each storage is known.
"""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stoker.trainer.report.breakdown import PREFIX, RANGES

_ENTERS = torch.ops.profiler._record_function_enter_new.default
_LEAVES = torch.ops.profiler._record_function_exit._RecordFunction
FRAMES = 24  # of the stack that are searched for the file that made a storage


class Category(enum.StrEnum):
    """What a storage is for."""

    MASTERS = "fp32 parameters"
    OPTIMIZER = "optimizer state"
    GRADIENTS = "gradients"
    COPIES = "compute copies"
    GATHERED = "gathered"
    ACTIVATIONS = "activations"
    LOSS = "loss"
    COMMUNICATION = "communication"
    ROWS = "batch"
    OTHER = "other"


# By the innermost function on the stack that is named here, `*` for all of a file; without one it is an activation.
OWNERS = {
    "stoker/parallel/replicated.py": {"*": Category.GRADIENTS},  # what is left when masters and copies are known
    "stoker/parallel/sharded.py": {"gradients": Category.GRADIENTS, "*": Category.MASTERS},
    "stoker/parallel/sharding.py": {"*": Category.MASTERS},
    "stoker/parallel/optimizer.py": {"*": Category.OPTIMIZER},
    "stoker/parallel/update.py": {"*": Category.OTHER},
    "stoker/parallel/native.py": {"_sum_partial": Category.COMMUNICATION, "*": Category.OTHER},
    "stoker/parallel/forward_backward.py": {"*": Category.ACTIVATIONS},
    "stoker/parallel/pipeline.py": {"_allocate": Category.COMMUNICATION, "*": Category.ACTIVATIONS},
    "stoker/parallel/tensor/regions.py": {"*": Category.COMMUNICATION},
    "stoker/parallel/sequence/regions.py": {"*": Category.COMMUNICATION},
    "stoker/models/loss.py": {"*": Category.LOSS},
    "fsdp/_fully_shard/_fsdp_collectives.py": {"*": Category.COMMUNICATION},
    "fsdp/_fully_shard/_fsdp_param.py": {
        "to_accumulated_grad_if_needed": Category.GRADIENTS,  # of whole parameters, fp32, kept until the last backward
        "*": Category.GATHERED,
    },
    "fsdp/_fully_shard/_fsdp_param_group.py": {"*": Category.GATHERED},
}


@dataclass
class Storage:
    """A storage that was live at some time."""

    category: Category
    bytes: int = 0


@dataclass(frozen=True)
class Peak:
    """The moment of a span at which most bytes were live."""

    bytes: int
    phase: str
    categories: dict[Category, int] = field(default_factory=dict)  # the largest first


Watcher = Callable[[Any, Any, Any, Any], None]  # takes each operation: function, args, kwargs and result


class MemoryLog(TorchDispatchMode):
    """`with MemoryLog() as log:` follows the storages of what is computed, under a mode of fake tensors around it.

    `watchers` are called with every operation: a mode of their own would double the time of each.
    """

    def __init__(self, *watchers: Watcher) -> None:
        super().__init__()
        self._watchers = watchers
        self.phase = ""  # where no range of the engine's is open
        self._ranges: list[str] = []  # of the profiler, that are open
        self._live: dict[int, tuple[Storage, weakref.ref]] = {}
        self._changes: list[tuple[Storage, int, str]] = []
        self._held = 0  # bytes at the beginning of what `_changes` lists
        self._resize: Callable[..., Any] | None = None
        self._owners: dict[Any, Category | None] = {}  # by code object

    def __enter__(self) -> MemoryLog:
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # `fully_shard` frees and refills by it
            result = resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign,assignment]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is _ENTERS:
            self._ranges.append(args[0])
        elif function is _LEAVES:
            self._ranges.pop()
        elif function.namespace != "prim":
            for watcher in self._watchers:
                watcher(function, args, kwargs or {}, result)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see_tensor(leaf)
            if function is torch.ops.fsdp.chunk_cat.default:
                self.assign(Category.GRADIENTS, args[0])
        return result

    def assign(self, category: Category, tensors: Iterable[Tensor]) -> None:
        """The storages of `tensors` are of `category`, from the beginning of their lives."""
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            if id(storage) in self._live:
                self._live[id(storage)][0].category = category

    def peak(self) -> Peak:
        """Since the last call, or the beginning."""
        held, most, at, phase = self._held, self._held, 0, self._changes[0][2] if self._changes else self.phase
        for number, (_, change, when) in enumerate(self._changes, start=1):
            held += change
            if held > most:
                most, at, phase = held, number, when
        found = self._by_category()
        for storage, change, _ in self._changes[at:]:  # back from now to then
            found[storage.category] -= change
        self._held, self._changes = held, []
        return Peak(most, phase, _largest_first(found))

    def now(self) -> Peak:
        """What is live at present."""
        found = self._by_category()
        return Peak(sum(found.values()), self._phase(), _largest_first(found))

    def _by_category(self) -> dict[Category, int]:
        found = dict.fromkeys(Category, 0)
        for storage, _ in self._live.values():
            found[storage.category] += storage.bytes
        return found

    def _see_tensor(self, tensor: Tensor) -> None:
        tensor = _local(tensor)
        if tensor.device.type != "meta":
            self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._live:
            known = Storage(self._category())

            def gone(_: weakref.ref, key: int = key) -> None:
                dead, _ = self._live.pop(key)
                self._change(dead, 0)

            self._live[key] = (known, weakref.ref(storage, gone))
        self._change(self._live[key][0], size)

    def _change(self, storage: Storage, size: int) -> None:
        if size != storage.bytes:
            self._changes.append((storage, size - storage.bytes, self._phase()))
            storage.bytes = size

    def _phase(self) -> str:
        own = next((name for name in reversed(self._ranges) if name in RANGES), None)
        return self.phase if own is None else own.removeprefix(PREFIX)

    def _category(self) -> Category:
        frame, left = sys._getframe(2), FRAMES
        while frame is not None and left:
            code = frame.f_code
            if code not in self._owners:
                of_file = next((owner for file, owner in OWNERS.items() if code.co_filename.endswith(file)), {})
                self._owners[code] = of_file.get(code.co_name, of_file.get("*"))
            if (owner := self._owners[code]) is not None:
                return owner
            frame, left = frame.f_back, left - 1  # type: ignore[assignment]
        return Category.ACTIVATIONS


def _largest_first(found: dict[Category, int]) -> dict[Category, int]:
    return {category: size for category, size in sorted(found.items(), key=lambda item: -item[1]) if size}


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; other tensors as they are."""
    return getattr(tensor, "_local_tensor", tensor)
