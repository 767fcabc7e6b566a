"""The other side of a comparison: training loops as one would write them by hand, with torch only.

`fully_shard` with the flags of a ZeRO stage (`replicate` for stage 0), bf16 compute over fp32 parameters, gradient
clipping, fused AdamW; where tp > 1 `parallelize_module` on DTensors with sequence parallelism and `loss_parallel`, as
torch's tutorial and torchtitan write it. The blocks are Stoker's decoder blocks; embedding and loss are torch's
if `torch_ends` is set.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils import checkpoint

from stoker.conf.schema import Config
from stoker.models.decoder import build
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.registry import LocalShard, whole_registry
from stoker.parallel.shards import PARAMETER, whole


class HandWritten:
    """See `ranks.Side`. The layout may have tp and data parallelism, no pipeline."""

    def __init__(self, config: Config, mesh: Mesh, torch_ends: bool = False) -> None:
        layout = mesh.layout
        assert layout.pp == 1 and layout.dp_replicate in (1, layout.dp)
        self._config, self._device, self._plan = config, mesh.device, batch_plan(config, layout)
        self._tp, self._world = layout.tp, layout.world
        self._mesh = init_device_mesh(mesh.device.type, (layout.dp, layout.tp), mesh_dim_names=("dp", "tp"))
        if layout.tp > 1:
            self._mesh._flatten()  # so that the gradient's norm is one reduction
        self.net = model = _initialised(config).to(mesh.device)
        if torch_ends or layout.tp > 1:
            _put_torch_ends(model, compiled=config.compile and layout.tp == 1)
        if layout.tp > 1:
            _parallelise(model, self._mesh["tp"])
        for block in model.layers.values():
            _recompute(block, config.activation_checkpointing)
            if config.compile:
                block.forward = torch.compile(block.forward)

        dtype = None if config.precision == "fp32" else PRECISIONS[config.precision]
        self._zero = config.parallel.zero if layout.dp > 1 else 1  # a single rank need not reshard
        # Inputs of blocks are in `dtype` but for the tables of rotary embedding, which stay in fp32 as in Stoker.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        shard = functools.partial(
            fully_shard, mesh=self._mesh["dp"], mp_policy=policy, reshard_after_forward=self._zero == 3
        )
        if self._zero == 0:
            shard = functools.partial(replicate, mesh=self._mesh["dp"], mp_policy=policy)
        for block in model.layers.values():
            shard(block)
        shard(model)
        self._parameters = list(model.parameters())
        optim = config.optim
        self._optimizer = torch.optim.AdamW(
            self._parameters, optim.lr, (optim.betas[0], optim.betas[1]), optim.eps, optim.weight_decay, fused=True
        )
        self._loss = torch.zeros((), device=mesh.device)
        self._norm = torch.zeros((), device=mesh.device)

    def step(self, rows: Batch) -> None:
        rows = rows.to(self._device)
        size, net = self._plan.micro_rows, self.net
        self._loss = torch.zeros((), device=self._device)
        for start in range(0, len(rows), size):
            last = start + size >= len(rows)
            net.set_requires_gradient_sync(last or self._zero >= 2)
            net.set_reshard_after_backward(last or self._zero == 3)
            net.set_is_last_backward(last)
            micro = rows[start : start + size]
            with loss_parallel() if self._tp > 1 else contextlib.nullcontext():
                loss = net(micro.tokens, micro.positions, None, micro.labels) / rows.labels.numel()
                loss.backward()
            self._loss += _whole(loss.detach())
        self._norm = nn.utils.clip_grad_norm_(self._parameters, self._config.grad_clip_norm or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def result(self) -> tuple[float, float]:
        loss = self._loss.clone()
        dist.all_reduce(loss)
        return loss.item() / self._world, _whole(self._norm).item()


def _initialised(config: Config) -> Any:
    """The whole decoder, with the values that Stoker starts from."""
    model = build(config.model, whole_model(config.model.num_hidden_layers))
    registry = whole_registry(model)
    shards = [
        shard
        for name, parameter in model.named_parameters()
        for shard in registry.shards(name, PARAMETER, LocalShard((whole(tuple(parameter.shape)),)), parameter.detach())
    ]
    initialize(shards, model.initial, config.run.seed)  # type: ignore[operator]
    return model


class _Head(nn.Module):
    """Output projection and summed cross entropy, all logits at once."""

    def __init__(self, weight: nn.Parameter, compiled: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = weight
        if compiled:
            self.forward = torch.compile(self.forward)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _put_torch_ends(model: Any, compiled: bool) -> None:
    weight = model.embedding.weight
    lookup = nn.Embedding(*weight.shape, device="meta")
    lookup.weight = weight
    model.embedding = nn.Sequential(nn.Flatten(0), lookup)  # activations are [tokens, width]
    model.head = _Head(model.head.weight, compiled)


def _parallelise(model: Any, mesh: DeviceMesh) -> None:
    assert model.embedding[1].weight is not model.head.linear.weight, "tied, DTensors would be untied"
    tokens = Shard(0)
    plan = {
        "embedding.1": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "norm": SequenceParallel(sequence_dim=0),
        "head.linear": ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False),
    }
    for number in model.layers:
        parts = {
            "attention_norm": SequenceParallel(sequence_dim=0),
            "attention": PrepareModuleInput(
                input_layouts=(tokens, None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "attention.q": ColwiseParallel(),
            "attention.k": ColwiseParallel(),
            "attention.v": ColwiseParallel(),
            "attention.o": RowwiseParallel(output_layouts=tokens),
            "mlp_norm": SequenceParallel(sequence_dim=0),
            "mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=tokens),
        }
        plan |= {f"layers.{number}.{name}": style for name, style in parts.items()}
    parallelize_module(model, mesh, plan)


def _recompute(block: nn.Module, mode: str) -> None:
    """Activation checkpointing: everything again in backward, or all but matrix products and attention."""
    if mode == "none":
        return
    options: dict[str, Any] = {}
    if mode == "selective":
        aten = torch.ops.aten
        kept = [
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        ]
        options["context_fn"] = functools.partial(checkpoint.create_selective_checkpoint_contexts, kept)
    block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=False, **options)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
