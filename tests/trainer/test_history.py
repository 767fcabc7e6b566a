"""A run with metrics and no checkpoint never starts over automatically, and keeps its metrics when it does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stoker.checkpoint import fence, newest
from stoker.conf.identity import Identity, write_identity
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import to_dict
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.trainer.history import SavedOnce, begin_anew, has_saved
from stoker.trainer.rendezvous import CONFIG_VARIABLE
from stoker.trainer.report.metrics import last_step
from tests.launch.runs import steps_of, train_here
from tests.trainer.lives import ONE, settled, trained_run, twin, words_of
from tests.trainer.report.observed import Report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history")


@pytest.fixture(scope="module")
def trained(home: Path) -> RunDirectory:
    return trained_run(home)


@pytest.fixture
def purged(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """Its checkpoints were removed, as from a scratch disk."""
    run = twin(trained, tmp_path / "run")
    for checkpoint in newest(run.checkpoints):
        shutil.rmtree(checkpoint)
    return run


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


@pytest.mark.parametrize("gone", ["steps", "folder"])
def test_a_start_without_its_checkpoints_is_refused_and_changes_nothing(
    home: Path, purged: RunDirectory, gone: str, capsys: pytest.CaptureFixture
) -> None:
    if gone == "folder":
        shutil.rmtree(purged.checkpoints)
    before = contents(purged)
    for words in ([f"run.dir={purged.path}", "steps=6"], words_of(purged.path, home / "text", "steps=6")):
        assert main(["train", *words]) == 2
        said = capsys.readouterr().err
        assert "4 steps in metrics.jsonl" in said and str(purged.checkpoints) in said and "run.fresh=true" in said
    assert contents(purged) == before


def test_a_launcher_that_starts_again_does_not_begin_anew_either(
    home: Path, trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that settles anew, nor ranks that were handed their config."""
    run = twin(trained, tmp_path / "run")
    words = words_of(run.path, home / "text", "steps=6")
    config = settled(words)
    for checkpoint in newest(run.checkpoints):
        shutil.rmtree(checkpoint)
    with pytest.raises(ConfigError, match="no valid checkpoint"):
        settled(words, restarted=True)
    curve = run.metrics.read_bytes()
    monkeypatch.setenv(CONFIG_VARIABLE, json.dumps(to_dict(config)))
    with pytest.raises(AssertionError, match=r"4 steps in metrics\.jsonl and has no valid checkpoint"):
        train_here(home, words)
    assert run.metrics.read_bytes() == curve


def test_a_new_beginning_keeps_curve_and_config(home: Path, purged: RunDirectory) -> None:
    curve, config = purged.metrics.read_bytes(), purged.config.read_bytes()
    train_here(home, words_of(purged.path, home / "text", "run.fresh=true", "optim.lr=1e-3", "steps=2"))
    earlier = purged.earlier(1)
    assert (earlier / "metrics.jsonl").read_bytes() == curve and (earlier / "config.yaml").read_bytes() == config
    assert (earlier / "tokenizer").is_dir() and purged.tokenizer.is_dir()
    assert [step[0] for step in steps_of(purged.path)] == [1, 2]
    stored = read_config(purged)
    assert stored.optim.lr == 1e-3 and not stored.run.fresh
    train_here(home, [f"run.dir={purged.path}", "steps=3", *ONE])
    assert [step[0] for step in steps_of(purged.path)] == [1, 2, 3]
    assert not purged.earlier(2).exists(), "a key of one start is not applied by the next"


def test_a_launcher_that_starts_a_run_again_that_never_saved_begins_at_step_1(
    home: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    """A kill before the first checkpoint costs the steps until then, and needs no request."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    shutil.copy(trained.metrics, run.metrics)
    words = words_of(run.path, home / "text", "run.fresh=true")
    assert settled(words, restarted=True).run.fresh is False
    with pytest.raises(ConfigError, match="no valid checkpoint"):
        settled(words_of(run.path, home / "text"))


def test_another_config_is_not_put_in_the_place_of_one_that_never_trained(
    home: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    shutil.copy(trained.config, run.config)
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 32 -> 256"):
        settled([f"run.dir={run.path}"])
    assert settled(words_of(run.path, home / "text", "launch.threads=2")).model.hidden_size == 32
    assert settled([f"run.dir={run.path}", "run.fresh=true"]).model.hidden_size == 256


def test_damaged_checkpoints_do_not_prevent_starting_over(trained: RunDirectory, tmp_path: Path) -> None:
    run = twin(trained, tmp_path / "run")
    for checkpoint in newest(run.checkpoints):
        (checkpoint / "MANIFEST.json").write_text("{}")
    with pytest.raises(ConfigError, match="no valid checkpoint"):
        settled([f"run.dir={run.path}", "steps=6"])
    assert begin_anew(run) == run.earlier(1)
    assert sorted(path.name for path in (run.checkpoints / "damaged").iterdir()) == ["step-00000002", "step-00000004"]
    assert not run.config.exists() and last_step(run.metrics) == 0 and not has_saved(run)
    assert begin_anew(run) is None


def test_the_first_checkpoint_is_noted_and_one_that_failed_is_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_identity(run, Identity("0" * 32, str(tmp_path), os.stat(tmp_path).st_ino))
    note = SavedOnce(run)
    note.checkpoint(Report(1, error="no space"))
    assert not has_saved(run)
    note.checkpoint(Report(2))
    assert has_saved(run)
    assert json.loads(run.identity.read_text())["run"] == "0" * 32


def test_attempt_numbers_continue_so_that_orphans_stay_fenced(home: Path, purged: RunDirectory) -> None:
    fence(purged.checkpoints, 1)
    train_here(home, words_of(purged.path, home / "text", "run.fresh=true", "steps=1"))
    assert purged.attempt_numbers() == [1, 2]
    assert json.loads((purged.checkpoints / "FENCE").read_text())["attempt"] == 2
