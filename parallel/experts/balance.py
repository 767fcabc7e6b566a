"""How evenly tokens go to experts: counted over the global batch, once a step, and what follows from the counts.

    forward of a layer ──► its counts, once for each micro-batch of training ──► the step's one message ──► all ranks
                                                                                 └──► the biases of the routers

Counts are integers and exact in the message's float64, so that they, and the biases that follow from them, are bitwise
the same on every layout and in micro-batches of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import Config
from stoker.parallel.mesh import Mesh

LOSSES = ("router_balance_loss", "router_z_loss")  # sums of a layer, in this order


class RoutedLayer(nn.Module):
    """A layer of a block that counts the tokens of its experts. `count_routed` makes its block do so.

    `latest` is set by each forward: int64 `[experts]`, and the values of the `LOSSES`, fp32 `[2]`.
    """

    latest: tuple[Tensor, Tensor] | None = None
    routed: Tensor  # int64 [experts], tokens of this rank in the step so far
    losses: Tensor  # float64 [2], of them
    loss_factor: Tensor  # fp32 scalar, what the loss of the model is multiplied by: one for all layers of a `Balance`

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("routed", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("losses", torch.zeros(len(LOSSES), dtype=torch.float64), persistent=False)
        self.register_buffer("loss_factor", torch.ones(()), persistent=False)

    @property
    def bias(self) -> Tensor | None:
        """fp32 `[experts]`, persistent, which the counts move; None: this layer has none."""
        return None

    def reset(self) -> None:
        """First values of the buffers."""
        self.routed.zero_()
        self.losses.zero_()
        self.loss_factor.fill_(1.0)


def count_routed(block: nn.Module, layer: RoutedLayer) -> None:
    """Count the tokens of `layer` whenever `block` has run in training: not again where it is recomputed."""

    def add(module: nn.Module, *_: Any) -> None:
        if module.training and layer.latest is not None:
            counts, losses = layer.latest
            layer.routed.add_(counts)
            layer.losses.add_(losses)
        layer.latest = None

    block.register_forward_hook(add)


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return gradients[0], factor.to(ctx.dtype), None


def with_loss(x: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
    """`x`, in whose backward pass the scalar `loss` joins the loss of the model, each multiplied by `factor`."""
    return _AddLoss.apply(x, loss, factor)


class Balance:
    """The layers with experts of this rank's stages, and their slots in the step's message."""

    def __init__(self, config: Config, mesh: Mesh, stages: Sequence[nn.Module]) -> None:
        model = config.model
        self._layers, self._experts, self._rate = model.num_hidden_layers, model.num_experts, model.router_bias_rate
        self._device = mesh.device
        # Without sequence parallelism all tensor-parallel ranks route the same tokens.
        self._reports = mesh.coordinate.tp == 0 or config.parallel.sequence_parallel
        self._own = {number: layer for stage in stages for number, layer in _numbered(stage)} if self._experts else {}
        self._loss_factor = torch.ones((), device=mesh.device)
        for layer in self._own.values():
            layer.loss_factor = self._loss_factor

    def begin(self, factor: Tensor) -> None:
        """Before a forward pass of training, of losses that are multiplied by `factor` (fp32 scalar)."""
        if self._own:
            self._loss_factor.copy_(factor)

    def message(self) -> Tensor | None:
        """What this rank adds to the step's message: float64, None for a model without experts."""
        if not self._experts:
            return None
        slots = torch.zeros(self._layers * self._experts + len(LOSSES), dtype=torch.float64, device=self._device)
        if self._reports:
            counts = slots[: -len(LOSSES)].view(self._layers, self._experts)
            for number, layer in self._own.items():
                counts[number] += layer.routed
                slots[-len(LOSSES) :] += layer.losses
        for layer in self._own.values():
            layer.routed.zero_()
            layer.losses.zero_()
        return slots

    def changes(self, reduced: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each bias of this rank and what the counts of all ranks, `reduced`, add to it (DeepSeek-V3, 2.1.2)."""
        counts = reduced[: -len(LOSSES)].view(self._layers, self._experts)
        for number, layer in self._own.items():
            if layer.bias is not None:
                wanted = counts[number].mean()
                yield layer.bias, (wanted - counts[number]).sign().float() * self._rate


def biases(stages: Sequence[nn.Module]) -> list[Tensor]:
    """The buffers of `stages` that only `Balance.changes` move, and so alike on all ranks."""
    layers = (layer for stage in stages for layer in stage.modules() if isinstance(layer, RoutedLayer))
    return [layer.bias for layer in layers if layer.bias is not None]


def _numbered(stage: nn.Module) -> Iterator[tuple[int, RoutedLayer]]:
    blocks: Mapping[str, nn.Module] = stage.blocks()  # type: ignore[operator]
    for number, block in blocks.items():
        for module in block.modules():
            if isinstance(module, RoutedLayer):
                yield int(number), module
