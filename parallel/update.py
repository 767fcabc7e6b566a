"""Between backward and the optimizer: one message, one all-reduce, all arithmetic on the device."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stoker.parallel.loss_scale import FLOOR
from stoker.parallel.mesh import Mesh

Shown = Callable[[Mapping[str, float]], dict[str, float]]


class ControlFlag(enum.StrEnum):
    """Flags that one rank sets and all ranks act on, one step later. Each has a slot in the step's all-reduce."""

    STOP = "stop"  # a user requested the end
    PREEMPT = "preempt"  # the machine is being reclaimed
    SAVE = "save"  # a checkpoint was requested
    SAVE_FAILED = "save_failed"  # a save or an upload failed
    SUPERSEDED = "superseded"  # another start of the run has begun
    FINISH = "finish"  # an observer of the user's ends the run


@dataclass(frozen=True)
class StepFlags:
    """Flags and measurements that this rank adds to the step's all-reduce."""

    votes: frozenset[ControlFlag] = frozenset()
    work_seconds: float = 0.0  # work of this rank, without waiting for other ranks
    memory_bytes: float = field(default=0.0, kw_only=True)  # at most so far, of this rank on its device
    loss_ceiling: float = math.inf  # a step above either is skipped like one that is not finite; equal on all ranks
    norm_ceiling: float = math.inf


NO_FLAGS = StepFlags()


@dataclass(frozen=True)
class StepMetrics:
    """The result of a step on the host, equal on all ranks."""

    loss: float  # mean over what the objective counts in the global batch (tokens: nats); nan if there is none
    grad_norm: float  # L2 norm of that mean's gradient, before clipping
    tokens: int  # valid tokens of the global batch
    skipped: bool  # no update was made: loss or norm not finite, or not one valid token
    votes: frozenset[ControlFlag]  # set by at least one rank
    loss_scale: float = 1.0  # what the loss was multiplied by, other than 1 in fp16 only
    work_seconds: tuple[float, ...] = field(default=(), kw_only=True)  # of each rank
    memory_bytes: tuple[float, ...] = field(default=(), kw_only=True)  # of each rank, at most so far
    overflowed: bool = False  # skipped because the loss scale was too large: the scale is lowered
    unequal_buffers: bool = False  # ranks had different values of persistent buffers and took those of the first
    scalars: Mapping[str, float] = field(default_factory=dict, kw_only=True)  # means of the objective's, by name
    routed: tuple[float, ...] = field(default=(), kw_only=True)  # of `stoker.parallel.experts.balance`


class StepResult:
    """The result of a step, still on the device. Only `read` waits for it."""

    def __init__(self, values: Tensor, scalars: Sequence[str] = (), routed: int = 0, shown: Shown = dict) -> None:
        """`scalars`: names of the last of the `values`, before as many as `routed`. `shown`: makes metrics of them."""
        self._scalars, self._routed, self._shown = tuple(scalars), routed, shown
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # the host sleeps: waiting is no work of this rank
            self._event.record()
        else:
            self._values = values

    def read(self) -> StepMetrics:
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, tokens, skipped, loss_scale, overflowed, unequal, *rest = self._values.tolist()
        end = len(rest) - self._routed
        rest, routed = rest[:end], rest[end:]
        cut = len(rest) - len(self._scalars)
        votes, of_ranks = rest[: len(ControlFlag)], tuple(rest[len(ControlFlag) : cut])
        world = len(of_ranks) // 2
        cast = frozenset(flag for flag, count in zip(ControlFlag, votes, strict=True) if count > 0)
        return StepMetrics(
            loss,
            grad_norm,
            int(tokens),
            bool(skipped),
            cast,
            loss_scale,
            bool(overflowed),
            unequal > 0,
            work_seconds=of_ranks[:world],
            memory_bytes=of_ranks[world:],
            scalars=self._shown(dict(zip(self._scalars, rest[cut:], strict=True))),
            routed=tuple(routed),
        )


@dataclass(frozen=True)
class UpdateDecision:
    """Scalars for the update, from the reduced message. All are on the device; nothing here waits for it."""

    result: StepResult
    gradient_divisor: Tensor  # float32: the accumulated gradient over this is the clipped mean gradient
    found_inf: Tensor  # float32: 1 where the update must be left out
    overflowed: Tensor  # float32: 1 where the reason is a loss scale that was too large
    routed: Tensor | None = None  # float64: `routed` of all ranks


