"""The engine: forward and backward, gradient sums, the step's all-reduce, the update. Sharding is left to a strategy.

Under `parallel.engine=fsdp` the strategies are Stoker's, on torch alone; under `deepspeed` they use DeepSpeed's ZeRO.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from stoker.conf.schema import Config
from stoker.parallel.average import Average
from stoker.parallel.batch import Batch
from stoker.parallel.buffers import Buffers, fill_buffers
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.experts.balance import Balance, biases
from stoker.parallel.forward_backward import ForwardBackward, GradientAccumulation
from stoker.parallel.gpu_clock import GpuClock
from stoker.parallel.layout import OF_TOKENS, BatchPlan, View
from stoker.parallel.loss_scale import LossScale
from stoker.parallel.mesh import Mesh
from stoker.parallel.mmap_offload import offloaded
from stoker.parallel.model import Role
from stoker.parallel.objective import NEXT_TOKEN, NextToken, Objective, WithBaseline, shown
from stoker.parallel.optimizer_needs import undeclared
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.replicated import ReplicatedStrategy
from stoker.parallel.rules.combined import Optimizer
from stoker.parallel.sequence import SequenceAxis, own_tokens, sequence_axis
from stoker.parallel.sharding import Precision, ShardingStrategy
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.parallel.stages import stages_of
from stoker.parallel.tensor.dropout import token_numbers
from stoker.parallel.tensor.low_rank import adapters_off
from stoker.parallel.update import NO_FLAGS, StepFlags, StepResult, reduce_step


class NativeEngine:
    """An `Engine`: `passes` through this rank's stages, whose weights are `weights`, one for each."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        passes: ForwardBackward,
        registry: Registry,
        weights: Sequence[ShardingStrategy],
        buffers: Buffers,
        clock: GpuClock,
        objective: Objective = NEXT_TOKEN,
        sequence: SequenceAxis | None = None,
    ) -> None:
        self._sequence, self._document_mask = sequence, bool(config.data.document_mask)
        self._clock, self._objective = clock, objective
        self._mesh, self._passes, self._registry, self._weights = mesh, passes, registry, weights
        self._buffers = buffers
        self._balance = Balance(config, mesh, self.modules())
        self._clip_norm, self._norms_by_role = config.grad_clip_norm, config.log.norms_by_role
        self._has_dropout = any(token_numbers(stage.module) is not None for stage in weights)
        self._nominal_count = objective.nominal(config.batch.size, config.seq_len)
        self._held: dict[str, LocalShard] = {}
        self._tensors: dict[str, Tensor] = {}
        for stage in weights:
            self._held |= stage.held
            self._tensors |= stage.tensors
        trained = {name: self._tensors[name] for name in registry.trainable()}
        with offloaded(config.parallel):
            self._optimizer = Optimizer(config.optim, mesh, registry, self._held, trained)
            decay = config.optim.ema
            self._average = None if decay is None else Average(decay, trained)
        self._loss_scale = LossScale(mesh.device) if config.precision == "fp16" else None
        self._one = torch.ones((), device=mesh.device)
        self._complete: dict[str, Tensor] | None = None  # gradients of this step after all sums, once computed
        # All ranks of a replica have the same rows; the first tensor-parallel rank of the last stage reports them, or
        # its share of their tokens.
        self._reports = mesh.coordinate.tp == 0 and mesh.coordinate.pp == mesh.layout.pp - 1
        self._sums = torch.zeros(1 + len(objective.scalars), dtype=torch.float64, device=mesh.device)
        self._count = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=mesh.device)  # where they are not the count
        self._counts_tokens = True  # is what the update divides by the number of valid tokens?

    def forward_backward(self, rows: Batch, first_row: int | None = None) -> None:
        if self._has_dropout and first_row is not None:
            rows = rows.numbered(first_row, self._mesh.dp_rank, self._mesh.layout.dp)
        rows = self._own(rows)
        factor = self._scale() / self._nominal_count
        self._balance.begin(factor)
        sums = self._passes.train(self._with_baseline(self._with_reference(rows)), factor)
        self._counts_tokens = isinstance(self._objective, NextToken) and rows.weights is None
        if self._reports:
            self._sums += sums
            self._count += self._objective.count(rows).to(self._mesh.device, non_blocking=True)
            if not self._counts_tokens:
                self._tokens += rows.valid_tokens().to(self._mesh.device, non_blocking=True)

    def _own(self, rows: Batch) -> Batch:
        """This rank's tokens of `rows`."""
        return rows if self._sequence is None else own_tokens(rows, self._sequence, self._document_mask)

    def _with_reference(self, rows: Batch) -> Batch:
        """`rows` with the log-probabilities of the model without its adapter, if the objective needs them."""
        if not self._objective.reference or rows.reference is not None:
            return rows
        modules = [stage.module for stage in self._weights]
        with _evaluating(modules), adapters_off(modules):
            reference = self._passes.log_probabilities(rows)
        self._buffers.restore()
        return replace(rows, reference=reference)

    def _with_baseline(self, rows: Batch) -> Batch:
        """`rows` with the objective's number of the whole step, if it has one, from these rows of all ranks."""
        if rows.baseline is not None or not isinstance(self._objective, WithBaseline):
            return rows
        sums = self._mesh.all_reduce(self._baseline_sums(self._objective, rows))
        return replace(rows, baseline=self._objective.baseline(sums).expand(len(rows)))

    def _baseline_sums(self, objective: WithBaseline, rows: Batch) -> Tensor:
        with _evaluating([stage.module for stage in self._weights]):
            given = self._passes.log_probabilities(rows)
        self._buffers.restore()
        rows = rows.to(self._mesh.device)
        if given is None:  # this rank has no head
            given = torch.zeros(rows.labels.shape, device=self._mesh.device)
            rows = replace(rows, reference=given)
        sums = objective.baseline_sums(given, rows)
        return sums if self._reports else torch.zeros_like(sums)

    def update(self, lr: float, flags: StepFlags = NO_FLAGS) -> StepResult:
        with record_function("stoker.update"):
            gradients = self._gradients()
            counted = {
                name: gradient
                for name, gradient in gradients.items()
                if gradient.numel() and self._registry.counted(name, self._held[name])
            }
            verdict = reduce_step(
                self._mesh,
                list(counted.values()),
                self._sums[0],
                self._count,
                flags,
                loss_scale=self._scale(),
                nominal_count=self._nominal_count,
                grad_clip_norm=self._clip_norm,
                tokens=None if self._counts_tokens else self._tokens,
                scalars=dict(zip(self._objective.scalars, self._sums[1:], strict=True)),
                shown=partial(shown, self._objective),
                unequal_buffers=self._buffers.take_first(),
                kinds=self._places_by_role(counted) if self._norms_by_role else None,
                routed=self._balance.message(),
            )
            self._optimizer.step(gradients, lr, verdict.gradient_divisor, verdict.found_inf)
            if self._average is not None:
                self._average.update(verdict.found_inf)
            if verdict.routed is not None:
                for bias, change in self._balance.changes(verdict.routed):
                    self._buffers.add(bias, change)
            self._buffers.settle(verdict.found_inf)
            self._renew()
            if self._loss_scale is not None:
                self._loss_scale.adjust(verdict.overflowed, verdict.found_inf)
            for total in (self._sums, self._count, self._tokens):
                total.zero_()
        return verdict.result

    def _places_by_role(self, names: Iterable[str]) -> dict[str, list[int]]:
        """For each role the places of its parameters in `names`."""
        found: dict[str, list[int]] = {role: [] for role in Role}
        for place, name in enumerate(names):
            found[self._registry.entries[name].role].append(place)
        return found

    def gpu_seconds(self) -> float:
        return self._clock.take()

    def evaluate(self, rows: Batch) -> Tensor:
        rows = self._own(rows)
        with _evaluating([stage.module for stage in self._weights]):
            sums = self._passes.evaluate(self._with_baseline(self._with_reference(rows)))
        self._buffers.restore()
        if not self._reports:
            return torch.zeros(1 + len(sums), dtype=torch.float64, device=self._mesh.device)
        count = self._objective.count(rows).to(self._mesh.device).double()
        return torch.cat([sums[:1], count[None], sums[1:]])

    def with_baseline(self, parts: Sequence[Batch]) -> list[Batch]:
        objective = self._objective
        if not parts or not isinstance(objective, WithBaseline):
            return list(parts)
        found = [self._with_reference(rows) for rows in parts]
        sums = torch.stack([self._baseline_sums(objective, rows) for rows in found]).sum(0)
        baseline = objective.baseline(self._mesh.all_reduce(sums))
        return [replace(rows, baseline=baseline.expand(len(rows))) for rows in found]

    def predict(self, rows: Batch, objective: Objective | None = None) -> Tensor | None:
        with _evaluating([stage.module for stage in self._weights]):
            found = self._passes.log_probabilities(self._own(rows), objective)
        self._buffers.restore()
        return found if self._reports else None

    def modules(self) -> list[nn.Module]:
        stages = [stage.module for stage in self._weights]
        # DeepSpeed's wraps it
        return [stage if hasattr(type(stage), "blocks") else stage.get_submodule("module") for stage in stages]

    def shards(self) -> list[Shard]:
        tensors = [(name, PARAMETER, tensor) for name, tensor in self._tensors.items()]
        kept = itertools.chain(self._optimizer.tensors(), self._average.tensors() if self._average is not None else ())
        tensors += [(name, f"optim.{key}", state) for name, key, state in kept]
        described = (shard for tensor in tensors for shard in self._described(*tensor))
        return [*described, *self._optimizer.owned(), *self._buffers.shards()]

    def shards_written(self) -> None:
        self._buffers.restore()
        self._renew()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self._average is not None, "optim.ema is set"
        self._average.swap()
        self._renew()
        try:
            yield
        finally:
            self._average.swap()
            self._renew()

    def without_gradient(self) -> list[str]:
        zero = {name for name, gradient in self._gradients().items() if gradient.numel() and not gradient.any()}
        suspects = set().union(*_gather_names(self._mesh, zero))
        if not suspects:
            return []
        alive = {name for name, g in self._gradients().items() if name in suspects and g.numel() and g.any()}
        return sorted(suspects.difference(*_gather_names(self._mesh, alive)))

    def _renew(self) -> None:
        self._complete = None
        for stage in self._weights:
            stage.on_optimizer_step()

    def gradient_shards(self) -> list[Shard]:
        scale = self._scale()
        return [
            shard
            for name, gradient in self._gradients().items()
            for shard in self._described(name, GRADIENT, gradient * (self._nominal_count / scale))
        ]

    def state(self) -> dict[str, float]:
        scale = self._loss_scale.state() if self._loss_scale is not None else {}
        average = {} if self._average is None else self._average.scalars()
        return self._optimizer.scalars() | average | scale

    def load_state(self, state: dict[str, float]) -> None:
        self._optimizer.load_scalars(state)
        if self._average is not None:
            self._average.load_scalars(state)
        if self._loss_scale is not None:
            self._loss_scale.load_state(state)

    def _scale(self) -> Tensor:
        return self._one if self._loss_scale is None else self._loss_scale.value

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients of all trained parameters after all sums: the input of `update`."""
        if self._complete is None:
            self._complete = {}
            for stage in self._weights:
                self._complete |= stage.gradients()
            _sum_partial(self._mesh, self._registry, self._complete)
        return self._complete

    def _described(self, name: str, kind: str, data: Tensor) -> list[Shard]:
        return list(self._registry.shards(name, kind, self._held[name], data))


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode (dropout, batch norm); those in training mode return to it afterwards."""
    training = [part for module in modules for part in module.modules() if part.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _gather_names(mesh: Mesh, names: set[str]) -> list[list[str]]:
    return [json.loads(text) for text in mesh.all_gather_text(json.dumps(sorted(names)))]


def _sum_partial(mesh: Mesh, registry: Registry, gradients: dict[str, Tensor]) -> None:
    """Sum gradients that are partial over a group, in place: one all-reduce for each group."""
    by_group: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):  # the same order on all ranks of a group
        for group in registry.entries[name].partial:
            if gradients[name].numel():
                by_group.setdefault(group, []).append(gradients[name])
    for group in sorted(by_group):
        parts = by_group[group]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=mesh.group(group))
        sums = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [total.view_as(part) for total, part in zip(sums, parts, strict=True)])


