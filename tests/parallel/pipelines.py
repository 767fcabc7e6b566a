"""Pipelines for tests: the passes and the stores of weights that the native engine builds, without the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.conf.schema import BatchConfig, Config, ModelConfig, ParallelConfig
from stoker.conf.targets import import_target
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import BatchPlan, batch_plan, layout_of
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.parallel.model import Part, whole_model
from stoker.parallel.pipeline import PipelineSchedule, Stage
from stoker.parallel.registry import Registry, whole_registry
from stoker.parallel.replicated import ReplicatedStrategy
from stoker.parallel.sharded import ShardedStrategy
from stoker.parallel.sharding import Precision, ShardingStrategy
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.parallel.stages import costs_of, parts, stages_of
from tests.parallel.reference import VOCABULARY, global_rows, small_config

SCHEDULES = ("gpipe", "1f1b", "interleaved")
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
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
    )
    stages_per_rank = 2 if schedule == "interleaved" else 1
    parallel = ParallelConfig(pp=pp, zero=zero, schedule=schedule, stages_per_rank=stages_per_rank)
    config = small_config(model=model, batch=BatchConfig(size=rows, micro_size=micro), parallel=parallel, **changes)
    config.data.document_mask = True
    return config


def build(config: Config, part: Part) -> nn.Module:
    return import_target(config.model.target)(config.model, part)


def build_on_meta(config: Config, part: Part) -> nn.Module:
    with torch.device("meta"):
        return build(config, part)


def fill(config: Config, model: nn.Module, registry: Registry, weights: ShardingStrategy | None = None) -> None:
    """Initial weights by name, in the model or in what a store holds of it."""
    if weights is None:
        shards = [
            shard
            for name, parameter in model.named_parameters()
            for piece in registry.entries[name].pieces
            for shard in [Shard(name, PARAMETER, tuple(parameter.shape), piece.global_chunk, parameter.detach(), 0, 1)]
        ]
    else:
        shards = described(registry, weights, PARAMETER, weights.tensors)
    initialize(shards, model.initial, config.run.seed)  # type: ignore[arg-type]


def described(registry: Registry, weights: ShardingStrategy, kind: str, tensors: dict[str, Tensor]) -> list[Shard]:
    return [
        replace(shard, data=shard.data if kind == PARAMETER else shard.data.clone())
        for name, tensor in tensors.items()
        for shard in registry.shards(name, kind, weights.held[name], tensor)
    ]


class Pipeline:
    """A rank's part of `config`: what the native engine builds, without the engine."""

    def __init__(
        self,
        config: Config,
        wrap: Callable[[ShardingStrategy, nn.Module], ShardingStrategy] = lambda weights, _: weights,
    ):
        self.config = config
        layout = layout_of(config, dist.get_world_size())
        self.mesh: Mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
        self.plan: BatchPlan = batch_plan(config, layout)
        per_rank = config.parallel.stages_per_rank
        whole = build_on_meta(config, whole_model(config.model.num_hidden_layers))
        costs = costs_of(whole, lambda part: build_on_meta(config, part))  # type: ignore[arg-type]
        every = parts(costs, layout.pp * per_rank)
        self.stages, self.registries = [], []
        for number in stages_of(self.mesh.coordinate.pp, layout.pp, per_rank):
            model = build_on_meta(config, every[number])
            registry = whole_registry(model)
            weights = self.store(model)
            model.rebuild_buffers()  # type: ignore[operator]
            fill(config, model, registry, weights)
            weights.on_optimizer_step()
            self.stages.append(Stage(number, model, wrap(weights, model)))
            self.registries.append(registry)
        tokens = self.plan.micro_rows * config.seq_len
        activation = torch.empty(tokens, config.model.hidden_size, dtype=PRECISIONS[config.precision], device="meta")
        self.passes = PipelineSchedule(
            self.mesh, self.plan, self.stages, config.parallel.schedule, config.data.document_mask, activation
        )

    def store(self, model: nn.Module) -> ShardingStrategy:
        precision, layout = Precision(PRECISIONS[self.config.precision]), self.mesh.layout
        if layout.dp_shard == 1:
            return ReplicatedStrategy(model, self.mesh.device, precision, self.mesh.group("dp_replicate"))
        return ShardedStrategy(model, self.mesh, precision, layout.zero)

    def rows(self, rows: Batch) -> Batch:
        """This rank's."""
        return rows[self.mesh.dp_rank :: self.mesh.layout.dp]

    def train(self, rows: Batch, factor: float = FACTOR) -> Tensor:
        return self.passes.train(self.rows(rows), torch.tensor(factor))

    def gradients(self) -> dict[int, list[Shard]]:
        """By stage."""
        return {
            stage.number: described(registry, stage.weights, GRADIENT, stage.weights.gradients())
            for stage, registry in zip(self.stages, self.registries, strict=True)
        }

    def on_optimizer_step(self) -> None:
        for stage in self.stages:
            stage.weights.on_optimizer_step()


def uneven_rows(config: Config, step: int = 1) -> Batch:
    """Rows of very unequal numbers of valid tokens; of two data-parallel ranks the second has none at all."""
    rows = global_rows(config, step)
    rows.labels[1::2] = IGNORE_INDEX
    return rows


class Watched:
    """Weights that call `look(last)` before every backward."""

    def __init__(self, weights: ShardingStrategy, look: Callable[[bool], None]) -> None:
        self._weights, self._look = weights, look
        self.held, self.tensors = weights.held, weights.tensors

    def on_backward_start(self, *, is_last: bool) -> None:
        self._look(is_last)
        self._weights.on_backward_start(is_last=is_last)

    def gradients(self) -> dict[str, Tensor]:
        return self._weights.gradients()

    def on_optimizer_step(self) -> None:
        self._weights.on_optimizer_step()
