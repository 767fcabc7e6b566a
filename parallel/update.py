"""What happens between backward and the optimizer: one message, one all-reduce, all arithmetic on the device."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stoker.parallel.loss_scale import FLOOR
from stoker.parallel.mesh import Mesh


class ControlFlag(enum.StrEnum):
    """What one rank raises and all ranks act on, one step late. The message has a place for each."""

    STOP = "stop"  # a person asked for the end
    PREEMPT = "preempt"  # the machine is needed back
    SAVE = "save"  # a checkpoint is asked for
    SAVE_FAILED = "save_failed"  # a save or an upload failed
    SUPERSEDED = "superseded"  # another start of the run has begun


@dataclass(frozen=True)
class StepFlags:
    """What a rank has to say to the others with a step."""

    votes: frozenset[ControlFlag] = frozenset()
    work_seconds: float = 0.0  # that the rank needed for itself; waiting for others is no work
    loss_ceiling: float = math.inf  # a step above either is left out as one that is not finite is; equal on all ranks
    norm_ceiling: float = math.inf


NO_FLAGS = StepFlags()


@dataclass(frozen=True)
class StepMetrics:
    """The result of a step on the host, equal on all ranks."""

    loss: float  # mean over the valid tokens of the global batch, nats
    grad_norm: float  # L2 norm of that mean's gradient, before clipping
    tokens: int  # valid tokens of the global batch
    skipped: bool  # no update was made: loss or norm not finite, or not one valid token
    votes: frozenset[ControlFlag]  # those that at least one rank cast
    loss_scale: float = 1.0  # what the loss was multiplied by, other than 1 in fp16 only
    work_seconds: tuple[float, ...] = field(default=(), kw_only=True)  # of each rank
    overflowed: bool = False  # skipped, but only as the loss scale was too large: it is lowered, and the next step fits


class StepResult:
    """The result of a step, on its way from the device. `read` waits for it; nothing else does."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> StepMetrics:
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, tokens, skipped, loss_scale, overflowed, *said = self._values.tolist()
        votes, seconds = said[: len(ControlFlag)], tuple(said[len(ControlFlag) :])
        cast = frozenset(flag for flag, count in zip(ControlFlag, votes, strict=True) if count > 0)
        overflow = bool(overflowed)
        return StepMetrics(
            loss, grad_norm, int(tokens), bool(skipped), cast, loss_scale, overflow, work_seconds=seconds
        )


@dataclass(frozen=True)
class UpdateDecision:
    """What the reduced message means for the update. All scalars on the device; nothing here waits for it."""

    result: StepResult
    gradient_divisor: Tensor  # float32: the accumulated gradient over this is the clipped mean gradient
    found_inf: Tensor  # float32: 1 where the update must be left out


def reduce_step(
    mesh: Mesh,
    gradients: Sequence[Tensor],
    loss_sum: Tensor,
    valid_tokens: Tensor,
    said: StepFlags,
    *,
    loss_scale: Tensor,
    nominal_tokens: int,
    grad_clip_norm: float | None,
) -> UpdateDecision:
    """Reduce one step's message over all ranks and draw the conclusions.

    `gradients` are those this rank counts (each element of the global gradient is counted by exactly one rank),
    accumulated from losses multiplied by `loss_scale` (fp32 scalar) / nominal_tokens; `loss_sum` and `valid_tokens`
    are float64 scalars, zero on ranks whose numbers another rank of the same replica reports.
    Each rank's seconds have a place of their own in the message, zero in those of others, so that a sum brings all.
    """
    norms = torch._foreach_norm(list(gradients)) if gradients else []
    squares = torch.stack(list(norms)).double().square().sum() if norms else torch.zeros_like(loss_sum)
    seconds = [0.0] * mesh.layout.world
    seconds[mesh.rank] = said.work_seconds
    cast = torch.tensor([*(float(flag in said.votes) for flag in ControlFlag), *seconds], dtype=torch.float64)
    squares, cast = squares.to(loss_sum.device), cast.to(loss_sum.device, non_blocking=True)
    message = torch.cat([torch.stack([squares, loss_sum, valid_tokens]), cast])
    mesh.all_reduce(message)

    tokens = message[2]
    counted = tokens.clamp(min=1.0)
    loss = message[1] / counted
    accumulated = loss_scale.double() * counted / nominal_tokens  # gradients are this times those of the mean loss
    grad_norm = message[0].sqrt() / accumulated
    sound = torch.isfinite(loss) & torch.isfinite(grad_norm) & (tokens > 0)
    if min(said.loss_ceiling, said.norm_ceiling) < math.inf:
        sound &= (loss <= said.loss_ceiling) & (grad_norm <= said.norm_ceiling)
    divisor = accumulated
    if grad_clip_norm is not None:
        divisor = divisor / (grad_clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    skipped = (~sound).double()
    overflowed = skipped * (torch.isfinite(loss) & ~torch.isfinite(grad_norm) & (tokens > 0) & (loss_scale > FLOOR))
    values = torch.cat([torch.stack([loss, grad_norm, tokens, skipped, loss_scale.double(), overflowed]), message[3:]])
    divisor = torch.where(sound, divisor, torch.ones_like(divisor)).float()
    return UpdateDecision(StepResult(values), divisor, skipped.float())