def build_native(
    config: Config,
    mesh: Mesh,
    plan: BatchPlan,
    stages: Sequence[nn.Module],
    full: Sequence[tuple[nn.Module, ...]],
    registry: Registry,
    activations: Sequence[Tensor],
    clock: GpuClock,
    objective: Objective = NEXT_TOKEN,
) -> NativeEngine:
    """The engine over `stages` (on the meta device), with memory for weights and optimizer but no values yet.

    Without a pipeline there is one stage, the whole model. `full` are those modules of each that compute in float32.
    `activations` are meta tensors like the outputs of every stage of the whole pipeline but the last; `clock` times
    the blocks. `objective` is what is minimised.
    Raises ValueError for an optimizer that cannot work on what a rank holds, and for buffers without values.
    """
    problem = undeclared(config, mesh.layout)
    if problem is not None:
        raise ValueError(problem)
    dtype = PRECISIONS[config.precision]
    weights = []
    for stage, modules in zip(stages, full, strict=True):
        weights.append(_store(config, mesh, plan, registry, stage, Precision(dtype, modules)))
        fill_buffers(stage, registry)
    mask = bool(config.data.document_mask)
    passes: ForwardBackward
    if mesh.layout.pp == 1:
        passes = GradientAccumulation(weights[0], plan, mesh.device, mask, objective)
    else:
        from stoker.parallel.pipeline import PipelineSchedule, Stage  # a second of imports that only pipelines need

        numbers = stages_of(mesh.coordinate.pp, mesh.layout.pp, config.parallel.stages_per_rank)
        held = [Stage(number, stage.module, stage) for number, stage in zip(numbers, weights, strict=True)]
        passes = PipelineSchedule(mesh, plan, held, config.parallel.schedule, mask, activations, objective)
    buffers, sequence = Buffers(mesh, registry, stages, biases(stages)), sequence_axis(config, mesh)
    return NativeEngine(config, mesh, passes, registry, weights, buffers, clock, objective, sequence)