def reduce_step(
    mesh: Mesh,
    gradients: Sequence[Tensor],
    loss_sum: Tensor,
    count: Tensor,
    flags: StepFlags,
    *,
    loss_scale: Tensor,
    nominal_count: int,
    grad_clip_norm: float | None,
    unequal_buffers: Tensor | None = None,
    tokens: Tensor | None = None,
    scalars: Mapping[str, Tensor] | None = None,
    shown: Shown = dict,
    kinds: Mapping[str, Sequence[int]] | None = None,
    routed: Tensor | None = None,
) -> UpdateDecision:
    """Reduce one step's message over all ranks and compute the update's scalars from it.

    `gradients` are those this rank counts (each element of the global gradient is counted by exactly one rank),
    accumulated from losses multiplied by `loss_scale` (fp32 scalar) / nominal_count; `loss_sum` and `count`, which the
    sums are divided by, are float64 scalars, zero on ranks whose numbers another rank of the same replica reports.
    So are `tokens`, the number of valid tokens where that is not `count`, and the sums of the objective's `scalars`,
    of whose means `shown` makes metrics.
    `kinds` are places in `gradients`; the norm of those of each kind, before clipping, becomes a scalar
    `grad_norm.KIND`. All ranks name the same kinds.
    `routed` (float64 `[n]`) is added up as it is.
    `unequal_buffers` (float64 scalar) is 1 on a rank whose persistent buffers are not those of the first, else 0.
    Each rank writes its seconds and its bytes to its own slots of the message and zeros to the others, so that a sum
    gathers all.
    """
    norms = torch._foreach_norm(list(gradients)) if gradients else []
    squares = _squares(norms, loss_sum)
    world = mesh.layout.world
    of_ranks = [0.0] * (2 * world)
    of_ranks[mesh.rank], of_ranks[world + mesh.rank] = flags.work_seconds, flags.memory_bytes
    cast = torch.tensor([*(float(flag in flags.votes) for flag in ControlFlag), *of_ranks], dtype=torch.float64)
    cast = cast.to(loss_sum.device, non_blocking=True)
    unequal = torch.zeros_like(loss_sum) if unequal_buffers is None else unequal_buffers
    names = list(scalars or ())
    own = [] if tokens is None else [tokens]
    of_kinds = [_squares([norms[place] for place in places], loss_sum) for places in (kinds or {}).values()]
    further = [*own, *(scalars or {}).values(), *of_kinds]
    message = torch.cat(
        [torch.stack([squares, loss_sum, count, unequal]), cast, *([torch.stack(further)] if further else [])]
        + ([] if routed is None else [routed])
    )
    mesh.all_reduce(message)
    if routed is not None:
        message, routed = message[: -len(routed)], message[-len(routed) :]
    message, sums = message[: len(message) - len(further)], message[len(message) - len(further) :]

    count = message[2]
    any_counted = count > 0
    counted = torch.where(any_counted, count, 1.0)
    loss = torch.where(any_counted, message[1] / counted, math.nan)
    accumulated = loss_scale.double() * counted / nominal_count  # gradients are this times those of the mean loss
    grad_norm = message[0].sqrt() / accumulated
    sound = torch.isfinite(loss) & torch.isfinite(grad_norm) & any_counted
    if min(flags.loss_ceiling, flags.norm_ceiling) < math.inf:
        sound &= (loss <= flags.loss_ceiling) & (grad_norm <= flags.norm_ceiling)
    divisor = accumulated
    if grad_clip_norm is not None:
        divisor = divisor / (grad_clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    skipped = (~sound).double()
    overflowed = skipped * (torch.isfinite(loss) & ~torch.isfinite(grad_norm) & any_counted & (loss_scale > FLOOR))
    counted_tokens = sums[0] if own else count
    result = torch.stack([loss, grad_norm, counted_tokens, skipped, loss_scale.double(), overflowed])
    of_objective, of_kind = sums[len(own) : len(own) + len(names)], sums[len(own) + len(names) :]
    values = torch.cat([result, message[3:], of_objective / counted, of_kind.sqrt() / accumulated])
    if routed is not None:
        values = torch.cat([values, routed])
    divisor = torch.where(sound, divisor, torch.ones_like(divisor)).float()
    names += [f"grad_norm.{kind}" for kind in kinds or ()]
    shown_result = StepResult(values, names, 0 if routed is None else len(routed), shown)
    return UpdateDecision(shown_result, divisor, skipped.float(), overflowed.float(), routed)


def _squares(norms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of the squares of `norms`: a scalar as `like`, float64."""
    return torch.stack(list(norms)).double().square().sum().to(like.device) if norms else torch.zeros_like(like)
