"""Budgets of tokens and epochs become the steps and the schedule of a run, at its first start and once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker.conf.resume import merge
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data import open_rows
from stoker.trainer.budget import settle_steps
from stoker.trainer.settle import settle_config
from tests.launch.runs import SMALL, write_text


def words(folder: Path, *more: str) -> list[str]:
    small = [word for word in SMALL if not word.startswith("steps=")]
    write_text(folder / "text")
    return [*small, f"data.path={folder / 'text'}", f"run.dir={folder / 'run'}", f"data.cache={folder}", *more]


def settled(folder: Path, *more: str, **options: Any) -> Config:
    return settle_config(words(folder, *more), lambda _: (2, 0), **options)[0]


@pytest.mark.parametrize(("tokens", "steps"), [("1e4", 40), ("10000", 40), ("256", 1), ("257", 2)])
def test_a_budget_of_tokens_is_steps_and_the_schedule_of_a_run(tmp_path: Path, tokens: str, steps: int) -> None:
    told: list[str] = []
    config = settled(tmp_path, f"tokens={tokens}", tell=told.append)  # of 8 x 32 a step
    assert (config.steps, config.schedule.total_steps) == (steps, steps)
    assert told == [f"tokens={float(tokens):g} makes steps={steps} of 8 x 32 tokens"]


def test_epochs_are_the_steps_in_which_every_sequence_is_read(tmp_path: Path) -> None:
    config = settled(tmp_path, "data.epochs=2")
    assert config.steps == config.schedule.total_steps == open_rows(config, "train").rows_per_epoch * 2 // 8 > 10
    assert settled(tmp_path, "data.epochs=2", "steps=7").steps == 7
    assert settled(tmp_path, "data.epochs=2", "tokens=256").steps == 1
    assert settled(tmp_path).steps == Config().steps


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["steps=7", "tokens=1e9"], r"steps=7 with tokens=1e\+09: both say how long the run is"),
        (["tokens=0"], "tokens=0.0: must be above 0"),
        (["tokens=many"], "tokens=many: expected a number or null"),
        (["data.epochs=1", "data.mode=streaming"], r"known only when all has been read. steps=N or tokens=N beside it"),
        (
            ["data.epochs=1", "batch.size=8000"],
            r"data.epochs=1 makes \d+ sequences of 32 tokens, fewer than batch.size",
        ),
        (["tokens=256", "schedule.warmup_steps=9"], "warmup_steps=9 do not fit into 1 steps"),
    ],
)
def test_a_budget_that_makes_no_steps_is_refused(tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settled(tmp_path, *more)


def test_what_a_budget_made_stays_until_another_is_given(tmp_path: Path) -> None:
    stored = settled(tmp_path, "tokens=10000")

    def resumed(*more: str) -> Config:
        return settle_steps(merge(stored, more)[0], more, first=False)

    assert resumed("launch.nproc=1") == merge(stored, ["launch.nproc=1"])[0]
    longer = resumed("tokens=20000")
    assert (longer.steps, longer.schedule.total_steps) == (79, 40), "a schedule is pinned at the first start"
    assert (resumed("steps=50").steps, resumed("steps=50").tokens) == (50, None)


def test_the_command_that_began_a_run_is_the_same_before_its_first_checkpoint(tmp_path: Path) -> None:
    from stoker.conf.rundir import run_directory, write_config

    config = settled(tmp_path, "tokens=10000")
    write_config(run_directory(config), config)
    assert settled(tmp_path, "tokens=10000") == config
    with pytest.raises(ConfigError, match=r"schedule.total_steps: 40 -> 79"):
        settled(tmp_path, "tokens=20000")