def _store(
    config: Config, mesh: Mesh, plan: BatchPlan, registry: Registry, model: nn.Module, precision: Precision
) -> ShardingStrategy:
    if config.parallel.engine == "deepspeed" and not any(p.requires_grad for p in model.parameters()):
        return _frozen_store(config, mesh, model, precision)
    if config.parallel.engine == "deepspeed":
        from stoker.parallel.deepspeed_engine.strategy import (
            DeepSpeedStrategy,  # it imports DeepSpeed, which takes seconds
        )

        return DeepSpeedStrategy(config, mesh, plan, model, registry)
    offload = config.parallel.offload == "cpu"
    if mesh.layout.shards == 1:
        experts = {name for name, entry in registry.entries.items() if entry.view is View.EXPERTS}
        alike = mesh.group("expert_replicas") if experts else None
        return ReplicatedStrategy(model, mesh.device, precision, mesh.group("replicas"), offload, alike, experts)
    from stoker.parallel.sharded import ShardedStrategy  # half a second of imports that ZeRO 0 does not need

    return ShardedStrategy(model, mesh, precision, mesh.layout.zero, offload)


def _frozen_store(config: Config, mesh: Mesh, model: nn.Module, precision: Precision) -> ShardingStrategy:
    """For a pipeline stage without trained parameters, for which DeepSpeed makes no engine: every rank holds it."""
    store = ReplicatedStrategy(model, mesh.device, precision, None, config.parallel.offload == "cpu")
    replica, replicas = mesh.layout.place(mesh.rank, OF_TOKENS), mesh.layout.size(OF_TOKENS)
    store.held = {name: replace(held, replica=replica, replicas=replicas) for name, held in store.held.items()}
    return store
