"""Where DeepSpeed's ZeRO optimizers keep what belongs to a rank: the only place that reads their attributes.

Which class DeepSpeed takes is its decision: `DeepSpeedZeroOptimizer` for ZeRO 1 and 2, but `BF16_Optimizer` for ZeRO 1
in bf16 with gradients summed in fp32, and `DeepSpeedZeroOptimizer_Stage3`. Every attribute that is touched is listed in
TOUCHED, and a test compares them with the release that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TOUCHED: dict[str, tuple[str, ...]] = {
    "DeepSpeedEngine": ("optimizer", "set_gradient_accumulation_boundary", "buffered_allreduce_fallback"),
    "DeepSpeedZeroOptimizer": (
        "bit16_groups", "params_in_partition", "averaged_gradients", "all_grad_tensors", "micro_step_id", "cpu_offload",
        "single_partition_of_fp32_groups", "zero_grad", "update_lp_params", "reduce_gradients", "reset_cpu_buffers",
        "set_gradient_accumulation_boundary",
    ),
    "BF16_Optimizer": (
        "bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "zero_grad",
        "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp16_groups", "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer", "zero_grad", "_pre_step",
        "_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "_post_step",
    ),
    "parameter of ZeRO 1, 2": ("_hp_mapping",),
    "_hp_mapping": ("lp_fragment_address", "hp_fragment_address"),
    "fragment_address": ("start", "numel"),
    "parameter of ZeRO 3": ("ds_numel", "ds_tensor", "partition_numel"),
    "ds_tensor": ("ds_numel", "status", "final_location"),
}  # fmt: skip


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: `master` (fp32, live) holds the elements from `start` on of the flat tensor."""

    parameter: nn.Parameter
    start: int
    master: Tensor


class Partitions(Protocol):
    """A rank's partitions of the trained parameters."""

    def fragments(self) -> Iterator[Fragment]:
        """One for each parameter of which this rank holds anything."""
        ...

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """After the last backward, each fragment's fp32 gradient in order, reduced over `Layout.sharding`, live."""
        ...

    def renew(self) -> None:
        """Drop the gradients, and update the compute copies from the masters."""
        ...


class FlatPartitions:
    """ZeRO 1 and 2: the parameters of a group flattened, one after the other, and cut in equal parts.

    `reduces`: whether DeepSpeed has reduced by the end of the last backward. In a pipeline it does not.
    """

    def __init__(self, optimizer: Any, reduces: bool) -> None:
        self._optimizer, self._reduces = optimizer, reduces

    def fragments(self) -> Iterator[Fragment]:
        groups = zip(self._optimizer.bit16_groups, self._optimizer.single_partition_of_fp32_groups, strict=True)
        yield from (fragment for group in groups for fragment in _mapped(*group))

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        optimizer = self._optimizer
        if not self._reduces:
            optimizer.set_gradient_accumulation_boundary(True)
            optimizer.reduce_gradients()
        if optimizer.cpu_offload:
            groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
            for parameters, flat in groups:
                yield from ((part.parameter, part.master) for part in _mapped(parameters, flat.grad))
            return
        for number, parameters in enumerate(optimizer.params_in_partition):
            # What comes after the parameters is padding.
            for parameter, part in zip(parameters, optimizer.averaged_gradients[number], strict=False):
                yield parameter, part.view(-1)

    def renew(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = -1  # as its step() leaves it: what comes next is the first micro-batch
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for number in kept:
                kept[number] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            for flat in optimizer.single_partition_of_fp32_groups:
                flat.grad.zero_()  # of a parameter that no loss reaches it keeps the last gradient
        optimizer.update_lp_params()


class FlatBf16Partitions:
    """ZeRO 1 in bf16: as flat, with one fp32 buffer for the whole gradient, which backward adds to."""

    def __init__(self, engine: Any, ranks: int) -> None:
        self._engine, self._optimizer, self._ranks = engine, engine.optimizer, ranks

    def fragments(self) -> Iterator[Fragment]:
        groups = zip(self._optimizer.bf16_groups, self._optimizer.fp32_groups_flat_partition, strict=True)
        yield from (fragment for group in groups for fragment in _mapped(*group))

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if self._ranks > 1:
            self._engine.buffered_allreduce_fallback()
        groups = zip(self._optimizer.bf16_groups, self._optimizer.fp32_groups_gradient_flat_partition, strict=True)
        yield from ((part.parameter, part.master) for group in groups for part in _mapped(*group))

    def renew(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.update_lp_params()


class SplitPartitions:
    """ZeRO 3: every parameter flattened and cut in equal parts, the last ones short or empty."""

    def __init__(self, optimizer: Any, rank: int, ranks: int) -> None:
        self._optimizer, self._rank, self._ranks = optimizer, rank, ranks
        for flat in optimizer.fp32_partitioned_groups_flat:
            flat.grad = None  # offloaded, its step() would have gradients there as well

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self._optimizer
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            yield from self._split(parameters, flat)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        every = [parameter for group in self._optimizer.fp16_groups for parameter in group]
        parts = list(self._split(every, self._optimizer.grad_partitions_flat_buffer))
        torch._foreach_mul_([part.master for part in parts], float(self._ranks))  # it can only average
        yield from ((part.parameter, part.master) for part in parts)

    def renew(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.grad_partitions_flat_buffer.zero_()  # of a parameter that no loss reaches it keeps the last gradient
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer._post_step(set())

    def _split(self, parameters: list[Any], flat: Tensor) -> Iterator[Fragment]:
        place = 0
        for parameter in parameters:
            start, count = part_of(parameter, self._rank)
            if count:
                yield Fragment(parameter, start, flat.detach()[place : place + count])
            place += parameter.partition_numel()


def part_of(parameter: Any, rank: int) -> tuple[int, int]:
    """Where in the flattened parameter of ZeRO 3 the part of `rank` begins, and how many elements it has."""
    start = min(rank * parameter.partition_numel(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def _mapped(parameters: list[Any], flat: Tensor) -> Iterator[Fragment]:
    """The parts of a flat partition that belong to `parameters`."""
    for parameter in parameters:
        mapping = parameter._hp_mapping
        if mapping is not None:
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(parameter, there.start, flat.detach()[here.start : here.start + here.numel])
