"""Weights that every data-parallel rank holds whole: ZeRO 0, and a run on a single rank.

Trained parameters, their gradients and the compute copy are three flat buffers that the module's parameters are views
of. That makes casting the parameters one copy, zeroing the gradients one fill, and the all-reduce a few large messages
that start, bucket by bucket, as backward completes them. It computes what `fully_shard` over a replicate axis computes
and costs less than DistributedDataParallel. Frozen parameters are in none of them: they are what the module computes
with (`stoker.parallel.frozen`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.parallel.pinned import pinned_zeros
from stoker.parallel.registry import LocalShard
from stoker.parallel.sharding import Precision, materialise, replace_parameters
from stoker.parallel.shards import whole

ALIGNMENT = 16  # elements: keeps every view on a 64-byte boundary
# Elements per all-reduce: messages of 8 MiB of float32 on CPUs. A GPU computes faster and its network starts slower.
BUCKET_NUMEL = {"cpu": 1 << 21, "cuda": 1 << 24}


class ReplicatedStrategy:
    """See `stoker.parallel.sharding.ShardingStrategy`. `group` are the ranks that hold the same, None if this is the
    only one; `expert_group` those that hold the same experts, whose names are `experts`.

    With `offload` the float32 parameters that are trained, and so the optimizer, are in the CPU's memory: gradients
    are copied there after their reduction, and the compute copy back after the update.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision,
        group: dist.ProcessGroup | None,
        offload: bool = False,
        expert_group: dist.ProcessGroup | None = None,
        experts: Collection[str] = (),
    ) -> None:
        self.module = model
        # Backward completes gradients in the reverse order of use, so that is their order in the buffers, those of
        # experts behind the others.
        named = dict(reversed(list(model.named_parameters())))
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        offsets, border = _layout({name: parameter for name, parameter in trained.items() if name not in experts})
        of_experts, total = _layout({name: trained[name] for name in trained if name in experts}, border)
        places = offsets | of_experts
        home = torch.device("cpu") if offload else device
        at_home = pinned_zeros if offload and device.type == "cuda" else functools.partial(torch.zeros, device=home)
        self._master = at_home(total)
        self._gradients = torch.zeros(total, device=device)
        self._home_gradients = at_home(total) if offload else self._gradients
        self._compute = self._master
        if offload or precision.dtype != torch.float32:
            self._compute = torch.zeros(total, device=device, dtype=precision.dtype)
        # Modules that compute in float32 have a float32 copy of their own where the masters are on another device.
        full = {parameter for module in precision.full for parameter in module.parameters()}
        self._full = torch.zeros(total, device=device) if offload and full else self._master

        def view(buffer: Tensor, name: str) -> Tensor:
            shape = named[name].shape
            return buffer[places[name] : places[name] + shape.numel()].view(shape)

        self._by_name = {name: view(self._home_gradients, name) for name in trained}
        self._accumulated = {name: view(self._gradients, name) for name in trained}
        alike = {name: _place(expert_group if name in experts else group) for name in named}
        self.held = {name: LocalShard((whole(tuple(p.shape)),), *alike[name]) for name, p in named.items()}
        replace_parameters(
            model,
            lambda name, old: (
                nn.Parameter(view(self._full if old in full else self._compute, name)) if name in places else old
            ),
        )
        materialise(model, device)  # what is left: frozen parameters and buffers
        parameters = dict(model.named_parameters())
        self.tensors = {
            name: view(self._master, name) if name in places else parameters[name].detach() for name in named
        }
        self._buckets = [_Buckets(self._gradients[:border], offsets, 0, group)]
        if of_experts:
            self._buckets.append(_Buckets(self._gradients[border:], of_experts, border, expert_group))
        for name in trained:
            buckets = self._buckets[name in of_experts]
            parameters[name].register_post_accumulate_grad_hook(self._hook(name, buckets))

    def _hook(self, name: str, buckets: _Buckets) -> Callable[[Tensor], None]:
        gradient = self._accumulated[name]

        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient.add_(parameter.grad)
            parameter.grad = None
            buckets.completed(name)

        return accumulate

    def on_backward_start(self, *, is_last: bool) -> None:
        for buckets in self._buckets:
            buckets.begin(reduce=is_last)

    def gradients(self) -> dict[str, Tensor]:
        for buckets in self._buckets:
            buckets.wait()
        if self._home_gradients is not self._gradients:
            self._home_gradients.copy_(self._gradients)
        return self._by_name

    def on_optimizer_step(self) -> None:
        self._gradients.zero_()
        for copy in (self._compute, self._full):
            if copy is not self._master:
                copy.copy_(self._master, non_blocking=True)


def _layout(parameters: dict[str, nn.Parameter], start: int = 0) -> tuple[dict[str, int], int]:
    """Where each parameter begins in a flat buffer, from `start` on, and where the last one ends."""
    offsets = {}
    for name, parameter in parameters.items():
        offsets[name] = start
        start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return offsets, start


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in `group`, and how many there are."""
    return (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)


class _Buckets:
    """All-reduces of a flat buffer, started in a fixed order as the parameters inside them are complete.

    `offsets` say where each begins, counted from `start`. A rank alone in its group (None) reduces nothing.
    """

    def __init__(self, buffer: Tensor, offsets: dict[str, int], start: int, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._spans: list[Tensor] = []
        least = BUCKET_NUMEL[buffer.device.type]
        self._bucket_of: dict[str, int] = {}
        self._sizes: list[int] = []
        names = list(offsets)
        ends = [*list(offsets.values())[1:], start + buffer.numel()][: len(names)]  # none where nothing is trained
        ends, start = [end - start for end in ends], 0
        for name, end in zip(names, ends, strict=True):
            if len(self._sizes) == len(self._spans):
                self._sizes.append(0)
            self._bucket_of[name] = len(self._spans)
            self._sizes[-1] += 1
            if end - start >= least or name == names[-1]:
                self._spans.append(buffer[start:end])
                start = end
        self._missing: list[int] = []
        self._next = 0
        self._works: list[dist.Work] = []
        self._reduce = False

    def begin(self, *, reduce: bool) -> None:
        self._reduce, self._next, self._missing = reduce and self._group is not None, 0, list(self._sizes)

    def completed(self, name: str) -> None:
        if self._reduce:
            self._missing[self._bucket_of[name]] -= 1
            while self._next < len(self._spans) and self._missing[self._next] == 0:
                self._start_next()

    def wait(self) -> None:
        """Start the buckets that backward did not complete (parameters without a gradient), then wait for all."""
        while self._reduce and self._next < len(self._spans):
            self._start_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._reduce = False

    def _start_next(self) -> None:
        # Every rank starts the buckets in the same order, so no order of completion can cross two all-reduces.
        work = dist.all_reduce(self._spans[self._next], group=self._group, async_op=True)
        assert work is not None
        self._works.append(work)
        self._next += 1
