"""A file of DeepSpeed's settings becomes settings of ours, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.compose import compose
from stoker.conf.files import expand
from stoker.conf.schema import lookup
from stoker.conf.values import ConfigError
from stoker.trainer.settle import settle_config

WHOLE = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "steps_per_print": 20,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": False,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.99], "eps": 1e-7, "weight_decay": 0.2}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100, "total_num_steps": 1000}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
EXPECTED = {
    "parallel.engine": "deepspeed", "parallel.zero": 3, "parallel.offload": "cpu", "batch.size": 64,
    "batch.micro_size": 4, "grad_clip_norm": 0.5, "log.every": 20, "precision": "bf16", "optim.name": "adamw",
    "optim.lr": 3e-4, "optim.betas": [0.9, 0.99], "optim.eps": 1e-7, "optim.weight_decay": 0.2, "schedule.name": "wsd",
    "schedule.warmup_steps": 100, "schedule.total_steps": 1000, "schedule.decay_fraction": 0.9, "schedule.final": 0.0,
    "parallel.deepspeed": {
        "wall_clock_breakdown": False,
        "zero_optimization": {"offload_optimizer": {"pin_memory": True}, "stage3_prefetch_bucket_size": 5e7},
    },
}  # fmt: skip


def written(folder: Path, values: Any) -> str:
    (folder / "ds.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return f"parallel.deepspeed={folder / 'ds.json'}"


def expanded(folder: Path, values: Any, *more: str) -> tuple[list[str], list[str]]:
    lines: list[str] = []
    return expand([written(folder, values), *more], lines.append), lines


def test_a_file_of_settings_is_a_config_of_ours_and_each_translation_is_shown(tmp_path: Path) -> None:
    words, lines = expanded(tmp_path, WHOLE)
    config = compose(words)
    assert {key: lookup(config, key) for key in EXPECTED} == EXPECTED
    shown = [line.removeprefix(f"{tmp_path / 'ds.json'}: ") for line in lines]
    assert "zero_optimization.stage=3 is parallel.zero=3" in shown
    assert "scheduler.type=WarmupDecayLR is schedule=wsd" in shown and len(shown) == len(set(shown)) == 15


def test_the_words_of_a_command_line_win_and_every_start_reads_the_file(tmp_path: Path) -> None:
    words, _ = expanded(tmp_path, WHOLE, "batch.size=128", "optim.lr=1e-3")
    assert (compose(words).batch.size, compose(words).optim.lr) == (128, 1e-3)
    assert expand(words, pytest.fail) == words, "what is expanded once stays as it is"
    run = f"run.dir={tmp_path / 'run'}"
    config, _ = settle_config([*words, run, "launch.nproc=2", "steps=1000"], lambda _: (2, 0))
    assert config.parallel.zero == 3 and config.schedule.total_steps == 1000


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, {"precision": "fp32", "grad_clip_norm": 1.0}),
        ({"train_batch_size": "auto", "bf16": {"enabled": "auto"}}, {"batch.size": 32}),
        ({"fp16": {"enabled": True, "loss_scale": 0, "hysteresis": 2}}, {"precision": "fp16"}),
        ({"gradient_clipping": 0.0}, {"grad_clip_norm": None}),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
            {"optim.name": "sgd", "optim.lr": 0.1},
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {"parallel.offload": "cpu"}),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/disk"}}},
            {"parallel.offload": "nvme", "parallel.nvme_path": "/disk"},
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5}}},
            {"schedule.name": "constant", "schedule.warmup_steps": 5, "optim.lr": 0.01},
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 50, "warmup_num_steps": 5}}},
            {"schedule.name": "cosine", "schedule.total_steps": 50, "schedule.final": 1e-4},
        ),
    ],
)
def test_what_is_not_said_is_ours(tmp_path: Path, values: Any, words: dict[str, Any]) -> None:
    config = compose(expanded(tmp_path, values)[0])
    assert {key: lookup(config, key) for key in words} == words


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb has no equal: optim.target="),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type=OneCycle has no equal"),
        ({"scheduler": {"type": "WarmupCosineLR"}}, "needs its params.total_num_steps"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode=false"),
        ({"optimizer": {"type": "SGD", "params": {"weight_decay": 0.1}}}, "weight_decay of SGD is added"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale=128: the loss scale is dynamic here"),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8},
            "on one rank 32 sequences, so batch.size=32",
        ),
        ("{", "it is not JSON"),
        ("[]", "it holds no object"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^parallel.deepspeed=.*ds.json: ") as error:
        expanded(tmp_path, values)
    assert message in str(error.value)


def test_a_setting_that_another_key_decides_is_refused_as_one_of_a_command_line_is(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    for values, message in (
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "parallel.deepspeed.tensor_parallel is set by Stoker: use parallel.tp",
        ),
        (
            {"zero_optimization": {"stages": 2}},
            "parallel.deepspeed.zero_optimization.stages is not passed on to DeepSpeed",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            settle_config([*expanded(tmp_path, values)[0], run, "launch.nproc=2"], lambda _: (2, 0))
    with pytest.raises(ConfigError, match=r"it cannot be read: .*gone.json: No such file"):
        expand(["parallel.deepspeed=gone.json"], pytest.fail)
