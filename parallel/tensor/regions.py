"""The ways into a region and out of it: pairs of collectives, each of which is the other one's gradient.

Functional collectives, so that torch.compile sees them; waited for at once, so that on CUDA the inductor can see
all-gather -> matmul and matmul -> reduce-scatter and overlap the two.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stoker.parallel.tensor.axis import TensorAxis

ENTERS, LEAVES, ENTERS_IN_PART = (
    "enters",
    "leaves",
    "enters in part",
)  # `border` of an autograd function: for `stoker.parallel.tensor.check`


def enter(x: Tensor, axis: TensorAxis) -> Tensor:
    """Into a region: activations of all tokens `[tokens, ...]`, their gradient summed over the ranks of the region.

    `x` is this rank's share of the tokens under sequence parallelism, else what all ranks hold.
    """
    if axis.sequence:
        return _Gather.apply(x, axis.group_name, axis.size)
    return _Fork.apply(x, axis.group_name)


def leave(x: Tensor, axis: TensorAxis) -> Tensor:
    """Out of a region: the sum over its ranks of `x` `[tokens, ...]`.

    Under sequence parallelism this rank's share of the tokens: raises ValueError if they do not divide.
    """
    if not axis.sequence:
        return _Join.apply(x, axis.group_name)
    if x.shape[0] % axis.size:
        raise ValueError(
            f"sequence parallelism: a micro-batch of {x.shape[0]} tokens does not divide over {axis.size} ranks"
        )
    return _Scatter.apply(x, axis.group_name, axis.size)


def gather_channels(x: Tensor, axis: TensorAxis) -> Tensor:
    """Out of a region: the channels of all ranks, one after the other, from this rank's `x` `[..., channels]`."""
    return _GatherChannels.apply(x, axis.group_name, axis.size, axis.rank)


def enter_last_channels(x: Tensor, channels: int, axis: TensorAxis) -> Tensor:
    """Into a region with the last `channels` of `x` `[..., all]`, which all ranks hold; the others stay outside."""
    return _ForkLast.apply(x, channels, axis.group_name)


def split_channels(x: Tensor, axis: TensorAxis) -> Tensor:
    """Into a region: this rank's equal share of the channels of `x` `[..., channels]`, which all ranks hold."""
    return _SplitChannels.apply(x, axis.group_name, axis.size, axis.rank)


def all_gather(x: Tensor, group_name: str, size: int) -> Tensor:
    """`x` of all ranks, one after the other along dim 0."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), size, group_name))


def reduce_scatter(x: Tensor, group_name: str, size: int) -> Tensor:
    """This rank's part along dim 0 of the sum of `x` over the ranks."""
    collectives, x = torch.ops._c10d_functional, x.contiguous()
    if not x.is_cpu:
        return collectives.wait_tensor(collectives.reduce_scatter_tensor(x, "sum", size, group_name))
    # gloo has none: its reduce_scatter is an all_reduce that discards all but one part
    splits = [x.shape[0] // size] * size
    parts = collectives.wait_tensor(collectives.all_to_all_single(x, splits, splits, group_name))
    return functools.reduce(torch.add, parts.chunk(size))


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of `x` over the ranks."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group_name))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size, ctx.border = group_name, size, ENTERS
        return all_gather(x, group_name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(gradient, ctx.group_name, ctx.size), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int) -> Tensor:
        ctx.group_name, ctx.size, ctx.border = group_name, size, LEAVES
        return reduce_scatter(x, group_name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(gradient, ctx.group_name, ctx.size), None, None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name, ctx.border = group_name, ENTERS
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(gradient, ctx.group_name), None


class _ForkLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: int, group_name: str) -> Tensor:
        ctx.group_name, ctx.channels, ctx.border = group_name, channels, ENTERS_IN_PART
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        outside, inside = gradient.split([gradient.shape[-1] - ctx.channels, ctx.channels], -1)
        return torch.cat([outside, all_reduce(inside, ctx.group_name)], -1), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.border = LEAVES
        return all_reduce(x, group_name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


def _own_channels(x: Tensor, size: int, rank: int) -> Tensor:
    return x.chunk(size, -1)[rank].contiguous()


def _all_channels(x: Tensor, group_name: str, size: int) -> Tensor:
    gathered = all_gather(x.unsqueeze(0), group_name, size)
    return gathered.movedim(0, -2).flatten(-2)


class _GatherChannels(torch.autograd.Function):
    """All ranks compute the same from its result, so that each has the whole gradient of its own channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int, rank: int) -> Tensor:
        ctx.size, ctx.rank, ctx.border = size, rank, LEAVES
        return _all_channels(x, group_name, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _own_channels(gradient, ctx.size, ctx.rank), None, None, None


class _SplitChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int, rank: int) -> Tensor:
        ctx.group_name, ctx.size, ctx.border = group_name, size, ENTERS
        return _own_channels(x, size, rank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_channels(gradient, ctx.group_name, ctx.size), None, None, None


def enable_async_tensor_parallelism(group: dist.ProcessGroup) -> None:
    """From now on compiled code on CUDA may split collectives of `group` and overlap them with their matmuls."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # Deprecated as needless in torch 2.13, but the inductor's pass still checks that it was called
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)
