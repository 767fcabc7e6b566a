"""The simplest engine that is right: the whole model on every rank, gradients all-reduced one by one after backward.

It exists to show that the conformance suite tests the protocol and not one implementation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.conf.schema import Config
from stoker.conf.targets import import_target
from stoker.parallel.batch import Batch
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import BatchPlan
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.optimizer import LocalOptimizer
from stoker.parallel.registry import LocalShard, whole_registry
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard, whole
from stoker.parallel.update import NO_FLAGS, StepFlags, StepResult, reduce_step


class ToyEngine:
    def __init__(self, config: Config, mesh: Mesh, plan: BatchPlan) -> None:
        self.config, self.mesh, self.plan = config, mesh, plan
        self.model: nn.Module = import_target(config.model.target)(
            config.model, whole_model(config.model.num_hidden_layers)
        )
        self.registry = whole_registry(self.model)
        self.parameters = dict(self.model.named_parameters())
        tensors = {name: parameter.data for name, parameter in self.parameters.items()}
        self.optimizer = LocalOptimizer(config.optim, tensors, self.registry.roles())
        initialize(self.shards(), self.model.initial, config.run.seed)  # type: ignore[arg-type]
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.float64)

    def forward_backward(self, rows: Batch, first_row: int | None = None) -> None:
        for start in range(0, len(rows), self.plan.micro_rows):
            micro = rows[start : start + self.plan.micro_rows]
            loss = self.model(micro.tokens, micro.positions, None, micro.labels)
            loss.backward()
            self.loss_sum += loss.detach()
            self.tokens += micro.valid_tokens()

    def update(self, lr: float, said: StepFlags = NO_FLAGS) -> StepResult:
        gradients = self.gradients()
        verdict = reduce_step(
            self.mesh,
            list(gradients.values()) if self.mesh.rank == 0 else [],
            self.loss_sum,
            self.tokens,
            said,
            loss_scale=torch.ones(()),
            nominal_count=1,
            grad_clip_norm=self.config.grad_clip_norm,
        )
        self.optimizer.step(gradients, lr, verdict.gradient_divisor, verdict.found_inf)
        self.model.zero_grad()
        self.loss_sum.zero_()
        self.tokens.zero_()
        return verdict.result

    def gradients(self) -> dict[str, Tensor]:
        gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        for gradient in gradients.values():
            dist.all_reduce(gradient)
        return gradients

    def gpu_seconds(self) -> float:
        return 0.0

    def evaluate(self, rows: Batch) -> Tensor:
        with torch.no_grad():
            loss = self.model(rows.tokens, rows.positions, None, rows.labels)
        return torch.stack([loss.double(), rows.valid_tokens().double()])

    def modules(self) -> list[nn.Module]:
        return [self.model]

    def shards(self) -> list[Shard]:
        tensors = [(name, PARAMETER, parameter.data) for name, parameter in self.parameters.items()]
        tensors += [(name, f"optim.{key}", state) for name, key, state in self.optimizer.tensors()]
        return [shard for tensor in tensors for shard in self.described(*tensor)]

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gradient_shards(self) -> list[Shard]:
        gradients = self.gradients()
        return [shard for name in gradients for shard in self.described(name, GRADIENT, gradients[name])]

    def without_gradient(self) -> list[str]:
        return sorted(name for name, gradient in self.gradients().items() if not gradient.any())

    def described(self, name: str, kind: str, tensor: Tensor) -> list[Shard]:
        held = LocalShard((whole(tuple(tensor.shape)),), self.mesh.rank, self.mesh.layout.world)
        return list(self.registry.shards(name, kind, held, tensor))

    def shards_written(self) -> None:
        pass

    def state(self) -> dict[str, float]:
        return self.optimizer.scalars()

    def load_state(self, state: dict[str, float]) -> None:
        self.optimizer.load_scalars(state)
