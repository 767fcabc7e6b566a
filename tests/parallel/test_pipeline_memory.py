"""What a pipeline holds: gradients between micro-batches, activations, and what travels."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from stoker.conf.schema import Config
from stoker.parallel.sharding import ShardingStrategy
from tests import world
from tests.parallel.pipelines import Pipeline, Watched, pipeline_config, uneven_rows


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
                    held = {gradient.data_ptr(): gradient.nbytes for gradient in gradients if gradient is not None}
                    found += sum(held.values())  # since torch 2.15 the two are one
    return found


def gradients_held(configs: list[Config]) -> list[tuple[int, list[int], int]]:
    """On a rank, for each config: bytes of all float32 gradients of its stage, of the unreduced ones held before each
    backward, and of those left at the end.
    """
    found = []
    for config in configs:
        held: list[int] = []

        def watch(weights: ShardingStrategy, model: nn.Module, held: list[int] = held) -> ShardingStrategy:
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
        micro = rows[: config.batch.micro_size]
        received = torch.zeros(micro.tokens.numel(), config.model.hidden_size, requires_grad=True)
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
    """A user's function that keeps a tensor for backward without autograd."""

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
    """On a rank: the largest number of live tensors of the size of an activation before a backward, for each config."""
    most = []
    for config in configs:
        shape = (config.batch.micro_size * config.seq_len, config.model.hidden_size)  # type: ignore[operator]
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


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_memory_between_stages_does_not_grow_with_the_number_of_micro_batches(schedule: str) -> None:
    configs = [pipeline_config(schedule, rows=count, pp=4, layers=8) for count in (12, 24)]
    for few, many in world.run(tensors_alive, 4, configs, fresh=True):  # it freezes the collector
        assert many <= few + 3
