"""The engine named `fsdp`: Stoker's own, on torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conf.schema import Config
from parallel.layout import BatchPlan
from parallel.mesh import Mesh
from parallel.optimizer import LocalOptimizer
from parallel.registry import Registry
from parallel.rows import Rows
from parallel.shards import PARAMETER, Shard
from parallel.update import StepResult, agree
from parallel.weights import DTYPES, Weights


class NativeEngine:
    """`parallel.engine.Engine` over one of the two stores of weights."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        plan: BatchPlan,
        model: nn.Module,
        registry: Registry,
        weights: Weights,
    ) -> None:
        self._mesh, self._plan, self._model = mesh, plan, model
        self._registry, self._weights = registry, weights
        self._document_mask = config.data.document_mask
        self._clip_norm = config.clip_norm
        self._nominal_tokens = config.batch.rows * config.seq_len
        shapes = {name: entry.shape for name, entry in registry.entries.items()}
        self._optimizer = LocalOptimizer(config.optim, weights.tensors, shapes)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=mesh.device)

    def forward_backward(self, rows: Rows) -> None:
        size = self._plan.micro_rows
        for start in range(0, len(rows), size):
            micro = rows[start : start + size].to(self._mesh.device)
            self._weights.begin(last=start + size >= len(rows))
            loss = self._loss(micro)
            (loss / self._nominal_tokens).backward()
            self._loss_sum += loss.detach()
            self._tokens += micro.valid_tokens()

    def update(self, lr: float, votes: frozenset[str] = frozenset()) -> StepResult:
        gradients = self._weights.gradients()
        held = self._weights.held
        counted = [
            gradients[name]
            for index, name in enumerate(self._registry.entries)
            if held[name].counted_by(index) and gradients[name].numel()
        ]
        verdict = agree(
            self._mesh,
            counted,
            self._loss_sum,
            self._tokens,
            votes,
            nominal_tokens=self._nominal_tokens,
            clip_norm=self._clip_norm,
        )
        self._optimizer.step(gradients, lr, verdict.gradient_divisor, verdict.found_inf)
        self._weights.updated()
        self._loss_sum.zero_()
        self._tokens.zero_()
        return verdict.result

    def evaluate(self, rows: Rows) -> Tensor:
        total = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        with torch.no_grad():
            for start in range(0, len(rows), self._plan.micro_rows):
                micro = rows[start : start + self._plan.micro_rows].to(self._mesh.device)
                total += torch.stack([self._loss(micro).double(), micro.valid_tokens().double()])
        return total

    def shards(self) -> list[Shard]:
        tensors = [(name, PARAMETER, tensor) for name, tensor in self._weights.tensors.items()]
        tensors += [(name, f"optim.{key}", state) for name, key, state in self._optimizer.tensors()]
        return [
            shard
            for name, kind, tensor in tensors
            for shard in self._registry.shards(name, kind, self._weights.held[name], tensor)
        ]

    def shards_written(self) -> None:
        self._weights.updated()

    def state(self) -> dict[str, float]:
        return self._optimizer.scalars()

    def load_state(self, state: dict[str, float]) -> None:
        self._optimizer.load_scalars(state)

    def _loss(self, micro: Rows) -> Tensor:
        documents = micro.documents if self._document_mask else None
        return self._model(micro.tokens, micro.positions, documents, micro.labels)


def build_native(config: Config, mesh: Mesh, plan: BatchPlan, model: nn.Module, registry: Registry) -> NativeEngine:
    """The engine over `model` (on the meta device), with memory for weights and optimizer but no values yet."""
    dtype = DTYPES[config.precision]
    layout = mesh.layout
    weights: Weights
    if layout.dp_shard == 1:
        from parallel.replicated import ReplicatedWeights

        weights = ReplicatedWeights(model, mesh.device, dtype, mesh.group("dp_replicate"))
    else:
        from parallel.sharded import (
            ShardedWeights,
        )  # imports torch's FSDP: half a second that ZeRO 0 does not need

        weights = ShardedWeights(model, mesh, dtype, layout.zero)
    return NativeEngine(config, mesh, plan, model, registry, weights)
