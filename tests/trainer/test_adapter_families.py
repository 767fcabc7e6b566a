"""Adapters of models in transformers' own modules, and of experts, as peft has them: out, in again, and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stoker.conf.rundir import read_config
from stoker.launch.cli import main
from stoker.models.family import TRANSFORMERS
from stoker.models.peft_folder import CONFIG, WEIGHTS
from tests.adapted import adapter_run
from tests.models.families import write_family
from tests.trainer.test_adapter_runs import logits_of

ATTENTION = "adapter.target_modules=[q_proj,o_proj]"
STILL = ["optim=sgd", "optim.lr=1e-30", "optim.momentum=0.0", "steps=1"]
CASES = {
    "gemma3": ("gemma3", ["adapter=dora", "model.native=false"]),
    "mixtral": ("mixtral", [ATTENTION, "model.native=false"]),
    "experts": ("qwen3_moe", [ATTENTION]),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_any_family_goes_out_to_peft_and_comes_in_again(case: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    family, words = CASES[case]
    write_family(tmp_path / "base", family)
    run = adapter_run(tmp_path, "run", tmp_path / "base", *words, "steps=2")
    assert (read_config(run).model.target == TRANSFORMERS) == (case != "experts")
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(run.path), str(out)]) == 0
    assert main(["export", str(run.path), str(merged), "--merge"]) == 0

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base = logits_of(plain)
    adapted = peft.PeftModel.from_pretrained(plain, out)
    held, file = peft.get_peft_model_state_dict(adapted), load_file(out / WEIGHTS)
    assert held.keys() == file.keys() and all(torch.equal(held[name], value) for name, value in file.items())
    found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    theirs = logits_of(adapted)
    assert (theirs - base).norm() / base.norm() > 1e-3
    assert (found - theirs).abs().max() < 5e-5

    of_shape = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-", f"adapter.init_from={out}"]
    native = [word for word in words if word.startswith("model.")]
    again = adapter_run(tmp_path, "again", tmp_path / "base", *native, *of_shape, *STILL)
    assert main(["export", str(again.path), str(tmp_path / "out")]) == 0
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name
