"""Tiny causal language models of transformers, one line for each class, and what they are compared with.

The reference is transformers' own model with its own eager attention, given one document at a time: it needs no mask
and no engine. Adding a class is adding a line to `CLASSES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stoker.conf.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig
from stoker.launch.differences import SMALL_GRADIENT
from stoker.models.family import TRANSFORMERS
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import BUFFER, PARAMETER, Shard
from stoker.trainer.parallelize import build_engine
from tests import world

VOCABULARY, ROWS, LENGTH, STEPS = 96, 4, 16, 5
# An element of Phi-3's gradient that is 5e-9 is 5e-8 in another order of sums: at eps 1e-6 AdamW moves it by a
# twentieth of lr, and the norm of the third step differs by 3e-5.
LR, EPS = 3e-4, 1e-5
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_NONE = {"num_key_value_heads": None}

CLASSES: dict[str, dict[str, Any]] = {  # model_type: changes of the shape above
    "llama": {},
    "mistral": {"sliding_window": 3},
    "ministral": {"head_dim": 8} | WINDOW,
    "ministral3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE,
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.0}
    | WINDOW
    | {"final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 5} | WINDOW,
    "phi": {},
    "phi3": {"sliding_window": 3},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5} | WINDOW,
    "stablelm": {},
    "starcoder2": {"sliding_window": 3, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | _NONE,
    "gpt_neox": _NONE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0} | _NONE,
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0} | _NONE,
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False, "alibi": False} | _NONE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2} | _NONE,
    "nemotron": {},
    "exaone4": {"sliding_window": 3, "sliding_window_pattern": 2, "layer_types": WINDOW["layer_types"]},
    "arcee": {},
    "helium": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | WINDOW,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "apertus": {},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | _NONE,
    "nanochat": {},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 5} | WINDOW,
    "cwm": {"head_dim": 8, "bos_token_id": 1, "eos_token_id": 2} | WINDOW,
    "hyperclovax": {"logits_scaling": 2.0},
    "jais2": {},
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | _NONE,
}
LAYOUTS = {
    "dp 2 ZeRO 3": Layout(dp_shard=2, zero=3),
    "tp 2": Layout(tp=2),
    "pp 2": Layout(pp=2),
}


SHARING = {
    "cp 2": Layout(cp=2, zero=3),
    "cp 2 recomputed": Layout(cp=2),
}  # sequences, by ranks


def values_of(kind: str) -> dict[str, Any]:
    changes = {
        key: value for key, value in (_SHAPE | CLASSES[kind]).items() if value is not None or key.endswith("_id")
    }
    return {"model_type": kind} | changes


def config_of(kind: str, layout: Layout, **changes: Any) -> Config:
    model = ModelConfig(target=TRANSFORMERS, config=values_of(kind), vocab_size=VOCABULARY, num_hidden_layers=3)
    model.init_from, model.loss_chunk = "given", 11
    data = DataConfig(document_mask=changes.pop("document_mask", True))
    config = Config(model=model, data=data, batch=BatchConfig(size=ROWS, micro_size=1), seq_len=LENGTH)
    config.precision, config.grad_clip_norm = "fp32", None
    config.optim = OptimConfig(name="adamw", lr=LR, eps=EPS, weight_decay=0.0)
    config.parallel = ParallelConfig(
        tp=layout.tp, pp=layout.pp, zero=layout.zero, sequence_parallel=False, dp_replicate=layout.dp_replicate
    )
    config.parallel.cp, config.parallel.ep = layout.cp, layout.ep
    if layout.cp > 1 and layout.zero == 0:
        config.activation_checkpointing = "full"
    for key, value in changes.items():
        setattr(config.parallel, key, value)
    return config


def batch_of(step: int, mask: bool = True) -> Batch:
    """Rows of documents of unequal length, with positions within them; some labels carry no loss."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.2] = IGNORE_INDEX
    starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.15
    starts[:, 0] = False
    starts[0, 9] = True  # a document that is longer than a window on both sides
    documents = starts.cumsum(1).int() if mask else torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    positions = torch.stack([torch.cat([torch.arange(n) for n in _lengths(row)]) for row in documents])
    return Batch(tokens, labels, positions, documents)


def _lengths(documents: Tensor) -> list[int]:
    return documents.unique_consecutive(return_counts=True)[1].tolist()


def reference_model(kind: str) -> Any:
    """transformers' model with random weights, norms too, by transformers' own attention."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = values_of(kind)
    config = CONFIG_MAPPING[kind].from_dict(values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # Stoker trains that row as well
    return model.train()


@dataclass
class Found:
    """What a run computed."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step's summed loss
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last step


