"""The validation loss of whole runs, on every layout, and the checkpoint that is kept for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stoker.checkpoint import VALIDATION_LOSS, newest, read_tensors
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config
from stoker.conf.targets import import_target
from stoker.data import open_samples, read_rows
from stoker.parallel.model import whole_model
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.loop import Trainer
from stoker.trainer.report.metrics import read
from stoker.trainer.step_log import Progress
from tests.launch.runs import overrides, train_here, write_text

ROWS = 5  # over two data-parallel ranks one has a row less
WORDS = [
    f"eval.sequences={ROWS}", "eval.every=2", "steps=10", "checkpoint.every=2", "checkpoint.keep=1",
    "checkpoint.keep_best=1",
    "model.num_key_value_heads=2", "schedule=constant", "schedule.warmup_steps=10", "optim=sgd", "optim.momentum=0",
    "optim.lr=2", "optim.weight_decay=0.5",  # of the last steps' learning rate it takes away what was learned
]  # fmt: skip
LAYOUTS = {
    "one process": ["launch.nproc=1", "parallel.zero=0"],
    "zero 3": ["parallel.zero=3"],
    "tp 2": ["parallel.zero=0", "parallel.tp=2"],
    "pp 2": ["parallel.zero=0", "parallel.pp=2"],
}


NAMES = [name if name in ("one process", "zero 3") else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """A run of the layout of that name, trained when it is first asked for."""
    home = tmp_path_factory.mktemp("validation")
    write_text(home / "text")

    @cache
    def run_of(name: str) -> RunDirectory:
        train_here(home, overrides(home / name, home / "text", *WORDS, *LAYOUTS[name]))
        return RunDirectory(home / name)

    return run_of


def validation_losses(run: RunDirectory) -> dict[int, float]:
    return {step["step"]: step["val_loss"] for step in read(run.metrics) if step.get("val_loss") is not None}


def loss_of(checkpoint: Path, config: Config) -> float:
    """Of the validation rows, computed in one process with the weights of a checkpoint."""
    model = import_target(config.model.target)(config.model, whole_model(config.model.num_hidden_layers))
    tensors = dict(read_tensors(checkpoint))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name])
    sample = open_samples(config)[0]
    assert sample.split == "validation" and len(sample.numbers) == ROWS
    rows = read_rows(sample.plan, sample.numbers)
    with torch.no_grad():
        total = model(rows.tokens, rows.positions, rows.documents if config.data.document_mask else None, rows.labels)
    return total.item() / int(rows.valid_tokens())


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_finds_the_validation_loss_of_one_process(
    run_of: Callable[[str], RunDirectory], name: str
) -> None:
    found, expected = validation_losses(run_of(name)), validation_losses(run_of("one process"))
    assert list(found) == [2, 4, 6, 8, 10]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_checkpoint_is_kept_and_its_weights_have_the_loss_that_was_written(
    run_of: Callable[[str], RunDirectory], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(run.path.parent / "cache"))
    losses = validation_losses(run)
    best = min(losses, key=lambda step: losses[step])
    assert best not in (2, 10), "the best must be neither the first nor the newest, or anything would keep it"
    kept = {int(path.name.removeprefix("step-")): path for path in newest(run.checkpoints)}
    assert sorted(kept) == [best, 10]
    config = with_vocabulary(read_config(run))
    for step, path in kept.items():
        assert loss_of(path, config) == pytest.approx(losses[step], rel=1e-5)


@pytest.mark.parametrize(("step", "expected"), [(4, 1.5), (5, None)])
def test_a_checkpoint_between_two_evaluations_has_no_validation_loss(step: int, expected: float | None) -> None:
    rows, engine = SimpleNamespace(state=dict), SimpleNamespace(state=dict)
    progress = Progress(step=step, val_loss=1.5, val_step=4)
    mesh = SimpleNamespace(layout=None)
    trainer = SimpleNamespace(
        progress=progress, rows=rows, engine=engine, config=Config(), mesh=mesh, observers=None, base=None
    )
    assert Trainer.state(trainer)[VALIDATION_LOSS] == expected  # type: ignore[arg-type]
