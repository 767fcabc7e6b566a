"""The passes through a pipeline, with the stores of weights but without an engine, against one process."""

from __future__ import annotations

import gc
import itertools
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import BatchConfig, Config, ModelConfig, ParallelConfig
from conf.targets import import_target
from parallel.initialize import initialize
from parallel.layout import BatchPlan, batch_plan, layout_of
from parallel.mesh import Mesh, mesh_over_default_group
from parallel.model import Part, whole_model
from parallel.pipeline import PipelinePasses, Ring, Stage
from parallel.registry import Registry, uncut
from parallel.replicated import ReplicatedWeights
from parallel.rows import IGNORE, Rows
from parallel.sharded import ShardedWeights
from parallel.shards import GRADIENT, PARAMETER, Shard
from parallel.stages import costs_of, parts, stages_of
from parallel.weights import DTYPES, Precision, Weights
from tests import world
from tests.parallel.reference import VOCABULARY, assemble, global_rows, normwise, small_config

FACTOR = 1 / 64


def pipeline_config(
    schedule: str = "1f1b",
    micro: int = 1,
    rows: int = 16,
    pp: int = 2,
    zero: int = 0,
    tied: bool = False,
    layers: int = 4,
    **changes: Any,
) -> Config:
    model = ModelConfig(
        vocab_size=VOCABULARY, width=32, layers=layers, heads=4, kv_heads=2, hidden=48, tie_embeddings=tied
    )
    stages_per_rank = 2 if schedule == "interleaved" else 1
    parallel = ParallelConfig(pp=pp, zero=zero, schedule=schedule, stages_per_rank=stages_per_rank)
    config = small_config(model=model, batch=BatchConfig(rows=rows, micro=micro), parallel=parallel, **changes)
    config.data.document_mask = True
    return config


def build(config: Config, part: Part) -> nn.Module:
    return import_target(config.model.target)(config.model, part)


def build_on_meta(config: Config, part: Part) -> nn.Module:
    with torch.device("meta"):
        return build(config, part)


def fill(config: Config, model: nn.Module, registry: Registry, weights: Weights | None = None) -> None:
    """Initial weights by name, in the model or in what a store holds of it."""
    if weights is None:
        shards = [
            shard
            for name, parameter in model.named_parameters()
            for piece in registry.entries[name].pieces
            for shard in [Shard(name, PARAMETER, tuple(parameter.shape), piece.world, parameter.detach(), 0, 1)]
        ]
    else:
        shards = described(registry, weights, PARAMETER, weights.tensors)
    initialize(shards, model.initial, config.run.seed)  # type: ignore[arg-type]


def described(registry: Registry, weights: Weights, kind: str, tensors: dict[str, Tensor]) -> list[Shard]:
    return [
        replace(shard, data=shard.data if kind == PARAMETER else shard.data.clone())
        for name, tensor in tensors.items()
        for shard in registry.shards(name, kind, weights.held[name], tensor)
    ]


class Pipeline:
    """A rank's part of `config`: what the native engine builds, without the engine."""

    def __init__(self, config: Config, wrap: Callable[[Weights, nn.Module], Weights] = lambda weights, _: weights):
        self.config = config
        layout = layout_of(config, dist.get_world_size())
        self.mesh: Mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
        self.plan: BatchPlan = batch_plan(config, layout)
        per_rank = config.parallel.stages_per_rank
        whole = build_on_meta(config, whole_model(config.model.layers))
        costs = costs_of(whole, lambda part: build_on_meta(config, part))  # type: ignore[arg-type]
        every = parts(costs, layout.pp * per_rank)
        self.stages, self.registries = [], []
        for number in stages_of(self.mesh.at.pp, layout.pp, per_rank):
            model = build_on_meta(config, every[number])
            registry = uncut(model)
            weights = self.store(model)
            model.rebuild_buffers()  # type: ignore[operator]
            fill(config, model, registry, weights)
            weights.updated()
            self.stages.append(Stage(number, model, wrap(weights, model)))
            self.registries.append(registry)
        tokens = self.plan.micro_rows * config.seq_len
        activation = torch.empty(tokens, config.model.width, dtype=DTYPES[config.precision], device="meta")
        self.passes = PipelinePasses(
            self.mesh, self.plan, self.stages, config.parallel.schedule, config.data.document_mask, activation
        )

    def store(self, model: nn.Module) -> Weights:
        precision, layout = Precision(DTYPES[self.config.precision]), self.mesh.layout
        if layout.dp_shard == 1:
            return ReplicatedWeights(model, self.mesh.device, precision, self.mesh.group("dp_replicate"))
        return ShardedWeights(model, self.mesh, precision, layout.zero)

    def rows(self, rows: Rows) -> Rows:
        """This rank's."""
        return rows[self.mesh.dp_rank :: self.mesh.layout.dp]

    def train(self, rows: Rows, factor: float = FACTOR) -> Tensor:
        return self.passes.train(self.rows(rows), torch.tensor(factor))

    def gradients(self) -> dict[int, list[Shard]]:
        """By stage."""
        return {
            stage.number: described(registry, stage.weights, GRADIENT, stage.weights.gradients())
            for stage, registry in zip(self.stages, self.registries, strict=True)
        }

    def updated(self) -> None:
        for stage in self.stages:
            stage.weights.updated()