def reference(model: Any, mask: bool = True, steps: int = STEPS) -> Found:
    """`steps` of AdamW in plain torch, document by document. `model` is left with the last weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0)
    found = Found()
    for step in range(1, steps + 1):
        batch = batch_of(step, mask)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(ROWS):
            start = 0
            for length in _lengths(batch.documents[row]):
                part = slice(start, start + length)
                start += length
                logits = model(batch.tokens[row : row + 1, part], use_cache=False).logits[0]
                total = total + F.cross_entropy(
                    logits.double(), batch.labels[row, part], reduction="sum", ignore_index=IGNORE_INDEX
                )
        total.backward()
        count = int(batch.valid_tokens())
        if step == 1:
            found.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        found.losses.append(total.item() / count)
        squares = [float(p.grad.double().norm()) ** 2 for p in model.parameters() if p.grad is not None]
        found.norms.append(math.sqrt(sum(squares)))
        optimizer.step()
        optimizer.zero_grad()
    found.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return found


def train(folder: Path, kinds: list[str], layout: Layout, mask: bool = True, **changes: Any) -> dict[str, Any]:
    """On a rank: each of `kinds` from the weights in `folder`. What it saw, or the text of an error."""
    torch.set_num_threads(1)
    layout = layout_of(config_of(kinds[0], layout, **changes), dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    found: dict[str, Any] = {}
    for kind in kinds:
        config = config_of(kind, layout, document_mask=mask, **changes)
        try:
            engine, initialise = build_engine(config, mesh, batch_plan(config, layout))
        except ValueError as error:  # on all ranks alike
            found[kind] = str(error)
            continue
        initialise()
        weights = torch.load(folder / f"{kind}.pt", weights_only=True)
        for shard in engine.shards():
            if shard.kind in (PARAMETER, BUFFER):
                shard.data.copy_(weights[shard.name][shard.chunk.within(_whole(shard))])
        engine.shards_written()
        run, gradients = Found(), []
        for step in range(1, STEPS + 1):
            engine.forward_backward(batch_of(step, mask)[mesh.dp_rank :: layout.dp])
            if step == 1:
                gradients = [_kept(shard) for shard in engine.gradient_shards()]
            result = engine.update(config.optim.lr).read()
            run.losses.append(result.loss)
            run.norms.append(result.grad_norm)
        found[kind] = run, gradients, [_kept(shard) for shard in engine.shards() if shard.kind == PARAMETER]
    return found


def _kept(shard: Shard) -> tuple[str, tuple[int, ...], Any, Tensor]:
    return shard.name, shard.shape, shard.chunk.within(_whole(shard)), shard.data.detach().cpu().clone()


def _whole(shard: Shard) -> Any:
    from stoker.parallel.shards import whole

    return whole(shard.shape)


def gathered(of_ranks: list[dict[str, Any]], kind: str) -> Found | str:
    """One run from what its ranks saw."""
    if isinstance(of_ranks[0][kind], str):
        return of_ranks[0][kind]
    found = of_ranks[0][kind][0]
    assert all(rank[kind][0].losses == found.losses and rank[kind][0].norms == found.norms for rank in of_ranks)
    for part, into in ((1, found.gradients), (2, found.parameters)):
        for rank in of_ranks:
            for name, shape, place, data in rank[kind][part]:
                into.setdefault(name, torch.full(shape, math.nan))[place] = data
    assert not any(value.isnan().any() for value in [*found.gradients.values(), *found.parameters.values()])
    return found


def differences(found: Found, expected: Found) -> dict[str, float]:
    """The largest relative difference of each kind; gradients of nothing but noise count as in `stoker check`."""
    assert set(found.gradients) == set(expected.gradients) | {
        name for name, value in found.gradients.items() if not value.any()
    }, set(found.gradients) ^ set(expected.gradients)
    everything = math.sqrt(sum(float(value.double().norm()) ** 2 for value in expected.gradients.values()))
    relative = {
        name: float((found.gradients[name].double() - value.double()).norm())
        / max(float(value.double().norm()), SMALL_GRADIENT * everything)
        for name, value in expected.gradients.items()
    }
    moved = {
        name: float((found.parameters[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.parameters.items()
    }
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True)),
        "gradient norm": max(abs(a - b) / abs(b) for a, b in zip(found.norms, expected.norms, strict=True)),
        "gradient": max(relative.values()),
        "parameters": max(moved.values()),
    }


def write_references(folder: Path, masks: dict[str, bool]) -> dict[str, Found]:
    """On a rank: the weights of the references in `folder`, and what they compute; each rank takes some of the kinds.

    `masks`: for each kind whether documents are apart.
    """
    found = {}
    for kind in sorted(masks)[dist.get_rank() :: dist.get_world_size()]:
        model = reference_model(kind)
        torch.save({name: value.clone() for name, value in model.state_dict().items()}, folder / f"{kind}.pt")
        found[kind] = reference(model, masks[kind])
    return found
