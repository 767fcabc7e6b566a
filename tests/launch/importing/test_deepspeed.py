"""Folders that DeepSpeed's engine itself writes, on two ranks, after a step of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from stoker.launch.cli import main
from tests import world
from tests.models.families import write_family

KEYS = ("exp_avg", "exp_avg_sq")


def trained_by_deepspeed(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """On a rank: two steps of the model in `folder`, saved beside its config.json. On rank 0 weights and moments after
    them, as DeepSpeed itself gives them.
    """
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from transformers import AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of a compiler
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = list(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameters, lr=1e-2),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for step in range(2):
        tokens = torch.randint(0, 320, (1, 20), generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step1")
    found = {}
    for name, parameter in model.named_parameters():
        for key in KEYS:
            found[f"{key}/{name}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, key).float().clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[f"weight/{name}"] = parameter.detach().float().clone()
    return found if dist.get_rank() == 0 else {}


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_s_engine_trained_and_saved_comes_in(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_family(tmp_path / "source", "qwen2")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = world.run(trained_by_deepspeed, 2, tmp_path / "source", stage, timeout=180.0, fresh=True)[0]
    (tmp_path / "source" / "model.safetensors").unlink()
    assert (tmp_path / "source" / "latest").read_text() == "global_step1"
    capsys.readouterr()
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--trust"]) == 0
    line = capsys.readouterr().err
    assert "logits equal to the source's within" in line and "AdamW's moments after 2 updates" in line
    assert "not imported" not in line
    for kind in ("weight", *KEYS):
        place = tmp_path / "out" if kind == "weight" else tmp_path / "out" / "optimizer" / kind
        found = load_file(place / "model.safetensors")
        assert found.keys() == before.keys()
        for name, value in found.items():
            assert torch.equal(value, trained[f"{kind}/{name}"]), f"{kind} {name}"
            assert not torch.equal(value, before[name]), name
