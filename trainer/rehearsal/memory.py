"""Live memory of a rehearsal: every storage that appears, its size over time, and its category.

Fake tensors hold no memory, but their storages have sizes and lives. A mode sees the result of every operation, and so
every storage when it appears; a weak reference shows when it goes. The changes are kept in order, so that the peak, and
what was live at it, are found afterwards, when the category of each storage is known.
"""

from __future__ import annotations

import enum
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
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
    FROZEN = "frozen"
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
    "stoker/parallel/tensor/nf4.py": {"pack": Category.FROZEN},
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


@dataclass(frozen=True)
class Mark:
    """Where a span begins: at a phase, or between blocks of a stage, of which `block` come before it."""

    way: str  # a phase, or forward | backward of a block
    stage: int = -1
    block: int = -1


@dataclass(frozen=True)
class Span:
    """From a mark to the next: what was live when most was."""

    mark: Mark
    peak: Peak


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
        self._marks: list[tuple[int, Mark]] = []  # before the change of that number
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

    def mark(self, mark: Mark) -> None:
        """A span begins. Another does where the phase changes."""
        self._marks.append((len(self._changes), mark))

    def peak(self) -> Peak:
        """Since the last call of this or of `spans`, or the beginning."""
        return highest(self.spans())

    def spans(self) -> list[Span]:
        """Since the last call, or the beginning: at least one."""
        cuts = self._cuts()
        found = self._by_category()
        for storage, change, _ in self._changes:  # back to the beginning
            found[storage.category] -= change
        held, spans = sum(found.values()), []
        for (begin, mark), (end, _) in itertools.pairwise([*cuts, (len(self._changes), Mark(""))]):
            most, top = 0, begin
            for at, grown in enumerate(itertools.accumulate(change for _, change, _ in self._changes[begin:end]), 1):
                if grown > most:
                    most, top = grown, begin + at
            for storage, change, _ in self._changes[begin:top]:
                found[storage.category] += change
            phase = self._changes[top - 1][2] if top > begin else self._phase_at(begin)
            spans.append(Span(mark, Peak(held + most, phase, _largest_first(found))))
            for storage, change, _ in self._changes[top:end]:
                found[storage.category] += change
            held = sum(found.values())
        self._changes, self._marks = [], []
        return spans

    def _cuts(self) -> list[tuple[int, Mark]]:
        """Where spans begin, in order: at a mark, and where the phase changes."""
        phases = [phase for _, _, phase in self._changes]
        turns = [(0, Mark(self._phase_at(0)))]
        turns += [(at, Mark(phase)) for at, (last, phase) in enumerate(itertools.pairwise(phases), 1) if phase != last]
        return sorted([*turns, *self._marks], key=lambda cut: cut[0])

    def _phase_at(self, number: int) -> str:
        return self._changes[min(number, len(self._changes) - 1)][2] if self._changes else self.phase

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


def highest(spans: Sequence[Span]) -> Peak:
    """The largest peak, the first of those."""
    return max((span.peak for span in spans), key=lambda peak: peak.bytes)


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; other tensors as they are."""
    return getattr(tensor, "_local_tensor", tensor)
