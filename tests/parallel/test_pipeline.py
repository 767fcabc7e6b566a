"""The passes through a pipeline, with the stores of weights but without an engine, against one process."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import Config, ModelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.model import whole_model
from stoker.parallel.pipeline import Ring, _TorchStage
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import ShardingStrategy
from stoker.parallel.shards import GRADIENT, Shard
from tests import world
from tests.extent import FULL, some
from tests.parallel.pipelines import FACTOR, SCHEDULES, Pipeline, Watched, build, fill, pipeline_config, uneven_rows
from tests.parallel.reference import VOCABULARY, assemble, normwise


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
        pipeline.on_optimizer_step()
        evaluated = [float(pipeline.passes.evaluate(rows[:count])) for count in (1, 5, len(rows))]
        again = pipeline.train(rows)
        for number, shards in pipeline.gradients().items():
            for one, other in zip(gradients[number], shards, strict=True):
                assert torch.equal(one.data, other.data), f"{one.name} is another after an evaluation"
        assert torch.equal(first, again)
        assert first.dtype == torch.float64 and first.shape == (1,)
        found.append(Measured(first.item(), gradients, evaluated))
    return found


def one_process(config: Config) -> tuple[nn.Module, float, dict[str, Tensor]]:
    model = build(config, whole_model(config.model.num_hidden_layers))
    fill(config, model, whole_registry(model))
    rows = uneven_rows(config)
    loss = loss_of(model, config, rows)
    (loss * FACTOR).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return model, loss.item(), gradients


def loss_of(model: nn.Module, config: Config, rows: Batch) -> Tensor:
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
        where = f"{config.parallel}, {config.batch}, tied {config.model.tie_word_embeddings}"
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


@pytest.mark.long
def test_two_stages_compute_what_one_process_computes() -> None:
    configs = [
        pipeline_config(schedule, micro, tied=tied)
        for schedule in SCHEDULES
        for micro in (1, 2, 4)
        for tied in (False, True)
    ]
    assert_parity(configs, 2)


@pytest.mark.long
@pytest.mark.parametrize("zero", some([2, 3, 0, 1], 2))
def test_two_stages_over_two_data_parallel_ranks_compute_what_one_process_computes(zero: int) -> None:
    configs = [
        pipeline_config(schedule, micro, zero=zero, tied=tied)
        for number, (micro, schedule) in enumerate(itertools.product((1, 2), SCHEDULES))
        for tied in ((False, True) if FULL else ((number + zero) % 2 == 0,))
    ]
    assert_parity(configs, 4)


@pytest.mark.long
def test_four_stages_compute_what_one_process_computes() -> None:
    configs = [
        pipeline_config(schedule, micro, tied=tied, pp=4, layers=8)
        for schedule in SCHEDULES
        for micro, tied in ((1, True), (2, False))
    ]
    assert_parity(configs, 4)


def test_a_users_model_runs_in_a_pipeline() -> None:
    model = ModelConfig(target="tests.toy:build", vocab_size=VOCABULARY, hidden_size=18, num_hidden_layers=4)
    configs = [pipeline_config(schedule) for schedule in SCHEDULES]
    for config in configs:
        config.model = model
    assert_parity(configs, 2)


@pytest.mark.long
def test_fewer_micro_batches_than_stages_compute_the_same_where_they_are_not_refused() -> None:
    counts = [("gpipe", 1), ("gpipe", 3), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3)]
    assert_parity([pipeline_config(name, 4, rows=4 * n, pp=4, layers=8) for name, n in counts], 4)


@pytest.mark.long
@pytest.mark.parametrize("zero", some([2, 3, 0, 1], 2))
def test_bf16_computes_about_the_same(zero: int) -> None:
    configs = [pipeline_config(schedule, zero=zero, precision="bf16") for schedule in SCHEDULES]
    assert_parity(configs, 4, tolerance=3e-2)


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

    def watch(weights: ShardingStrategy, _: nn.Module) -> ShardingStrategy:
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
    whole = build(config, whole_model(config.model.num_hidden_layers))
    fill(config, whole, whole_registry(whole))
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
    if pipeline.mesh.coordinate.pp == 1:
        next(iter(pipeline.stages[-1].weights.tensors.values())).fill_(float("inf"))
        pipeline.on_optimizer_step()
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
    message = r"pipeline stage \d returned activations \(\(12, 32\), torch.float64\), but .*torch.float32"
    with pytest.raises(AssertionError, match=message):
        world.run(in_another_dtype, 2, pipeline_config(), evaluate)


def adapted(config: Config, frozen_below: int) -> dict[int, list[str]]:
    """On a rank: names with gradients by stage, when the stages before `frozen_below` are not trained."""

    class Adapted(Pipeline):
        def store(self, model: nn.Module) -> ShardingStrategy:
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


def test_a_buffer_that_torch_allocates_itself_is_left_to_it() -> None:
    """As torch 2.15 does: it refuses to receive into a buffer that is there already."""

    class Theirs:
        buffer: Tensor | None = None

    class Owned(Theirs):
        def allocate_buffer(self) -> None: ...

    stage = _TorchStage.__new__(_TorchStage)
    stage.device = torch.device("cpu")
    before, since = Theirs(), Owned()
    stage._allocate((before, since), torch.empty(3, 2))
    assert before.buffer is not None and before.buffer.shape == (3, 2) and since.buffer is None


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
