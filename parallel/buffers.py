"""Buffers: their first values, and those that are persistent between steps, on all ranks and in checkpoints.

A buffer may change in every forward. What counts as its value is the one after the last update: that is what is saved
(while the next forward runs already) and what every rank continues with. Where ranks computed different values, each
from its sequences, all take those of the first rank, as torch's DistributedDataParallel does, and a warning names it,
because a run with such buffers depends on its layout. Buffers that no forward changes, but an update alone (`add`), are
equal on all ranks and not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.parallel.layout import OF_TOKENS, ROLES, AxisRole
from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.sharding import is_untouched
from stoker.parallel.shards import BUFFER, Shard, whole

_AXES = tuple(axis for axis, role in ROLES.items() if role != AxisRole.STAGE)  # whose ranks hold the same stages


def fill_buffers(model: nn.Module, registry: Registry) -> None:
    """Call `rebuild_buffers` of the materialised `model`: first values, in the dtypes that the buffers were built in.

    Raises ValueError naming the buffers that are still uninitialised afterwards.
    """
    for module, attribute, name in _places(model):
        buffer = module.get_buffer(attribute)
        if buffer.dtype != registry.entries[name].dtype:  # an engine has cast the whole module
            setattr(module, attribute, buffer.to(registry.entries[name].dtype))
    before = {name: module.get_buffer(attribute) for module, attribute, name in _places(model)}
    versions = {name: buffer._version for name, buffer in before.items() if is_untouched(buffer)}
    model.rebuild_buffers()  # type: ignore[operator]
    left = [
        name
        for module, attribute, name in _places(model)
        if name in versions
        and module.get_buffer(attribute) is before[name]
        and before[name]._version == versions[name]
        and is_untouched(before[name])
    ]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"{type(model).__name__}.rebuild_buffers() leaves {', '.join(left[:3])}{more} uninitialised: a model is "
            "built on the meta device, where buffers get no values; it must compute each of them on its device"
        )


class Buffers:
    """The persistent buffers of this rank's stages. Those among `updated` are changed by `add` only."""

    def __init__(
        self, mesh: Mesh, registry: Registry, stages: Sequence[nn.Module], updated: Iterable[Tensor] = ()
    ) -> None:
        self._registry, self._device = registry, mesh.device
        self._groups = [group for axis in _AXES if (group := mesh.group(axis)) is not None]
        self._live = {
            name: (module, attribute)
            for stage in stages
            for module, attribute, name in _places(stage)
            if registry.entries[name].saved
        }
        self._held = {
            name: LocalShard(
                (whole(registry.entries[name].shape),),
                mesh.layout.place(mesh.rank, OF_TOKENS),
                mesh.layout.size(OF_TOKENS),
            )
            for name in self._live
        }
        self._saved = {name: self._value(name).clone() for name in self._live}
        self._next: dict[str, Tensor] = {}
        places = {id(module.get_buffer(attribute)): name for name, (module, attribute) in self._live.items()}
        self._updated = {id(buffer): places[id(buffer)] for buffer in updated}

    def take_first(self) -> Tensor:
        """Take the first rank's values, for `settle`. A collective. Returns 1 where they are not this rank's, else 0.

        float64 scalar on the device.
        """
        differs = torch.zeros((), dtype=torch.float64, device=self._device)
        self._next = {name: self._value(name).clone(memory_format=torch.contiguous_format) for name in self._live}
        updated = set(self._updated.values())
        compared = [value for name, value in self._next.items() if name not in updated]
        if compared and self._groups:
            own = torch.cat([value.view(-1).view(torch.uint8) for value in compared])
            taken = own.clone()
            for group in self._groups:
                dist.broadcast(taken, group=group, group_src=0)
            parts = taken.split([value.nbytes for value in compared])
            for value, part in zip(compared, parts, strict=True):
                value.view(-1).view(torch.uint8).copy_(part)
            differs += (own != taken).any()
        return differs

    def add(self, buffer: Tensor, change: Tensor) -> None:
        """Between `take_first` and `settle`: add `change`, equal on all ranks, to one of those that are `updated`."""
        self._next[self._updated[id(buffer)]] += change

    def settle(self, skipped: Tensor) -> None:
        """After an update: keep the settled values, or the values before the step where `skipped` (a flag) is 1."""
        for name, value in self._next.items():
            self._saved[name].copy_(torch.where(skipped.to(value.device) > 0, self._saved[name], value))
        self._next = {}
        self.restore()

    def restore(self) -> None:
        """Put the saved values into the modules."""
        with torch.no_grad():
            for name in self._live:
                self._value(name).copy_(self._saved[name])

    def shards(self) -> Iterable[Shard]:
        """The saved values, live."""
        for name, value in self._saved.items():
            yield from self._registry.shards(name, BUFFER, self._held[name], value)

    def _value(self, name: str) -> Tensor:
        module, attribute = self._live[name]
        value, entry = module.get_buffer(attribute).detach(), self._registry.entries[name]
        if (tuple(value.shape), value.dtype) != (entry.shape, entry.dtype):
            raise ValueError(
                f"buffer {name} is {value.dtype} {tuple(value.shape)} now, and was built {entry.dtype} {entry.shape}: "
                "a persistent buffer keeps its shape and dtype"
            )
        return value


def _places(model: nn.Module) -> Iterable[tuple[nn.Module, str, str]]:
    """Module, attribute and global name of every buffer, shared ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield module, attribute, f"{prefix}.{attribute}" if prefix else attribute
