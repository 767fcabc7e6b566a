"""A file of DeepSpeed's settings, `parallel.deepspeed=FILE`, as settings of ours.

What Stoker decides itself (stage, offload, batch, clipping, precision, optimizer, schedule) is translated into the keys
that decide it, each shown in a line. What is DeepSpeed's alone goes into `parallel.deepspeed`, whose names
`stoker.parallel.deepspeed_engine.settings` judges. What has no equal here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stoker.conf.overrides import DEEPSPEED, names_a_file
from stoker.conf.reasons import reason
from stoker.conf.values import ConfigError

_OFFLOADS = ("none", "cpu", "nvme")
# What Stoker does anyway, or what says nothing about a run here; None: whatever its value.
_WITHOUT_EFFECT = {
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "sparse_gradients": False,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": None,  # `stoker export` writes those
    "gradient_accumulation_steps": None,  # follows from the batch
    "scheduler.params.last_batch_iteration": -1,
    "optimizer.params.torch_adam": None,
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.bias_correction": True,
    "optimizer.params.amsgrad": False,
    "fp16.auto_cast": False,
    "fp16.loss_scale": 0,  # the loss scale is dynamic, and Stoker's
    **dict.fromkeys(
        f"fp16.{key}"
        for key in (
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "min_loss_scale",
            "consecutive_hysteresis",
        )
    ),
}
_KEYS = {
    "zero_optimization.stage": "parallel.zero",
    "train_batch_size": "batch.size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_clipping": "grad_clip_norm",
    "steps_per_print": "log.every",
    "seed": "run.seed",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.momentum": "optim.momentum",
}
_OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "sgd": "sgd"}  # DeepSpeed's Adam decays as AdamW does


def translate(words: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """`words` with what a file of DeepSpeed's settings says in the place of its name; the other words win.

    `tell` takes a line for each setting that is translated. Raises ConfigError for a file that cannot be read, and for
    settings that have no equal here.
    """
    files = [word for word in words if names_a_file(word)]
    if not files:
        return list(words)
    rest = [word for word in words if word not in files]
    path = Path(files[-1].partition("=")[2]).expanduser()
    try:
        lines = dict(_translated(_flat(_read(path)), {word.lstrip("+").partition("=")[0] for word in rest}))
    except ValueError as error:
        raise ConfigError("\n".join(f"{DEEPSPEED}={path}: {line}" for line in str(error).splitlines())) from error
    for word, theirs in lines.items():
        if theirs:
            tell(f"{path}: {theirs} is {word}")
    return [*lines, *rest]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"it cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("it holds no object of settings")
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by dotted name, but those that are `auto`: what transformers' Trainer fills in is Stoker's own."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif value != "auto":
            found[prefix + key] = value
    return found


def _translated(theirs: dict[str, Any], given: set[str]) -> Iterator[tuple[str, str]]:
    """Words of ours with what they stand for. Raises ValueError, a line for each setting that has no equal."""
    refused = [*_refused(theirs, given)]
    if refused:
        raise ValueError("\n".join(refused))
    found = [("parallel.engine=deepspeed", "")]
    found += [*_offload(theirs), *_precision(theirs), *_optimizer(theirs), *_scheduler(theirs)]
    for key, ours in _KEYS.items():
        if key in theirs:
            value = theirs.pop(key)
            found.append((f"{ours}={_text(value or None if key == 'gradient_clipping' else value)}", f"{key}={value}"))
    for key, harmless in _WITHOUT_EFFECT.items():
        if key in theirs and harmless in (None, theirs[key]):
            del theirs[key]
    found += [(f"{DEEPSPEED}.{key}={_text(value)}", "") for key, value in theirs.items()]
    for word, what in found:
        if word.partition("=")[0] not in given:
            yield word, what


def _refused(theirs: dict[str, Any], given: set[str]) -> Iterator[str]:
    micro, steps = theirs.get("train_micro_batch_size_per_gpu"), theirs.get("gradient_accumulation_steps")
    if steps is not None and "train_batch_size" not in theirs and "batch.size" not in given:
        rows = f"{micro * steps} sequences, so batch.size={micro * steps}" if type(micro) is type(steps) is int else "N"
        yield (
            f"gradient_accumulation_steps={steps} without train_batch_size: say batch.size=N, the sequences of a step "
            f"on all ranks (on one rank {rows})"
        )
    kind = theirs.get("optimizer.type")
    if kind is not None and str(kind).lower() not in _OPTIMIZERS:
        yield f"optimizer.type={kind} has no equal: optim.target=pkg.mod:function builds an optimizer of your own"
    if str(kind).lower() == "sgd" and theirs.get("optimizer.params.weight_decay"):
        yield "optimizer.params.weight_decay of SGD is added to the gradient, and Stoker's is not: leave it out"
    for key in ("adam_w_mode", "bias_correction"):
        if theirs.get(f"optimizer.params.{key}") is False:
            yield f"optimizer.params.{key}=false has no equal: leave it out, or name your own by optim.target"
    if theirs.get("optimizer.params.amsgrad"):
        yield "optimizer.params.amsgrad=true has no equal: leave it out, or name your own by optim.target"
    if theirs.get("fp16.loss_scale"):
        yield f"fp16.loss_scale={theirs['fp16.loss_scale']}: the loss scale is dynamic here; fp16.loss_scale=0 says so"
    scheduler = theirs.get("scheduler.type")
    if scheduler not in (None, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        yield f"scheduler.type={scheduler} has no equal: leave it out and say schedule=constant, cosine or wsd"
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        if theirs.get(f"scheduler.params.{key}"):
            yield f"scheduler.params.{key}={theirs[f'scheduler.params.{key}']}: a warmup begins at 0 here; leave it out"
    if scheduler in ("WarmupDecayLR", "WarmupCosineLR") and "scheduler.params.total_num_steps" not in theirs:
        yield f"scheduler.type={scheduler} needs its params.total_num_steps: the steps of the run"


def _offload(theirs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    devices: dict[str, str] = {}
    for part, old in (("offload_optimizer", "cpu_offload"), ("offload_param", "cpu_offload_params")):
        name = f"zero_optimization.{part}"
        if (device := theirs.pop(f"{name}.device", None)) in _OFFLOADS:
            devices[f"{name}.device={device}"] = device
        elif device is not None:
            theirs[f"{name}.device"] = device  # for the one who judges names
        if theirs.pop(f"zero_optimization.{old}", False):
            devices[f"zero_optimization.{old}=true"] = "cpu"
        if path := theirs.pop(f"{name}.nvme_path", None):
            yield f"parallel.nvme_path={path}", f"{name}.nvme_path={path}"
    if devices:
        yield f"parallel.offload={max(devices.values(), key=_OFFLOADS.index)}", " and ".join(devices)


def _precision(theirs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    on = [name for name in ("bf16", "bfloat16", "fp16") if theirs.pop(f"{name}.enabled", False)]
    if on:
        yield f"precision={'fp16' if on == ['fp16'] else 'bf16'}", f"{on[0]}.enabled=true"
    else:
        yield "precision=fp32", "neither bf16 nor fp16"


def _optimizer(theirs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = theirs.pop("optimizer.type", None)
    if kind is not None:
        yield f"optim={_OPTIMIZERS[kind.lower()]}", f"optimizer.type={kind}"


def _scheduler(theirs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = theirs.pop("scheduler.type", None)
    params = {key: theirs.pop(f"scheduler.params.{key}", None) for key in (
        "warmup_num_steps", "warmup_max_lr", "warmup_type", "total_num_steps", "cos_min_ratio", "warmup_min_lr",
        "warmup_min_ratio",
    )}  # fmt: skip
    if kind is None:
        return
    warmup = 1000 if params["warmup_num_steps"] is None else int(params["warmup_num_steps"])
    curve = "" if params["warmup_type"] == "linear" or kind == "WarmupCosineLR" else ", its warmup linear here"
    yield f"schedule.warmup_steps={warmup}", f"scheduler.params.warmup_num_steps={warmup}{curve}"
    if params["warmup_max_lr"] is not None:
        yield f"optim.lr={params['warmup_max_lr']}", f"scheduler.params.warmup_max_lr={params['warmup_max_lr']}"
    if kind == "WarmupLR":
        yield "schedule=constant", f"scheduler.type={kind}"
        return
    total = int(params["total_num_steps"])
    yield f"schedule.total_steps={total}", f"scheduler.params.total_num_steps={total}"
    if kind == "WarmupDecayLR":  # a line from the peak to 0
        yield "schedule=wsd", f"scheduler.type={kind}"
        yield f"schedule.decay_fraction={max(total - warmup, 1) / total}", ""
        yield "schedule.final=0.0", ""
    else:
        yield "schedule=cosine", f"scheduler.type={kind}"
        yield f"schedule.final={0.0001 if params['cos_min_ratio'] is None else params['cos_min_ratio']}", ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
