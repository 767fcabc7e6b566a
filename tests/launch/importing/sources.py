"""Checkpoints as other programs write them, of the random models of `tests.models.families`."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from tests.models.families import write_family


def write_bin(folder: Path, case: str, files: int = 1, dtype: str = "float32") -> Any:
    """`pytorch_model.bin` and config.json in `folder`; the model."""
    model = write_family(folder, case, dtype)
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return model
    names = [f"pytorch_model-{number + 1:05}-of-{files:05}.bin" for number in range(files)]
    where = {name: names[number % files] for number, name in enumerate(state)}
    for file in names:
        torch.save({name: state[name] for name in state if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


def write_litgpt(folder: Path, case: str, interleaved: bool = False, below: str | None = None) -> Any:
    """`lit_model.pth` and model_config.yaml in `folder`; the model. `below`: the key of the state dict in the file."""
    model = write_family(folder, case)
    for path in folder.iterdir():
        path.unlink()
    state = dict(model.state_dict())
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    names = {
        "input_layernorm": "norm_1",
        "post_attention_layernorm": "norm_2",
        "self_attn.o_proj": "attn.proj",
        "self_attn.q_norm": "attn.norm_q",
        "self_attn.k_norm": "attn.norm_k",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    }
    held = {
        "lm_head.weight": state["lm_head.weight"],
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
    }
    for number in range(config.num_hidden_layers):
        prefix, ours = f"model.layers.{number}.", f"transformer.h.{number}."
        for theirs, own in names.items():
            if f"{prefix}{theirs}.weight" in state:
                held[f"{ours}{own}.weight"] = state[f"{prefix}{theirs}.weight"]
        for kind in ("weight", "bias"):
            if f"{prefix}self_attn.q_proj.{kind}" not in state:
                continue
            q, k, v = (state[f"{prefix}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
            if interleaved:
                own = heads // groups * head_dim
                parts = zip(q.split(own), k.split(head_dim), v.split(head_dim), strict=True)
                held[f"{ours}attn.attn.{kind}"] = torch.cat([part for group in parts for part in group])
            else:
                held[f"{ours}attn.qkv.{kind}"] = torch.cat((q, k, v))
    torch.save(held if below is None else {below: held, "step_count": 3}, folder / "lit_model.pth")
    rope = config.rope_parameters
    values = {
        "name": "tiny",
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": heads,
        "n_query_groups": groups,
        "n_embd": config.hidden_size,
        "head_size": head_dim,
        "intermediate_size": config.intermediate_size,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "attn_bias": "model.layers.0.self_attn.q_proj.bias" in state,
        "norm_qk": "model.layers.0.self_attn.q_norm.weight" in state,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.rms_norm_eps,
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(rope["rope_theta"]),
        "rope_adjustments": None
        if rope["rope_type"] == "default"
        else {
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_max_seq_len": rope["original_max_position_embeddings"],
        },
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(values))
    return model


def torchtitan_state(model: Any) -> dict[str, Tensor]:
    """The weights of a Llama or Qwen3 by torchtitan's names, in its layout."""
    outer = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    }
    inner = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    config = model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    found = {}
    for name, value in model.state_dict().items():
        if name in outer:
            found[outer[name]] = value
            continue
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        own = inner[rest.removesuffix(".weight")]
        if config.model_type == "llama" and own in ("attention.wq", "attention.wk"):
            count = heads[own[-1]]
            halves = value.view(count, 2, value.shape[0] // count // 2, value.shape[1])
            value = halves.transpose(1, 2).reshape(value.shape)
        found[f"layers.{number}.{own}.weight"] = value
    return found


def write_torchtitan(folder: Path, case: str, below: str | None = None) -> Any:
    """A folder of torchtitan's checkpoint manager, with config.json beside it; the model."""
    theirs = folder.with_name(f"{folder.name}-config")
    model = write_family(theirs, case)
    state = torchtitan_state(model)
    everything: dict[str, Any] = dict(state) if below is None else {below: state}
    everything["optimizer"] = {"state": {"output.weight": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    everything["train_state"] = {"step": torch.tensor(7)}
    everything["dataloader"] = {"dp_rank_0": b"\x80\x04N."}
    dcp.save(everything, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_bytes((theirs / "config.json").read_bytes())
    return model


def write_deepspeed(folder: Path, case: str, stage: int, ranks: int = 2) -> Any:
    """A folder of DeepSpeed's `save_checkpoint` on so many ranks, with config.json in it; the model.

    ZeRO 1 and 2 divide all parameters of a group in one row; ZeRO 3 divides each parameter.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # an object that its files hold

    model = write_family(folder, case)
    (folder / "model.safetensors").unlink()
    step = folder / "global_step3"
    step.mkdir()
    (folder / "latest").write_text("global_step3")
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    shapes = [OrderedDict((name, value.shape) for name, value in parameters.items())]
    states = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, "ds_version": "0.19.8"}

    def divided(value: Tensor) -> tuple[Tensor, ...]:
        row = value.flatten()
        row = torch.cat((row, row.new_zeros(-len(row) % (2 * ranks if stage < 3 else ranks))))
        return row.chunk(ranks)

    if stage < 3:
        parts = divided(torch.cat([value.flatten() for value in parameters.values()]))
        torch.save(states, step / "mp_rank_00_model_states.pt")
    else:
        each = [divided(value) for value in parameters.values()]
        parts = tuple(torch.cat([value[rank] for value in each]) for rank in range(ranks))
    key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
    for rank, part in enumerate(parts):
        held = {"zero_stage": stage, "partition_count": ranks, key: [part], "loss_scaler": LossScaler(1.0)}
        torch.save({"optimizer_state_dict": held}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save(states, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return model
