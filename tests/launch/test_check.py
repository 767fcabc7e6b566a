"""`stoker check` says whether a layout computes the same, and cannot be fooled by one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import SMALL, command, finish

# A model whose gradient depends on how many ranks there are: what a wrong reduction does.
WRONG = """
import torch.distributed as dist
from stoker.models.decoder import build as decoder


def build(config, part):
    model = decoder(config, part)
    if dist.is_initialized() and dist.get_world_size() > 1:
        block = model.num_hidden_layers["1"].mlp.up
        block.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 1.001,))
    return model
"""


@pytest.fixture(scope="module")
def home(home: Path) -> Path:
    (home / "wrong.py").write_text(WRONG)
    return home


def check(home: Path, *words: str) -> tuple[int, str]:
    kept = [word for word in SMALL if not word.startswith(("steps=", "launch.nproc", "precision", "parallel"))]
    return finish(home, command("check", *kept, f"data.path={home / 'text'}", *words))


@pytest.mark.parametrize(
    "layout",
    [
        ["launch.nproc=2", "parallel.zero=3"],
        ["launch.nproc=4", "parallel.tp=2", "parallel.pp=2"],
        ["launch.nproc=2", "parallel.zero=3", "--against", "launch.nproc=2 parallel.zero=0"],
        ["launch.nproc=2", "parallel.tp=2", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_a_layout_that_computes_the_same_is_told_so(home: Path, layout: list[str]) -> None:
    status, output = check(home, *layout)
    assert status == 0 and "the same run" in output and "differs" not in output.replace("differs by", ""), output
    for what in ("loss", "gradient norm", "gradient "):
        assert what in output


def test_a_layout_that_computes_something_else_is_found_out_and_the_tensor_named(home: Path) -> None:
    status, output = check(home, "launch.nproc=2", "parallel.zero=2", "model.target=wrong:build")
    assert status == 1 and "not the same run" in output, output
    assert "layers.1.mlp.up" in output and "differs" in output.replace("differs by", "")


def test_what_cannot_start_is_refused_in_one_line(home: Path) -> None:
    for words, reason in ((["launch.nproc=3", "parallel.tp=2"], "tp 2"), (["--steps", "0"], "--steps=0")):
        status, output = check(home, *words)
        assert status != 0 and reason in output and len(output.strip().splitlines()) == 1, output
