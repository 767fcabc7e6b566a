"""Limits of single values, independent of all others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from stoker.conf.overrides import closest
from stoker.conf.schema import Config, lookup


@dataclass(frozen=True)
class Limit:
    """The values that one key may have. Null, where the type allows it, is always allowed."""

    key: str
    rule: str  # completes "must be ..."
    why: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def broken(self, config: Config) -> str | None:
        """The message about this key, or None when its value is allowed."""
        value = lookup(config, self.key)
        if value is None or self.holds(value):
            return None
        if isinstance(value, dict):  # as it is typed
            value = "{" + ", ".join(f"{name}: {of}" for name, of in value.items()) + "}"
        if self.choices:
            return f"{self.key}={value}: choose from {', '.join(closest(str(value), list(self.choices)))}"
        return f"{self.key}={value}: must be {self.rule}, because {self.why}"


def _at_least(key: str, least: float, why: str) -> Limit:
    return Limit(key, f"at least {least}", why, lambda value: least <= value < math.inf)


def _above_zero(key: str, why: str) -> Limit:
    return Limit(key, "above 0", why, lambda value: 0 < value < math.inf)


def _choice(key: str, *names: str, judged_elsewhere: tuple[str, ...] = ()) -> Limit:
    known = (*names, *judged_elsewhere)
    return Limit(key, "one of " + ", ".join(names), "there are no other choices", known.__contains__, names)


def _is_time(value: str) -> bool:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _are_spans(spans: list[list[int]]) -> bool:
    whole = all(len(span) == 2 and 1 <= span[0] <= span[1] for span in spans)
    return whole and all(before[1] < after[0] for before, after in pairwise(spans))


def _is_ramp(stages: list[Any]) -> bool:
    for stage in stages:
        if not isinstance(stage, list) or len(stage) != 2 or not all(type(one) in (int, float) for one in stage):
            return False
        if stage[0] < 1 or stage[0] != int(stage[0]) or not 0 < stage[1] < math.inf:
            return False
    return all(before[1] < after[1] for before, after in pairwise(stages))


def _is_mount(value: str) -> bool:
    return value.startswith("/") and value.strip("/") != ""


_SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}")
_SLURM_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
ZERO_BUBBLE = (
    "zero_bubble",
    "zb1p",
    "zbv",
    "dualpipe",
    "dualpipev",
)  # schedules with a message in `stoker.trainer.validate`

OF_MICRO_BATCHES = ("micro_batch", "batch")  # balance losses with a message in `stoker.models.expert_refusals`
# Families
_DENSE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "phi3", "gemma3_text")
_WITH_EXPERTS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")

LIMITS = (
    _at_least("steps", 1, "a run takes steps"),
    _above_zero("tokens", "a run reads something"),
    Limit(
        "skip_steps",
        "pairs of a first and a last step, rising, such as [[100,120],[300,300]]",
        "a span is of steps in a row",
        _are_spans,
    ),
    _at_least("seq_len", 2, "one token has no other to predict"),
    _at_least("batch.size", 1, "an update needs rows"),
    _at_least("batch.micro_size", 1, "a micro-batch needs rows"),
    Limit(
        "batch.ramp",
        "pairs of sequences per step and of tokens until which, rising, such as [[8,1e6],[16,4e6]]",
        "a ramp follows the tokens read",
        _is_ramp,
    ),
    _choice("model.family", *_DENSE, *_WITH_EXPERTS),
    _at_least("parallel.tp", 1, "it counts ranks"),
    _at_least("parallel.pp", 1, "it counts stages"),
    _at_least("parallel.cp", 1, "it counts ranks"),
    _choice("parallel.context", "gather", "ulysses"),
    _at_least("parallel.ep", 1, "it counts ranks"),
    _choice("parallel.token_dispatcher", "alltoall", "allgather"),
    Limit("parallel.zero", "0, 1, 2 or 3", "these are the stages of ZeRO", range(4).__contains__),
    _at_least("parallel.dp_replicate", 1, "it counts copies of the shards"),
    _choice("parallel.schedule", "1f1b", "gpipe", "interleaved", judged_elsewhere=ZERO_BUBBLE),
    _at_least("parallel.stages_per_rank", 1, "it counts stages"),
    _choice("parallel.engine", "fsdp", "deepspeed"),
    _choice("parallel.offload", "none", "cpu", "nvme"),
    _above_zero("parallel.timeout_seconds", "no collective ends at once"),
    _at_least("model.vocab_size", 2, "with one token there is nothing to predict"),
    _at_least("model.hidden_size", 1, "it counts channels"),
    _at_least("model.num_hidden_layers", 1, "it counts layers"),
    _at_least("model.num_attention_heads", 1, "it counts heads"),
    _at_least("model.num_key_value_heads", 1, "it counts heads"),
    Limit(
        "model.head_dim",
        "an even number above 0",
        "rotary embeddings rotate pairs of channels",
        lambda value: value > 0 and value % 2 == 0,
    ),
    _at_least("model.intermediate_size", 1, "it counts channels"),
    _choice("model.hidden_act", "silu", "gelu_pytorch_tanh"),
    _at_least("model.num_experts", 0, "it counts experts"),
    _at_least("model.num_experts_per_tok", 1, "it counts experts"),
    _at_least("model.moe_intermediate_size", 1, "it counts channels"),
    _at_least("model.num_shared_experts", 0, "it counts experts"),
    _at_least("model.first_dense_layers", 0, "it counts layers"),
    _at_least("model.n_group", 1, "it counts groups"),
    _at_least("model.topk_group", 1, "it counts groups"),
    _above_zero("model.routed_scaling_factor", "experts multiplied by 0 compute nothing"),
    _at_least("model.kv_lora_rank", 1, "it counts channels"),
    _at_least("model.q_lora_rank", 1, "it counts channels"),
    _at_least("model.qk_nope_head_dim", 1, "it counts channels"),
    Limit(
        "model.qk_rope_head_dim",
        "an even number above 0",
        "rotary embeddings rotate pairs of channels",
        lambda value: value > 0 and value % 2 == 0,
    ),
    _at_least("model.v_head_dim", 1, "it counts channels"),
    _at_least("model.upcycle_noise", 0, "it is a share of initial values"),
    _choice("model.router", "softmax", "sigmoid"),
    _at_least("model.router_bias_rate", 0, "a bias would lead tokens to the experts that have most"),
    _at_least("model.router_aux_loss_coef", 0, "tokens would gather at one expert"),
    _choice("model.router_aux_loss_over", "sequence", judged_elsewhere=OF_MICRO_BATCHES),
    _at_least("model.router_z_loss_coef", 0, "logits would grow without end"),
    _above_zero("model.rms_norm_eps", "it keeps a norm of zeros finite"),
    Limit(
        "model.partial_rotary_factor",
        "above 0 and at most 1",
        "it is a share of the channels",
        lambda value: 0 < value <= 1,
    ),
    _at_least("model.sliding_window", 1, "a token sees itself"),
    _above_zero("model.sliding_rope_theta", "wavelengths are its powers"),
    _choice("model.qk_norm_over", "head", "projection"),
    _choice("model.norm_placement", "before", "after", "both"),
    _choice("model.rope_parameters.rope_type", "default", "linear", "llama3", "yarn", "longrope"),
    _above_zero("model.rope_parameters.rope_theta", "wavelengths are its powers"),
    _at_least("model.rope_parameters.factor", 1, "it extends the context"),
    _at_least("model.rope_parameters.original_max_position_embeddings", 1, "it counts tokens"),
    _above_zero("model.rope_parameters.beta_fast", "it counts turns"),
    _above_zero("model.rope_parameters.beta_slow", "it counts turns"),
    _at_least("model.rope_parameters.mscale", 0, "scores would change their sign"),
    _at_least("model.rope_parameters.mscale_all_dim", 0, "scores would change their sign"),
    Limit(
        "model.rope_parameters.short_factor",
        "numbers above 0, such as [1.0,1.05]",
        "wavelengths are multiplied by them",
        lambda factors: all(0 < factor < math.inf for factor in factors),
    ),
    _above_zero("model.rope_parameters.attention_factor", "queries multiplied by 0 are equal"),
    _above_zero("model.embedding_multiplier", "embeddings multiplied by 0 are equal"),
    _above_zero("model.attention_multiplier", "scores multiplied by 0 are equal"),
    _above_zero("model.residual_multiplier", "layers multiplied by 0 compute nothing"),
    _above_zero("model.logits_scaling", "logits are divided by it"),
    _above_zero("model.initializer_range", "weights that all start at 0 cannot be trained"),
    _at_least("model.loss_chunk", 1, "it counts tokens"),
    _choice("adapter.name", "none", "lora", "dora"),
    _choice("adapter.base", "nf4"),
    _at_least("adapter.rank", 1, "it counts columns and rows"),
    _above_zero("adapter.alpha", "an adapter multiplied by 0 changes nothing"),
    Limit(
        "adapter.dropout",
        "0, or from 0.00002 to 0.99998",
        "probabilities are multiples of 2^-16",
        lambda value: value == 0 or 0.00002 <= value <= 0.99998,
    ),
    Limit(
        "adapter.rank_pattern",
        "ranks of at least 1 by name or pattern, such as {q_proj: 16}",
        "it counts columns and rows",
        lambda ranks: all(type(rank) is int and rank >= 1 for rank in ranks.values()),
    ),
    _choice("objective.name", "next_token", "distill", "dpo", "ipo", "simpo", "orpo", "kto", "apo_zero_unpaired"),
    _above_zero("objective.beta", "rewards multiplied by 0 are equal"),
    Limit(
        "objective.label_smoothing",
        "from 0 to 0.49",
        "at 0.5 neither answer of a pair is the better one",
        lambda value: 0 <= value <= 0.49,
    ),
    _at_least("objective.desirable_weight", 0, "good answers would be unlearned"),
    _at_least("objective.undesirable_weight", 0, "bad answers would be learned"),
    _at_least("objective.gamma", 0, "a margin below 0 would let the rejected answer win"),
    _above_zero("objective.temperature", "it divides"),
    Limit("objective.mix", "from 0 to 1", "it is a share", lambda value: 0 <= value <= 1),
    _at_least("objective.z_loss", 0, "logits would grow without end"),
    _choice("data.packing", "concatenated", "best_fit", "padded"),
    _above_zero("data.temperature", "it divides"),
    _at_least("data.bpe_vocab", 257, "256 bytes and the end of a document come first"),
    _at_least("data.epochs", 1, "a run reads something"),
    Limit(
        "data.validation",
        "from 0 to 0.5",
        "most documents must be left to train on",
        lambda value: 0 <= value <= 0.5,
    ),
    _choice("data.validation_by", "documents", "position"),
    _choice("data.mode", "indexed", "streaming"),
    _at_least("data.streams", 1, "rows come from them"),
    _at_least("data.shuffle_window", 1, "it counts splits"),
    _at_least("data.split_bytes", 512, "smaller reads cost more than they bring"),
    _at_least("data.assign_every", 1, "it counts rows"),
    _choice("data.on_damage", "error", "skip"),
    _above_zero("data.max_decompressed_gib", "a line takes memory"),
    Limit("data.zstd_window_log", "from 10 to 31", "zstd has no other windows", lambda value: 10 <= value <= 31),
    _at_least("data.skip_limit", 0, "it counts skips"),
    _at_least("data.retries", 0, "it counts attempts"),
    _above_zero("data.stall_seconds", "no answer comes at once"),
    _above_zero("data.block_cache_gib", "a cache holds something"),
    _at_least("data.workers", 0, "it counts processes"),
    _at_least("data.prefetch", 1, "the batch in use is read ahead too"),
    _choice("optim.name", "adamw", "sgd", "lion", "lamb", "muon"),
    _choice("optim.needs", "elementwise", "norms", "matrix"),
    _above_zero("optim.lr", "an update must go downhill"),
    _at_least("optim.weight_decay", 0, "weights would grow"),
    Limit(
        "optim.betas",
        "two numbers from 0 up to but not including 1",
        "a moment that never decays never starts",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
    _above_zero("optim.eps", "it keeps the first update finite"),
    Limit(
        "optim.momentum",
        "from 0 up to but not including 1",
        "the velocity would grow without end",
        lambda value: 0 <= value < 1,
    ),
    Limit(
        "optim.ema",
        "above 0 and below 1",
        "it is the share of the average that a step keeps",
        lambda value: 0 < value < 1,
    ),
    _choice("optim.ns_dtype", "fp32", "bf16"),
    _choice("schedule.name", "constant", "linear", "cosine", "inverse_sqrt", "wsd"),
    _at_least("schedule.warmup_steps", 0, "it counts steps"),
    _at_least("schedule.total_steps", 1, "it counts steps"),
    Limit("schedule.decay_fraction", "above 0 and at most 1", "it is a share", lambda value: 0 < value <= 1),
    _choice("schedule.decay_shape", "linear", "cosine", "sqrt"),
    Limit(
        "schedule.decays",
        "pairs of a first and a last step, rising, such as [[100,120],[300,300]]",
        "decays follow",
        _are_spans,
    ),
    _at_least("schedule.cycle_steps", 1, "it counts steps"),
    _at_least("schedule.cycle_growth", 1, "shrinking cycles would have no steps left"),
    Limit("schedule.final", "from 0 to 1", "it is a share of the peak", lambda value: 0 <= value <= 1),
    _above_zero("grad_clip_norm", "gradients clipped to 0 change nothing (null switches clipping off)"),
    _choice("precision", "fp32", "bf16", "fp16", "fp8"),
    _above_zero("fp8.amax_floor", "a row of zeros has no scale of its own"),
    _choice("activation_checkpointing", "none", "selective", "full"),
    _choice("nonfinite.action", "skip", "rollback", "stop"),
    _at_least("nonfinite.limit", 1, "it counts steps"),
    _above_zero("nonfinite.spike", "half of all steps are above their median"),
    _at_least("nonfinite.window", 20, "fewer steps give no reliable median"),
    _at_least("checkpoint.every", 0, "it counts steps"),
    _above_zero("checkpoint.minutes", "a save takes its time"),
    _at_least("checkpoint.keep", 1, "a run without a checkpoint cannot resume"),
    _at_least("checkpoint.keep_every", 0, "it counts steps"),
    _at_least("checkpoint.keep_best", 0, "it counts checkpoints"),
    _choice("checkpoint.mode", "async", "sync"),
    _at_least("checkpoint.staging_limit", 4 << 20, "a shard file is written in blocks of 4 MiB"),
    _choice("checkpoint.on_error", "warn", "fail"),
    _at_least("eval.every", 0, "it counts steps"),
    _at_least("eval.sequences", 0, "it counts rows"),
    _at_least("eval.tasks_every", 0, "it counts steps"),
    _at_least("eval.fewshot", 0, "it counts examples"),
    _at_least("eval.limit", 1, "a task asks something"),
    Limit(
        "tracker.names",
        "different names of wandb, tensorboard, mlflow and csv, such as [wandb,csv]",
        "there are no other trackers",
        lambda names: len(set(names)) == len(names) and {"wandb", "tensorboard", "mlflow", "csv"}.issuperset(names),
    ),
    _choice("tracker.mode", "online", "offline", "disabled"),
    Limit("prometheus.port", "from 0 to 65535", "it is a TCP port", lambda port: 0 <= port < 1 << 16),
    Limit(
        "alerts.on",
        "names of hang, rollback, failure and end, such as [failure,end]",
        "there are no other events",
        lambda events: {"hang", "rollback", "failure", "end"}.issuperset(events),
    ),
    _choice("launch.name", "local", "slurm", "kubernetes", "skypilot"),
    _choice("launch.container", "pyxis", "apptainer"),
    _choice("launch.manifest", "jobset", "trainjob"),
    Limit("launch.mount", "an absolute path other than /", "a volume is mounted there", _is_mount),
    _at_least("launch.nproc", 1, "it counts ranks"),
    _at_least("launch.max_restarts", 0, "it counts restarts"),
    _above_zero("launch.hang_seconds", "a step takes its time"),
    _at_least("launch.threads", 1, "a rank computes on at least one"),
    _choice("launch.device", "cpu", "cuda"),
    _choice("launch.backend", "nccl", "gloo"),
    Limit("launch.deadline", "a time such as 2026-12-24T18:00", "it is compared with the clock", _is_time),
    _at_least("launch.nodes", 1, "it counts machines"),
    Limit(
        "launch.time",
        "MINUTES, HH:MM:SS, D-HH or D-HH:MM:SS",
        "Slurm reads it",
        lambda value: bool(_SLURM_TIME.fullmatch(value)),
    ),
    _at_least("launch.gpus", 1, "it counts GPUs"),
    _at_least("launch.cpus", 1, "it counts processors"),
    _at_least("launch.grace_seconds", 10, "Slurm itself is late by that much"),
    _at_least("launch.chain", 1, "it counts jobs"),
    Limit(
        "launch.array",
        "task numbers such as 0-3 or 1,5,7",
        "Slurm reads it",
        lambda value: bool(_SLURM_ARRAY.fullmatch(value)),
    ),
    _at_least("log.every", 1, "it counts steps"),
    _at_least("log.expert_tokens_every", 0, "it counts steps"),
    _choice("log.progress", "auto", "live", "plain", "none"),
    Limit(
        "profile.steps",
        "the first and the last step to trace, such as [10,13]",
        "a trace is of steps in a row",
        lambda value: len(value) == 2 and 1 <= value[0] <= value[1],
    ),
    _at_least("profile.phases_every", 0, "it counts steps"),
)
