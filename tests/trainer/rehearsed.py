"""A real run beside a rehearsal: by how much a rank's memory grows."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, ModelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.trainer.parallelize import cut
from stoker.trainer.runtime.process import give_freed_memory_back

STEPS = 2


def config_of(precision: str = "fp32", seq_len: int = 256, layers: int = 2, **changes: object) -> Config:
    """Many tokens through narrow layers: much memory, and little arithmetic."""
    model = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
    )
    config = Config(model=model, precision=precision, seq_len=seq_len, batch=BatchConfig(64, 16))
    config.data.document_mask = False
    for key, value in changes.items():
        owner = next(part for part in (config.parallel, config.data, config.optim, config) if hasattr(part, key))
        setattr(owner, key, value)
    return config


def growth(config: Config) -> tuple[int, int]:
    """On a rank: by how many bytes its memory grew at most, while the engine was built and in all.

    Freed blocks go back to the system, so that it is what was live and not the holes between.
    """
    give_freed_memory_back()
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    small = replace(config.model, hidden_size=64, intermediate_size=64)
    _train(replace(config, model=small, seq_len=32), mesh)  # what libraries load at their first use
    gc.collect()
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from now on
    built = _train(config, mesh)
    return built - base, _resident("VmHWM") - base


def _train(config: Config, mesh: Mesh) -> int:
    """Some steps and an evaluation; the most bytes of this process until the engine was built."""
    plan = batch_plan(config, mesh.layout)
    engine = cut(config, mesh, plan)
    built = _resident("VmHWM")
    assert config.model.vocab_size is not None
    ids = torch.randint(config.model.vocab_size, (plan.rank_rows, config.seq_len))
    positions = torch.arange(config.seq_len).expand_as(ids).contiguous()
    rows = Batch(ids, ids.clone(), positions, torch.zeros_like(ids, dtype=torch.int32))
    for _ in range(STEPS):
        engine.forward_backward(rows)
        engine.update(1e-3)
    engine.evaluate(rows[: plan.micro_rows])
    return built


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))
