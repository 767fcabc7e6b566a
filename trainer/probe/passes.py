"""Forward and backward passes of each rank for itself: of the model itself, and of one so small that only calls cost.

Rates of products and copies do not add up to a pass: operands are not in caches, and the host calls operations.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import ModelConfig
from stoker.models.family import build_on_meta
from stoker.parallel.buffers import fill_buffers
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import materialise
from stoker.trainer.probe.products import of_all_ranks, timed
from stoker.trainer.rehearsal.work import Work, WorkLog

LAYERS = 2
SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=32,
)  # fmt: skip
_SMALL_TOKENS = 8
_OF_MEMORY = 0.25  # the part of what is free that parameters and gradients may take
_LEAST_TIMES = 3


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass of all ranks at once: work of one as `stoker.trainer.rehearsal.Work` counts it, and
    seconds of the slowest, in the median."""

    flops: int
    moved: int
    calls: int
    seconds: float

    @property
    def work(self) -> Work:
        return Work(self.flops, self.moved, self.calls)


def call_seconds(mesh: Mesh, seconds: float) -> float:
    """Seconds of the host for one operation, in about `seconds`: of passes whose operations compute next to nothing.

    A collective of all ranks, as `own_passes`.
    """
    passes = _measure(SMALL, torch.float32, 1, _SMALL_TOKENS, mesh, seconds)
    return passes.seconds / passes.calls


def own_passes(
    model: ModelConfig, dtype: str, rows: int, seq_len: int, mesh: Mesh, seconds: float, rate: float, free_bytes: float
) -> Passes | None:
    """Of the first `LAYERS` layers, embedding and head of `model`, in about `seconds`; its vocabulary must be set.

    A micro-batch has `rows` sequences, or as many as there is time for, if products reach `rate` operations a second;
    None if that is none, if the weights would take more than a quarter of the free memory, or for a model that is not
    the decoder. The slowest rank and the one with least memory decide for all.
    """
    if model.target != SMALL.target:
        return None
    (rates,), (free,) = of_all_ranks(mesh, [rate]), of_all_ranks(mesh, [free_bytes])
    rate, free_bytes = min(rates), min(free)
    model = dataclasses.replace(model, num_hidden_layers=min(LAYERS, model.num_hidden_layers))
    on_meta = build_on_meta(model, whole_model(model.num_hidden_layers))
    parameters = sum(parameter.numel() for parameter in on_meta.parameters())
    rows = min(rows, int(seconds * rate / (6 * parameters * seq_len)))
    if rows < 1 or 2 * parameters * PRECISIONS[dtype].itemsize > _OF_MEMORY * free_bytes:
        return None
    return _measure(model, PRECISIONS[dtype], rows, seq_len, mesh, seconds)


def _model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """With random weights, as zeros take less power, and buffers by the model's own rule."""
    model = build_on_meta(config, whole_model(config.num_hidden_layers))
    registry = whole_registry(model)
    materialise(model, device)
    fill_buffers(model, registry)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, device=device, generator=generator).mul_(0.02).to(dtype)
    return model


def _measure(config: ModelConfig, dtype: torch.dtype, rows: int, seq_len: int, mesh: Mesh, seconds: float) -> Passes:
    assert config.vocab_size is not None
    model = _model(config, mesh.device, dtype)
    tokens = torch.arange(rows * seq_len, device=mesh.device).view(rows, -1) % config.vocab_size
    positions = torch.arange(seq_len, device=mesh.device).expand(rows, -1)

    def both() -> None:
        model(tokens, positions, None, tokens).backward()
        model.zero_grad()

    both()
    log = WorkLog(mesh)
    with _Watched(log):
        both()
    work = log.take()
    (once,) = of_all_ranks(mesh, [timed(both, 1, mesh.device)])
    times = []
    for _ in range(max(_LEAST_TIMES, int(seconds / max(once)))):
        mesh.any([False])
        times.append(timed(both, 1, mesh.device))
    slowest = [max(each) for each in of_all_ranks(mesh, times)]
    return Passes(work.flops, work.moved, work.calls, statistics.median(slowest))


class _Watched(TorchDispatchMode):
    def __init__(self, log: WorkLog) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._log.see(func, args, kwargs or {}, result)
        return result
