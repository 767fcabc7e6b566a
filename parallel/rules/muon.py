"""Muon (Jordan et al. 2024): momentum, orthogonalised by a Newton-Schulz iteration on the whole matrix.

Its rate is matched to AdamW's root mean square (Liu et al. 2025, "Muon is Scalable for LLM Training", 2.2): the
orthogonal matrix is multiplied by 0.2 sqrt(max(rows, columns)), so that one learning rate and one decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from stoker.parallel.mesh import Mesh
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.rules.ownership import Ownership
from stoker.parallel.rules.settings import Settings
from stoker.parallel.rules.skipping import Gates

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; Jordan et al. 2024
STEPS = 5
RMS = 0.2  # of AdamW's updates, as Liu et al. measured
_LEAST_NORM = 1e-30  # of a matrix that is divided by its norm: only zeros are below it


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrix to `matrix` `[rows, columns]`, roughly: singular values end near 1.

    Computed in `dtype`, returned in fp32. Noise of 1e-5 in the input moves the result by 2e-2 in bf16, in fp32 by 2e-5.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp(min=_LEAST_NORM)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def cost(sizes: tuple[int, ...]) -> float:
    """Operations of `orthogonalized` for a matrix of these `sizes`, or for one of a stack."""
    small, large = min(sizes[-2:]), max(sizes[-2:])
    return STEPS * (4.0 * small * small * large + 2.0 * small**3)


def _of_one(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonalized`, also for `[1, rows, columns]`: one of a stack."""
    return orthogonalized(matrix.reshape(matrix.shape[-2:]), dtype).view(matrix.shape)


class Muon:
    """An `UpdateRule` for matrices. `parts` are this rank's by name, empty ones too.

    m <- b m + g; o = orthogonalized(g + b m); w <- w (1 - lr d) - lr 0.2 sqrt(max(rows, columns)) o, for each matrix
    that the registry knows in a parameter: of fused projections and of experts for each of them.
    """

    def __init__(
        self,
        mesh: Mesh,
        registry: Registry,
        held: Mapping[str, LocalShard],
        parts: Mapping[str, Tensor],
        settings: Mapping[str, Settings],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._parts, self._settings, self._dtype = parts, settings, dtype
        self._device = mesh.device
        self._moments = {name: torch.zeros_like(part) for name, part in parts.items() if part.numel()}
        self._owners = Ownership(mesh, registry, held, parts, lambda name: registry.entries[name].matrices(), cost)
        self._pending: tuple[Callable[[], list[Tensor]], Gates, float] | None = None

    @torch.no_grad()
    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Update the moments, and start bringing the matrices to their owners."""
        gates, directions = Gates(divisor, found_inf), dict(self._parts)  # of empty parts
        for name, moment in self._moments.items():
            gate, momentum = gates.on(moment.device), self._settings[name].momentum
            gradient = gate.gradient(gradients[name])
            moment.mul_(gate.factor(momentum)).add_(gradient)
            directions[name] = gradient.add_(moment, alpha=momentum)
        self._pending = self._owners.gather(directions), gates, lr

    @torch.no_grad()
    def finish(self) -> None:
        assert self._pending is not None, "begun"
        (gathered, gates, lr), self._pending = self._pending, None
        updates = self._owners.scatter([_of_one(matrix, self._dtype) for matrix in gathered()])
        for name in self._moments:
            part, own = self._parts[name], self._settings[name]
            if own.decay:
                part.mul_(1.0 - lr * own.rate * own.decay * gates.on(part.device).taken)
        for (number, view), update in zip(self._owners.views(self._parts), updates, strict=True):
            unit = self._owners.units[number]
            length = lr * self._settings[unit.name].rate * RMS * math.sqrt(max(unit.chunk.sizes[-2:]))
            view.sub_(update.to(view.device) * (length * gates.on(view.device).taken))

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, moment in self._moments.items():
            yield name, "momentum_buffer", moment

    def scalars(self) -> dict[str, float]:
        return {}

    def load_scalars(self, values: dict[str, float]) -> None:
        pass