def uneven_rows(config: Config, step: int = 1) -> Rows:
    """Rows of very unequal numbers of valid tokens; of two data-parallel ranks the second has none at all."""
    rows = global_rows(config, step)
    rows.labels[1::2] = IGNORE
    return rows


@dataclass(frozen=True)
class Measured:
    """What one rank saw: the sum of the losses, gradients by stage, and the evaluation of twice five rows."""

    loss: float
    gradients: dict[int, list[Shard]]
    evaluated: list[float] = field(default_factory=list)


def measure(configs: list[Config]) -> list[Measured]:
    """On a rank: twice the same step with an evaluation between, for each config."""
    found = []
    for config in configs:
        pipeline = Pipeline(config)
        rows = uneven_rows(config)
        first = pipeline.train(rows)
        gradients = pipeline.gradients()
        pipeline.updated()
        evaluated = [float(pipeline.passes.evaluate(rows[:count])) for count in (1, 5, len(rows))]
        again = pipeline.train(rows)
        for number, shards in pipeline.gradients().items():
            for one, other in zip(gradients[number], shards, strict=True):
                assert torch.equal(one.data, other.data), f"{one.name} is another after an evaluation"
        assert torch.equal(first, again)
        assert first.dtype == torch.float64 and first.shape == ()
        found.append(Measured(first.item(), gradients, evaluated))
    return found


def one_process(config: Config) -> tuple[nn.Module, float, dict[str, Tensor]]:
    model = build(config, whole_model(config.model.layers))
    fill(config, model, uncut(model))
    rows = uneven_rows(config)
    loss = loss_of(model, config, rows)
    (loss * FACTOR).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return model, loss.item(), gradients


def loss_of(model: nn.Module, config: Config, rows: Rows) -> Tensor:
    return model(rows.tokens, rows.positions, rows.documents if config.data.document_mask else None, rows.labels)


def gathered(measured: list[Measured]) -> dict[str, Tensor]:
    """Whole gradients; those of tied embeddings, which the first and the last stage have a share of, summed."""
    found: dict[str, Tensor] = {}
    for number in {number for rank in measured for number in rank.gradients}:
        shards = [rank.gradients[number] for rank in measured if number in rank.gradients]
        for name, gradient in assemble(shards, GRADIENT).items():
            found[name] = found[name] + gradient if name in found else gradient
    return found


def assert_parity(configs: list[Config], ranks: int, tolerance: float = 1e-5) -> None:
    for config, measured in zip(configs, zip(*world.run(measure, ranks, configs), strict=True), strict=True):
        where = f"{config.parallel}, {config.batch}, tied {config.model.tie_embeddings}"
        model, loss, gradients = one_process(config)
        last = config.parallel.pp - 1
        per_stage = ranks // config.parallel.pp
        assert all(rank.loss == 0 for rank in measured[: last * per_stage]), where
        assert sum(rank.loss for rank in measured) == pytest.approx(loss, rel=tolerance), where
        found = gathered(list(measured))
        assert found.keys() == gradients.keys(), where
        for name, gradient in gradients.items():
            assert normwise(found[name], gradient) < tolerance, f"{where}: {name}"
        rows = uneven_rows(config)
        for index, count in enumerate((1, 5, len(rows))):
            with torch.no_grad():
                expected = loss_of(model, config, rows[:count]).item()
            for rank in measured[: last * per_stage]:
                assert rank.evaluated[index] == 0, where
            for rank in measured[last * per_stage :]:
                assert rank.evaluated[index] == pytest.approx(expected, rel=tolerance), where


SCHEDULES = ("gpipe", "1f1b", "interleaved")


