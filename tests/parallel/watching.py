"""A mode that watches what runs inside it: operations that would make the host wait for a GPU.

On CPUs nothing waits, but the same calls are made: that is what is counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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
