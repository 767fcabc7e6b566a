"""Names of modules, for hooks that get a module anywhere in a model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

WHOLE = "the whole model"


class ModuleNames:
    """While entered, collects the names of the modules of any model that is called, outermost first."""

    def __init__(self) -> None:
        self.calls = 0  # of whole models
        self._names: dict[nn.Module, str] = {}

    def __enter__(self) -> ModuleNames:
        self._hook = register_module_forward_pre_hook(self._learn)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __getitem__(self, module: nn.Module) -> str:
        return self._names[module]

    def _learn(self, module: nn.Module, _arguments: Any) -> None:
        if module not in self._names:
            self._names |= {part: name or WHOLE for name, part in module.named_modules()}
        self.calls += self._names[module] == WHOLE
