"""A user's torch optimizer that needs whole parameters (norms or matrices of them), where a layout divides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from stoker.conf.schema import OptimConfig
from stoker.parallel.mesh import Mesh
from stoker.parallel.optimizer import LocalOptimizer
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.rules.ownership import Ownership, parameter
from stoker.parallel.rules.settings import TARGET, Settings
from stoker.parallel.shards import Shard, whole

_NONE = ""  # the name of a parameter that stands in where a rank owns none, so that all ranks count the same updates


class UserWholes:
    """An `UpdateRule` around `optim.target`: each parameter and its gradient are gathered by one owner each step, and
    the new values sent back. Its state is the owner's: the memory of a parameter, and of its state, is not divided.
    """

    def __init__(
        self,
        config: OptimConfig,
        mesh: Mesh,
        registry: Registry,
        held: Mapping[str, LocalShard],
        parts: Mapping[str, Tensor],
        settings: Mapping[str, Settings],
    ) -> None:
        self._parts, self._registry, self._mesh = parts, registry, mesh
        shapes = {name: registry.entries[name].shape for name in parts}
        self._owners = Ownership(
            mesh, registry, held, parts, lambda name: parameter(shapes[name]), lambda sizes: float(whole(sizes).numel)
        )
        names = [self._owners.units[number].name for number in self._owners.owned]
        self._wholes = {name: torch.zeros(shapes[name], device=mesh.device) for name in names}
        stand_in = {} if names else {_NONE: torch.zeros(2, 2, device=mesh.device)}
        plain = Settings(TARGET, 1.0, config.weight_decay, (0.0, 0.0), 0.0, 0.0)
        roles = registry.roles()
        self._inner = LocalOptimizer(config, self._wholes | stand_in, roles, {**settings, _NONE: plain})
        self._stand_in = stand_in
        self._pending: tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]], float, Tensor, Tensor] | None
        self._pending = None

    @torch.no_grad()
    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        own = {name: gradients[name] if part.numel() else part for name, part in self._parts.items()}
        self._pending = self._owners.gather(own), self._owners.gather(self._parts), lr, divisor, found_inf

    def finish(self) -> None:
        assert self._pending is not None, "begun"
        (gradients_of, values_of, lr, divisor, found_inf), self._pending = self._pending, None
        with torch.no_grad():
            gradients = dict(zip(self._wholes, gradients_of(), strict=True)) | self._stand_in
            for whole_one, value in zip(self._wholes.values(), values_of(), strict=True):
                whole_one.copy_(value)
        self._inner.step(gradients, lr, divisor, found_inf)
        with torch.no_grad():
            updated = self._owners.scatter(list(self._wholes.values()))
            for (_, view), value in zip(self._owners.views(self._parts), updated, strict=True):
                view.copy_(value)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        return iter(())

    def shards(self) -> list[Shard]:
        """The state of the parameters that this rank owns, each as one chunk."""
        layout, at = self._mesh.layout, self._mesh.coordinate
        replica, replicas = 0, 1
        if layout.shards > 1:
            replica, replicas = layout.place(self._mesh.rank, layout.replication), layout.replicas
        found = []
        for name, key, value in self._inner.tensors():
            if name != _NONE:
                ends = 2 if "ends" in self._registry.entries[name].partial else 1
                number = replica + (replicas if ends == 2 and at.pp > 0 else 0)
                shape = tuple(value.shape)
                found.append(Shard(name, f"optim.{key}", shape, whole(shape), value, number, replicas * ends))
        return found

    def scalars(self) -> dict[str, float]:
        return self._inner.scalars()

    def load_scalars(self, values: dict[str, float]) -> None:
        self._inner.load_scalars(values)
