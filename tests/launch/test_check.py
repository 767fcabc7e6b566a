"""`stoker check` reports whether a layout computes the same, and finds one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.launch import check_transformers
from stoker.launch.cli import main
from tests.launch.runs import SMALL, command, finish
from tests.models.families import write_family

# A model whose gradient depends on how many ranks there are: what a wrong reduction does.
WRONG = """
import torch.distributed as dist
from stoker.models.decoder import build as decoder


def build(config, part):
    model = decoder(config, part)
    if dist.is_initialized() and dist.get_world_size() > 1:
        block = model.layers["1"].mlp.up
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


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["launch.nproc=2", "parallel.zero=3"], marks=pytest.mark.full),
        ["launch.nproc=4", "parallel.tp=2", "parallel.pp=2"],
        pytest.param(
            ["launch.nproc=2", "parallel.zero=3", "--against", "launch.nproc=2 parallel.zero=0"], marks=pytest.mark.full
        ),
        pytest.param(["launch.nproc=2", "parallel.tp=2", "precision=bf16"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_a_layout_that_computes_the_same_is_reported_as_the_same(home: Path, layout: list[str]) -> None:
    status, output = check(home, *layout)
    assert status == 0 and "the same run" in output and "differs" not in output.replace("differs by", ""), output
    for what in ("loss", "gradient norm", "gradient "):
        assert what in output


@pytest.mark.parametrize(
    ("given", "precision", "eps"), [([], "fp32", 1e-6), (["precision=bf16", "optim.eps=1e-9"], "bf16", 1e-9)]
)
def test_rounding_is_not_amplified_unless_that_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], precision: str, eps: float
) -> None:
    started: list[Config] = []

    def launch(config: Config, *_: Any) -> int:
        started.append(config)
        return 1

    monkeypatch.setattr("stoker.launch.check.launch", launch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.chdir(home)
    kept = [word for word in SMALL if not word.startswith(("steps=", "precision"))]
    assert main(["check", *kept, f"data.path={home / 'text'}", *given]) == 1
    assert [(config.precision, config.optim.eps) for config in started] == [(precision, eps)]


@pytest.mark.long
def test_a_layout_that_computes_something_else_is_found_out_and_the_tensor_named(home: Path) -> None:
    status, output = check(home, "launch.nproc=2", "parallel.zero=2", "model.target=wrong:build")
    assert status == 1 and "not the same run" in output, output
    assert "layers.1.mlp.up" in output and "differs" in output.replace("differs by", "")


def test_what_cannot_start_is_refused_in_one_line(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = [word for word in SMALL if not word.startswith("launch.nproc")]
    for more, reason in ((["launch.nproc=3", "parallel.tp=2"], "tp 2"), (["--steps", "0"], "--steps=0")):
        assert main(["check", *kept, f"data.path={home / 'text'}", *more]) != 0
        output = "".join(capfd.readouterr())
        assert reason in output and len(output.strip().splitlines()) == 1, output


def words(home: Path, folder: Path, *more: str) -> list[str]:
    """Of a check of the model in `folder`, whose shape is its own."""
    small = [word for word in SMALL if word.startswith(("seq_len", "batch", "launch.threads"))]
    cache = f"data.cache={home / 'cache'}"
    return ["check", *small, "data=text", f"data.path={home / 'text'}", cache, f"model.init_from={folder}", *more]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("tied qwen2", ["launch.nproc=4", "parallel.tp=2", "parallel.pp=2", "batch.micro_size=4"]),
        ("llama with scaled rotary", ["launch.nproc=2", "parallel.zero=3", "data.packing=best_fit"]),
    ],
)
def test_an_imported_model_is_compared_with_transformers_on_any_layout(
    case: str, layout: list[str], home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_family(tmp_path, case)
    status = main([*words(home, tmp_path, *layout), "--against", "transformers"])
    output = capfd.readouterr().out
    assert status == 0 and "the same run" in output, output
    for what in ("loss", "logits", "gradient norm", "gradient "):
        assert what in output


@pytest.mark.long
def test_a_model_that_is_not_transformers_is_found_out(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = check_transformers.load_theirs

    def load_another(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.layers[1].mlp.up_proj.weight.data[0] *= 1.01
        return model

    write_family(tmp_path, "qwen3")
    monkeypatch.setattr(check_transformers, "load_theirs", load_another)
    status = main([*words(home, tmp_path, "launch.nproc=2", "parallel.tp=2"), "--against", "transformers"])
    output = capfd.readouterr().out
    assert status == 1 and "not the same run" in output, output
    verdicts = {line.split()[0]: line.split()[-1] for line in output.splitlines() if line.strip()}
    assert verdicts["logits"] == verdicts["gradient"] == "differs" and "of the batch" in output


def test_only_a_model_that_transformers_can_load_is_compared_with_it(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_family(tmp_path, "llama")
    for more, reason in (
        (["model.init_only=[layers.*]"], "model.init_only=['layers.*'] makes another model"),
        (["model.rope_parameters.rope_theta=500"], "makes another model than"),
        (["model.init_from=null"], "model.init_from=DIR names a model folder"),
    ):
        asked = [word for word in words(home, tmp_path) if word.split("=")[0] != more[0].split("=")[0]]
        assert main([*asked, *more, "--against", "transformers"]) == 2
        assert reason in capfd.readouterr().err
