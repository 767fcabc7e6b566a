"""Collectives of a real step, counted as a rehearsal counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from stoker.parallel.mesh import Mesh
from stoker.trainer.rehearsal.work import Messages, Traffic


class Collectives(TorchDispatchMode):
    """`with Collectives(mesh) as collectives:` counts messages of this rank in `found`. It changes no number."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._messages = Messages(mesh)

    @property
    def found(self) -> dict[tuple[str, str], Traffic]:
        return self._messages.found

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        self._messages.see(function, args)
        return function(*args, **(kwargs or {}))
