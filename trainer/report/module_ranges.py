"""Ranges around the forward of modules, for traces: hooks that exist while a trace is recorded, and at no other time.

A range begins after the hooks that gather a module's parameters and ends before those that free them, so it holds the
module's own work. The backward needs no hooks, which would change the graph: torch numbers the nodes of a graph in the
order of the forward operations that made them, and a trace has the numbers of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch._C._profiler import _RecordFunctionFast  # `record_function` is an operation: modes of dispatch would see it
from torch.utils.hooks import RemovableHandle

from stoker.trainer.report.breakdown import MODULE


def modules_to_mark(stages: list[nn.Module], opaque: bool) -> dict[str, nn.Module]:
    """The modules of this rank's stages by their global names, without the stages themselves.

    With `opaque`, as blocks are when they are compiled, the modules inside of blocks are left out.
    """
    found: dict[str, nn.Module] = {}
    for stage in stages:
        blocks = set(stage.blocks().values()) if opaque else set()  # type: ignore[operator]
        inside = {part for block in blocks for part in block.modules()} - blocks
        found |= {name: part for name, part in stage.named_modules() if name and part not in inside}
    return found


class ModuleRanges:
    """While entered, the forward of each module is a range `module:<name>` of torch's profiler."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> ModuleRanges:
        for name, module in self._modules.items():
            marks = _Marks(MODULE + name)
            self._hooks.append(module.register_forward_pre_hook(marks.begin))
            # also when forward raises: recomputation ends that way, once it has what backward needs
            self._hooks.append(module.register_forward_hook(marks.end, prepend=True, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _Marks:
    """The open ranges of one module: several where it calls itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[Any] = []

    def begin(self, *_: object) -> None:
        self._open.append(_RecordFunctionFast(self._name))
        self._open[-1].__enter__()

    def end(self, *_: object) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
