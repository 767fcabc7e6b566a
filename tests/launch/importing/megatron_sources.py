"""Checkpoints as Megatron-LM writes them, of the random models of `tests.models.families`."""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import random
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.models.families import write_family

STEP = "iter_0000100"
PADDING = 24  # rows that no token has


@contextlib.contextmanager
def megatron_enums() -> Iterator[Any]:
    """A class of Megatron's that pickles name, while it can be imported."""
    names = ("megatron", "megatron.core", "megatron.core.enums")
    modules = {name: types.ModuleType(name) for name in names}
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=names[-1])
    modules[names[-1]].ModelType = kind  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield kind
    finally:
        for name in names:
            del sys.modules[name]


def arguments(model: Any, tensor: int = 1, stages: int = 1, **changes: Any) -> argparse.Namespace:
    """The arguments that a training script keeps."""
    config = model.config
    heads = config.num_attention_heads
    rope = config.rope_parameters
    values = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": config.num_key_value_heads != heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "norm_epsilon": config.rms_norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": "model.layers.0.self_attn.q_proj.bias" in model.state_dict(),
        "qk_layernorm": "model.layers.0.self_attn.q_norm.weight" in model.state_dict(),
        "position_embedding_type": "rope",
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": 1.0,
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 8.0),
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size + PADDING,
        "max_position_embeddings": config.max_position_embeddings,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "params_dtype": torch.float32,
        "exit_signal": signal.SIGTERM,
        "save": Path("/somewhere"),
        "num_experts": None,
    }
    return argparse.Namespace(**(values | changes))


def whole_state(model: Any, fused_norms: bool) -> dict[str, Tensor]:
    """The weights by Megatron's names, not divided. `fused_norms`: as Transformer Engine's layers name norms."""
    config, state = model.config, dict(model.state_dict())
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    found = {"embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"])}
    for number in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{number}.", f"decoder.layers.{number}."
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        norms = norms if fused_norms else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        found[ours + norms[0]] = state[f"{theirs}input_layernorm.weight"]
        found[ours + norms[1]] = state[f"{theirs}post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in state:
                q, k, v = (state[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
                by_group = zip(q.split(heads // groups * dim), k.split(dim), v.split(dim), strict=True)
                fused = torch.cat([part for group in by_group for part in group])
                found[f"{ours}self_attention.linear_qkv.{kind}"] = fused
        for letter in "qk":
            if f"{theirs}self_attn.{letter}_norm.weight" in state:
                own = f"{ours}self_attention.{letter}_layernorm.weight"
                found[own] = state[f"{theirs}self_attn.{letter}_norm.weight"]
        found[f"{ours}self_attention.linear_proj.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        both = (state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"])
        found[f"{ours}mlp.linear_fc1.weight"] = torch.cat(both)
        found[f"{ours}mlp.linear_fc2.weight"] = state[f"{theirs}mlp.down_proj.weight"]
    found["decoder.final_layernorm.weight"] = state["model.norm.weight"]
    if not config.tie_word_embeddings:
        found["output_layer.weight"] = padded(state["lm_head.weight"])
    return found


def padded(matrix: Tensor) -> Tensor:
    return torch.cat((matrix, torch.full((PADDING, matrix.shape[1]), 7.0)))


def shard(name: str, value: Tensor, rank: int, ranks: int) -> Tensor:
    """A tensor rank's part of a tensor."""
    if name.endswith("mlp.linear_fc1.weight"):
        return torch.cat([half.chunk(ranks)[rank] for half in value.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return value.chunk(ranks, 1)[rank].contiguous()
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
        return value.chunk(ranks)[rank].clone()
    return value


def write_megatron(folder: Path, case: str, tensor: int = 1, stages: int = 1, fused_norms: bool = True) -> Any:
    """A folder of `--ckpt-format torch`; the model. A stage numbers its layers from 0."""
    model = write_family(folder.with_name(f"{folder.name}-model"), case)
    state = whole_state(model, fused_norms)
    each = model.config.num_hidden_layers // stages
    (folder / STEP).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    for rank in range(tensor):
        for stage in range(stages):
            held: dict[str, Any] = {}
            for name, value in state.items():
                number = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
                own = number is not None and number // each == stage
                first = stage == 0 and name.startswith("embedding")
                if own or first or (stage == stages - 1 and name.startswith(("decoder.final", "output"))):
                    local = name if number is None else name.replace(f".{number}.", f".{number % each}.", 1)
                    held[local] = shard(name, value, rank, tensor)
            if model.config.tie_word_embeddings and 0 < stage == stages - 1:  # its copy of the embedding
                name = "embedding.word_embeddings.weight"
                held["output_layer.weight"] = shard(name, state[name], rank, tensor)
            held["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"float8")
            path = folder / STEP / f"mp_rank_{rank:02d}{f'_{stage:03d}' if stages > 1 else ''}" / "model_optim_rng.pt"
            path.parent.mkdir()
            save(path, {"model": held, **beside(arguments(model, tensor, stages))})
    return model


def beside(args: argparse.Namespace) -> dict[str, Any]:
    """What a file holds beside the model."""
    rng = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 100,
        "optimizer": optimizer,
        "opt_param_scheduler": {"max_lr": 0.1},
        "rng_state": [rng | {"torch_rng_state": torch.get_rng_state()}],
    }


def save(path: Path, held: dict[str, Any]) -> None:
    """As a training script does, whose arguments hold a class of Megatron's."""
    with megatron_enums() as kinds:
        held["args"].model_type = kinds.encoder_or_decoder
        torch.save(held, path)


def write_torch_dist(folder: Path, case: str) -> Any:
    """A folder of `--ckpt-format torch_dist`; the model. Tensors of all layers are one; nothing is divided."""
    model = write_family(folder.with_name(f"{folder.name}-model"), case)
    step = folder / STEP
    state = whole_state(model, fused_norms=True)
    stacks: dict[str, list[Tensor]] = {}
    for name in [name for name in state if name.startswith("decoder.layers.")]:
        _, _, number, inner = name.split(".", 3)
        stacks.setdefault(f"decoder.layers.{inner}", []).insert(int(number), state.pop(name))
    everything: dict[str, Any] = state | {name: torch.stack(values) for name, values in stacks.items()}
    everything["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.ones(32)
    everything["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"] = b"float8"
    everything["rng_state/shard_0.0_1.1"] = b"numbers"
    dcp.save(everything, checkpoint_id=step, no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("100\n")
    held = beside(arguments(model, tensor=2, stages=3))
    save(step / "common.pt", {key: held[key] for key in ("args", "checkpoint_version", "iteration")})
    return model
