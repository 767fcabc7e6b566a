"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2): Adam's direction, each parameter's
step as long as the parameter times the learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from stoker.parallel.layout import ROLES, AxisRole
from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.rules.settings import Settings
from stoker.parallel.rules.skipping import Gate, Gates

STAGE = "stage"  # the group of the ranks that hold parts of the same pipeline stages
_AXES = tuple(axis for axis, role in ROLES.items() if role != AxisRole.STAGE)


class Lamb:
    """An `UpdateRule`. The trust ratio |w| / |u| is of the whole parameter, and 1 where either norm is 0.

    `parts` are this rank's, those that are not empty; `names` all parameters of the rule on these stages, equal on all
    ranks of them. The squares of a part are counted by one of the ranks that hold it.
    """

    def __init__(
        self,
        mesh: Mesh,
        registry: Registry,
        held: Mapping[str, LocalShard],
        names: list[str],
        parts: Mapping[str, Tensor],
        settings: Mapping[str, Settings],
    ) -> None:
        mesh.add_groups(STAGE, mesh.layout.groups(*_AXES))
        self._group, self._device = mesh.group(STAGE), mesh.device
        self._parts, self._settings = parts, settings
        self._places = {name: place for place, name in enumerate(names)}
        self._counted = [name for name in parts if registry.counted_in_stage(name, held[name])]
        self._indices = torch.tensor([self._places[name] for name in self._counted], device=mesh.device)
        self._moments = {name: torch.zeros_like(part) for name, part in parts.items()}
        self._squares = {name: torch.zeros_like(part) for name, part in parts.items()}
        self._step = torch.zeros((), device=mesh.device)
        self._pending: tuple[Tensor, dist.Work | None, dict[str, Tensor], Gate, float] | None = None

    @torch.no_grad()
    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Update the moments, and start the all-reduce of the squared norms: fp64 `[2, parameters]`."""
        gates = Gates(divisor, found_inf)
        here = gates.on(self._device)
        self._step += here.taken
        directions = {name: self._direction(name, gradients[name], gates) for name in self._parts}
        message = torch.zeros(2, len(self._places), dtype=torch.float64, device=self._device)
        for row, values in enumerate((self._parts, directions)):
            if self._counted:
                norms = torch.stack(list(torch._foreach_norm([values[name] for name in self._counted])))
                message[row].index_copy_(0, self._indices, norms.to(self._device).double().square())
        work = dist.all_reduce(message, group=self._group, async_op=True) if self._group is not None else None
        self._pending = message, work, directions, here, lr

    def _direction(self, name: str, gradient: Tensor, gates: Gates) -> Tensor:
        part, own = self._parts[name], self._settings[name]
        gate, step, (beta1, beta2) = gates.on(part.device), self._step.to(part.device), own.betas
        gradient = gate.gradient(gradient)
        moment = self._moments[name].mul_(gate.factor(beta1)).add_(gradient, alpha=1 - beta1)
        square = self._squares[name].mul_(gate.factor(beta2)).addcmul_(gradient, gradient, value=1 - beta2)
        step = step.clamp(min=1.0)  # nothing is updated before the first one
        root = (square / (1 - beta2**step)).sqrt_().add_(own.eps)
        direction = (moment / (1 - beta1**step)).div_(root)
        return direction.add_(part, alpha=own.decay) if own.decay else direction

    @torch.no_grad()
    def finish(self) -> None:
        assert self._pending is not None, "begun"
        (message, work, directions, gate, lr), self._pending = self._pending, None
        if work is not None:
            work.wait()
        norms = message.sqrt()
        ratios = torch.where((norms > 0).all(0), norms[0] / norms[1], 1.0).float() * gate.taken
        for name, part in self._parts.items():
            length = ratios[self._places[name]] * (lr * self._settings[name].rate)
            part.sub_(directions[name].mul_(length.to(part.device)))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, moment in self._moments.items():
            yield name, "exp_avg", moment
            yield name, "exp_avg_sq", self._squares[name]

    def scalars(self) -> dict[str, float]:
        return {"step": float(self._step)}

    def load_scalars(self, values: dict[str, float]) -> None:
        self._step.fill_(values.get("step", 0.0))