def test_two_stages_compute_what_one_process_computes() -> None:
    configs = [
        pipeline_config(schedule, micro, tied=tied)
        for schedule in SCHEDULES
        for micro in (1, 2, 4)
        for tied in (False, True)
    ]
    assert_parity(configs, 2)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_stages_over_two_data_parallel_ranks_compute_what_one_process_computes(zero: int) -> None:
    configs = [
        pipeline_config(schedule, micro, zero=zero, tied=tied)
        for schedule in SCHEDULES
        for micro in (1, 2)
        for tied in (False, True)
    ]
    assert_parity(configs, 4)


def test_four_stages_compute_what_one_process_computes() -> None:
    configs = [
        pipeline_config(schedule, micro, tied=tied, pp=4, layers=8)
        for schedule in SCHEDULES
        for micro, tied in ((1, True), (2, False))
    ]
    assert_parity(configs, 4)


def test_a_users_own_model_passes_through_a_pipeline() -> None:
    model = ModelConfig(target="tests.toy:build", vocab_size=VOCABULARY, width=18, layers=4)
    configs = [pipeline_config(schedule) for schedule in SCHEDULES]
    for config in configs:
        config.model = model
    assert_parity(configs, 2)


def test_fewer_micro_batches_than_stages_compute_the_same_where_they_are_not_refused() -> None:
    counts = [("gpipe", 1), ("gpipe", 3), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3)]
    assert_parity([pipeline_config(name, 4, rows=4 * n, pp=4, layers=8) for name, n in counts], 4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_computes_about_the_same(zero: int) -> None:
    configs = [pipeline_config(schedule, zero=zero, precision="bf16") for schedule in SCHEDULES]
    assert_parity(configs, 4, tolerance=3e-2)


class Watched:
    """Weights that call `look(last)` before every backward."""

    def __init__(self, weights: Weights, look: Callable[[bool], None]) -> None:
        self._weights, self._look = weights, look
        self.held, self.tensors = weights.held, weights.tensors

    def begin(self, *, last: bool) -> None:
        self._look(last)
        self._weights.begin(last=last)

    def gradients(self) -> dict[str, Tensor]:
        return self._weights.gradients()

    def updated(self) -> None:
        self._weights.updated()


def full_gradient_bytes(model: nn.Module) -> int:
    """Bytes of gradients that `fully_shard` holds before it has reduced and scattered them."""
    found = 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    accumulated = parameter.unsharded_accumulated_grad
                    unreduced = getattr(parameter, "_unsharded_param", None)
                    gradients = [accumulated, None if unreduced is None else unreduced.grad]
                    found += sum(gradient.nbytes for gradient in gradients if gradient is not None)
    return found


def gradients_held(configs: list[Config]) -> list[tuple[int, list[int], int]]:
    """On a rank, for each config: bytes of all float32 gradients of its stage, of the unreduced ones held before each
    backward, and of those left at the end.
    """
    found = []
    for config in configs:
        held: list[int] = []

        def watch(weights: Weights, model: nn.Module, held: list[int] = held) -> Weights:
            return Watched(weights, lambda _: held.append(full_gradient_bytes(model)))

        pipeline = Pipeline(config, watch)
        (stage,) = pipeline.stages
        whole = 4 * sum(parameter.numel() for parameter in stage.model.parameters())
        pipeline.train(uneven_rows(config))
        found.append((whole, held, full_gradient_bytes(stage.model)))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_2_and_3_hold_no_whole_gradients_between_micro_batches_but_zero_1_does(precision: str) -> None:
    configs = [pipeline_config("1f1b", 2, zero=zero, precision=precision) for zero in (1, 2, 3)]
    for rank in world.run(gradients_held, 4, configs):
        for zero, (whole, held, left) in enumerate(rank, start=1):
            assert held == ([0, whole, whole, whole] if zero == 1 else [0, 0, 0, 0]), zero
            assert left == 0


class Saved:
    """A tensor that autograd keeps for backward."""

    alive = 0  # bytes
    most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that kept its graph, which keeps this, would never go
        Saved.alive += tensor.nbytes
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.tensor.nbytes


def activations_held(config: Config) -> tuple[int, int, int]:
    """On a rank that holds one stage: bytes that one micro-batch keeps for backward, the most, and what is left."""
    pipeline = Pipeline(config)
    (stage,) = pipeline.stages
    rows = uneven_rows(config)
    pipeline.train(rows)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        micro = rows[: config.batch.micro]
        received = torch.zeros(micro.tokens.numel(), config.model.width, requires_grad=True)
        output = stage.model(received if stage.number else micro.tokens, micro.positions, micro.documents, micro.labels)
        one = Saved.alive
        del output, received
        Saved.most = 0
        pipeline.train(rows)
    return one, Saved.most, Saved.alive


def test_1f1b_holds_the_activations_of_as_many_micro_batches_as_stages_follow_and_gpipe_of_all() -> None:
    for stage, (one, most, left) in enumerate(world.run(activations_held, 4, pipeline_config("1f1b", rows=12, pp=4))):
        assert most == pytest.approx((4 - stage) * one, rel=1e-3), stage
        assert left == 0
    for one, most, left in world.run(activations_held, 2, pipeline_config("gpipe", rows=6)):
        assert most == pytest.approx(6 * one, rel=1e-3)
        assert left == 0


class Kept(torch.autograd.Function):
    """A user's own function that keeps something for backward without telling autograd."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = torch.empty(0)
        Kept.alive.add(ctx.kept)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def graphs_held(config: Config) -> list[int]:
    """On a rank: how many micro-batches' graphs are there before each backward."""
    alive: list[int] = []
    pipeline = Pipeline(config, lambda weights, _: Watched(weights, lambda _: alive.append(len(Kept.alive))))
    for stage in pipeline.stages:
        stage.model.register_forward_hook(lambda *called: Kept.apply(called[-1]))
    pipeline.train(uneven_rows(config))
    return alive


def test_no_graph_outlives_its_backward() -> None:
    first, last = world.run(graphs_held, 2, pipeline_config("1f1b", rows=4))
    assert first == [2, 2, 2, 1]
    assert last == [1, 1, 1, 1]


def tensors_alive(configs: list[Config]) -> list[int]:
    """On a rank: the most tensors of the size of an activation that lived before a backward, for each config."""
    most = []
    for config in configs:
        shape = (config.batch.micro * config.seq_len, config.model.width)  # type: ignore[operator]
        alive: list[int] = []

        def look(_: bool, shape: tuple[int, ...] = shape, alive: list[int] = alive) -> None:
            found = [thing for thing in gc.get_objects() if type(thing) is Tensor and tuple(thing.shape) == shape]
            alive.append(len({thing.untyped_storage().data_ptr() for thing in found if not thing.is_meta}))

        pipeline = Pipeline(config, lambda weights, _, look=look: Watched(weights, look))  # type: ignore[misc]
        gc.freeze()  # what exists by now is not looked through
        pipeline.train(uneven_rows(config))
        most.append(max(alive))
        deadline = time.monotonic() + 10
        while alive[-1] and time.monotonic() < deadline:  # gloo lets go of what was sent a little after the wait
            look(True)
        assert alive[-1] == 0, f"{alive[-1]} activations outlive the step"
    return most


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_what_lives_between_stages_does_not_grow_with_the_number_of_micro_batches(schedule: str) -> None:
    configs = [pipeline_config(schedule, rows=count, pp=4, layers=8) for count in (12, 24)]
    for few, many in world.run(tensors_alive, 4, configs):
        assert many <= few + 3


class Counted(TorchDispatchMode):
    """Counts what waits for the device: a value read by the host."""

    reads = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            Counted.reads += 1
        return operation(*args, **(kwargs or {}))


def passes_counted(config: Config) -> tuple[list[int], list[list[bool]], int]:
    """On a rank: forwards of each of its stages in train, train, evaluate, train; and of the last of these what each
    stage's weights were told, and how many values the host read.
    """
    told: list[list[bool]] = []

    def watch(weights: Weights, _: nn.Module) -> Weights:
        told.append([])
        return Watched(weights, told[-1].append)

    pipeline = Pipeline(config, watch)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for stage in pipeline.stages:
        stage.model.register_forward_pre_hook(count)
    rows = uneven_rows(config)
    found = []
    for step in (pipeline.train, pipeline.train, pipeline.passes.evaluate):
        step(rows[:-1] if step == pipeline.passes.evaluate else rows)
        found.append(calls // len(pipeline.stages))
    for lasts in told:
        lasts.clear()
    with Counted():
        pipeline.train(rows)
    return [*found, calls // len(pipeline.stages)], told, Counted.reads


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_micro_batch_passes_once_and_the_host_reads_nothing(schedule: str) -> None:
    for forwards, told, reads in world.run(passes_counted, 2, pipeline_config(schedule, 2)):
        assert forwards == [8, 16, 24, 32]
        assert told == [[False] * 7 + [True]] * (2 if schedule == "interleaved" else 1)
        assert reads == 0


def initial(config: Config) -> dict[str, Tensor]:
    """On a rank: what its stages start from."""
    return {name: tensor for stage in Pipeline(config).stages for name, tensor in stage.weights.tensors.items()}


def test_stages_start_from_the_weights_of_one_process_and_no_two_from_the_same() -> None:
    config = pipeline_config("interleaved", tied=True)
    whole = build(config, whole_model(config.model.layers))
    fill(config, whole, uncut(whole))
    first, last = world.run(initial, 2, config)
    assert torch.equal(first["embedding.weight"], last["embedding.weight"])
    for name, parameter in whole.named_parameters():
        assert torch.equal((first | last)[name], parameter), name
    matrices = [(name, tensor) for name, tensor in (first | last).items() if tensor.ndim == 2]
    for (one, a), (other, b) in itertools.combinations(matrices, 2):
        assert a.shape != b.shape or not torch.equal(a, b), f"{one} and {other} start equal"


def poisoned(config: Config) -> tuple[float, bool]:
    """On a rank: the loss, and whether all gradients are finite, when the last stage has an infinite weight."""
    pipeline = Pipeline(config)
    if pipeline.mesh.at.pp == 1:
        next(iter(pipeline.stages[-1].weights.tensors.values())).fill_(float("inf"))
        pipeline.updated()
    loss = pipeline.train(uneven_rows(config)).item()
    gradients = [gradient for stage in pipeline.stages for gradient in stage.weights.gradients().values()]
    return loss, all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_finite_passes_through_as_numbers(schedule: str) -> None:
    first, last = world.run(poisoned, 2, pipeline_config(schedule))
    assert first[0] == 0 and not math.isfinite(last[0])
    assert not first[1] and not last[1]


def in_another_dtype(config: Config, evaluate: bool) -> None:
    """On a rank: what leaves a stage is float64."""
    pipeline = Pipeline(config)
    for stage in pipeline.stages:
        stage.model.register_forward_hook(lambda *called: called[-1].double())
    if evaluate:
        pipeline.passes.evaluate(uneven_rows(config))
    else:
        pipeline.train(uneven_rows(config))


@pytest.mark.parametrize("evaluate", [False, True])
def test_activations_of_another_dtype_than_announced_are_an_error_and_no_hang(evaluate: bool) -> None:
    message = r"gave activations \(torch.Size\(\[12, 32\]\), torch.float64\), not .*torch.float32"
    with pytest.raises(AssertionError, match=message):
        world.run(in_another_dtype, 2, pipeline_config(), evaluate)


def adapted(config: Config, frozen_below: int) -> dict[int, list[str]]:
    """On a rank: names with gradients by stage, when the stages before `frozen_below` are not trained."""

    class Adapted(Pipeline):
        def store(self, model: nn.Module) -> Weights:
            if not any(int(number) >= frozen_below for number in model.blocks()):  # type: ignore[operator]
                model.requires_grad_(False)
            return super().store(model)

    pipeline = Adapted(config)
    pipeline.train(uneven_rows(config))
    return {
        stage.number: [name for name, gradient in stage.weights.gradients().items() if gradient.any()]
        for stage in pipeline.stages
    }


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_stages_that_are_not_trained_send_and_receive_all_the_same(schedule: str) -> None:
    stages = 4 if schedule == "interleaved" else 2
    found: dict[int, list[str]] = {}
    for rank in world.run(adapted, 4, pipeline_config(schedule, zero=2), 4 // stages):
        found |= rank
    assert found[0] == []
    assert all(found[number] for number in range(1, stages))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 20))
def test_the_ring_takes_every_micro_batch_through_every_stage_without_a_pause(
    ranks: int, turns: int, micro_batches: int
) -> None:
    rings = [Ring(rank, ranks, ranks * turns, micro_batches) for rank in range(ranks)]
    done = {}
    for ring in rings:
        assert ring.ticks == rings[0].ticks
        for tick in range(ring.ticks):
            if work := ring.work(tick):
                assert work not in done and work[0] % ranks == ring.rank
                done[work] = tick
        assert ring.work(-1) is None and ring.work(ring.ticks) is None
    assert set(done) == {(stage, micro) for stage in range(ranks * turns) for micro in range(micro_batches)}
    assert all(done[stage, micro] == done[stage - 1, micro] + 1 for stage, micro in done if stage)
    assert not done or max(done.values()) == rings[0].ticks - 1
