"""Names that users of other programs type are answered with Stoker's, and the answers are accepted."""

from __future__ import annotations

import re

import pytest

from stoker.conf.compose import compose
from stoker.conf.overrides import dashed, names_a_file, parse
from stoker.conf.peer_names import ANSWERS
from stoker.conf.schema import leaves
from stoker.conf.values import ConfigError

TYPED = {
    # transformers
    "learning_rate=5e-5": "optim.lr=5e-5",
    "per_device_train_batch_size=4": "batch.micro_size=4",
    "gradient_accumulation_steps=8": "batch.size=32 batch.micro_size=8",
    "num_train_epochs=3": "data.epochs=3",
    "max_steps=500": "steps=500",
    "warmup_ratio=0.03": "schedule.warmup_steps=100",
    "lr_scheduler_type=linear": "schedule=cosine",
    "max_grad_norm=0.5": "grad_clip_norm=0.5",
    "bf16=true": "precision=bf16",
    "gradient_checkpointing=true": "activation_checkpointing=full",
    "logging_steps=5": "log.every=5",
    "save_steps=50": "checkpoint.every=50",
    "save_total_limit=2": "checkpoint.keep=2",
    "eval_steps=50": "eval.every=50",
    "output_dir=out": "run.dir=out",
    "report_to=wandb": "tracker=wandb",
    "model_name_or_path=base": "model.init_from=base",
    "torch_compile=true": "compile=true",
    # nanoGPT
    "batch_size=12": "batch.size=12",
    "block_size=256": "seq_len=256",
    "max_iters=2000": "steps=2000",
    "n_layer=4": "model.num_hidden_layers=4",
    "n_head=4": "model.num_attention_heads=4",
    "n_embd=128": "model.hidden_size=128",
    "eval_interval=250": "eval.every=250",
    "grad_clip=1.0": "grad_clip_norm=1.0",
    "min_lr=1e-4": "schedule.final=0.1",
    "beta2=0.99": "optim.betas=[0.9,0.95]",
    # litgpt
    "max_tokens=3000000": "tokens=3000000",
    "train.global_batch_size=64": "batch.size=64",
    "train.micro_batch_size=4": "batch.micro_size=4",
    "devices=4": "launch.nproc=4",
    # torchtitan
    "training.local_batch_size=8": "batch.micro_size=8",
    "training.steps=1000": "steps=1000",
    "optimizer.lr=8e-4": "optim.lr=8e-4",
    "parallelism.tensor_parallel_degree=2": "parallel.tp=2",
    "parallelism.data_parallel_shard_degree=4": "parallel.zero=3",
    "checkpoint.interval=500": "checkpoint.every=500",
    # Megatron-LM
    "tensor_model_parallel_size=8": "parallel.tp=8",
    "pipeline-model-parallel-size=4": "parallel.pp=4",
    "train_iters=100": "steps=100",
    "lr_warmup_iters=10": "schedule.warmup_steps=10",
    "clip_grad=1.0": "grad_clip_norm=1.0",
    "ffn_hidden_size=1024": "model.intermediate_size=1024",
    # DeepSpeed, Accelerate, torchrun, axolotl
    "zero_optimization.stage=2": "parallel.zero=2",
    "train_micro_batch_size_per_gpu=2": "batch.micro_size=2",
    "gradient_clipping=1.0": "grad_clip_norm=1.0",
    "mixed_precision=no": "precision=bf16",
    "num_processes=2": "launch.nproc=2",
    "sequence_len=2048": "seq_len=2048",
    "val_set_size=0.1": "data.validation=0.02",
}
DASHED = {
    "--optim.lr=3e-4": "optim.lr=3e-4",
    "--steps=5": "steps=5",
    "--max-steps=5": "steps=5",
    "--learning_rate": "optim.lr=3e-4",
    "--bf16": "precision=bf16",
    "--local-rank=0": "launch.nproc=2",
    "--nproc_per_node=8": "launch.nproc=8",
}


def advice(line: str) -> str:
    found = re.search(r"(?:Stoker's is|settings have no dashes:) (.*?)(?: \(|$)", line)
    assert found is not None, line
    return found[1]


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("plus", ["", "+"])
def test_a_peers_name_is_answered_with_ours_in_one_line(typed: str, plus: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(plus + typed)
    assert "\n" not in str(error.value) and advice(str(error.value).partition(" (+ adds")[0]) == TYPED[typed]


@pytest.mark.parametrize("typed", DASHED)
def test_an_option_of_theirs_is_answered_with_a_setting(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    from stoker.launch.cli import main

    assert advice(dashed(typed)) == DASHED[typed]
    with pytest.raises(SystemExit) as end:
        main(["train", typed])
    assert end.value.code == 2 and DASHED[typed] in capsys.readouterr().err


def test_an_option_that_nothing_is_known_of_is_answered_with_the_form_of_settings() -> None:
    assert dashed("--qqq") == "settings of a run are KEY=VALUE, such as steps=1000"


def test_no_peers_name_is_a_key_of_ours() -> None:
    assert not set(ANSWERS) & {key for key, _, _ in leaves()}


@pytest.mark.long
def test_what_is_advised_is_accepted() -> None:
    """Composing takes a third of a second: settings of different keys are composed together."""
    starts: list[dict[str, str]] = []
    for answer in ANSWERS.values():
        for word in answer.ours.replace("{}", answer.example).split():
            if not names_a_file(word):
                key = word.partition("=")[0]
                start = next((words for words in starts if words.get(key, word) == word), None)
                if start is None:
                    starts.append(start := {})
                start[key] = word
    for words in starts:
        compose(list(words.values()))
