"""A sweep runs every point once, in a directory of its own, however often it is interrupted and given again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stoker.conf.identity import Identity, write_identity
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory, make_run_directory, next_attempt, write_config
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch import sweep as sweeps
from stoker.launch.cli import main
from stoker.launch.slurm.batch import job_from, own_file, settings_of
from stoker.launch.slurm.submit import settled
from stoker.launch.sweep.points import chosen, divided, grid
from stoker.launch.sweep.trials import Trials
from stoker.trainer.runtime.outcome import Ending, Outcome, write_ending
from tests.launch.runs import assert_same_state, overrides, steps_of, train_forked, train_here, write_text

TWO = ["optim.lr=1e-3,3e-4"]


class Trainers:
    """In the place of `stoker train`: writes what a run leaves, and ends as it is told to."""

    def __init__(self) -> None:
        self.started: list[str] = []  # the names of the run directories
        self.points: list[tuple[float, int]] = []
        self.ends: dict[str, tuple[Outcome, int]] = {}  # by name of the directory; else completed

    def __call__(self, words: Sequence[str]) -> int:
        given = {override.key: override.value for override in map(parse, words)}
        config, run = Config(), RunDirectory(Path(given["run.dir"]))
        config.run.name, config.optim.lr = given["run.name"], given["optim.lr"]
        config.model.num_hidden_layers = given.get("model.num_hidden_layers", 0)
        self.started.append(run.path.name)
        self.points.append((config.optim.lr, config.model.num_hidden_layers))
        make_run_directory(run, public=False)
        write_config(run, config)
        number = next_attempt(run)
        outcome, status = self.ends.pop(run.path.name, (Outcome.COMPLETED, 0))
        loss = config.optim.lr * 1000
        run.metrics.write_text(json.dumps({"step": 3, "loss": 9.0, "val_loss": loss, "tokens": 5}) + "\n")
        write_ending(run, number, Ending(outcome, "as told", 3))
        return status


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainers:
    found = Trainers()
    monkeypatch.setattr(sweeps, "train", found)
    monkeypatch.chdir(tmp_path)
    return found


def test_commas_outside_brackets_and_quotes_divide_a_value() -> None:
    words = [
        "steps=5", "optim.lr=1e-3,3e-4", "optim.betas=[0.9,0.95],[0.9,0.99]", "profile.steps=[1,2]", "--config=a,b",
        "data.path='a,b'", "model=tiny,small", "optim.lr=1e-3",
    ]  # fmt: skip
    fixed, swept = divided(words)
    assert fixed == ["steps=5", "profile.steps=[1,2]", "--config=a,b", "data.path='a,b'", "optim.lr=1e-3"]
    assert swept == [
        ["optim.lr=1e-3", "optim.lr=3e-4"],
        ["optim.betas=[0.9,0.95]", "optim.betas=[0.9,0.99]"],
        ["model=tiny", "model=small"],
    ]
    assert divided(["optim.lr=1e-3,1e-3,2e-3"])[1] == [["optim.lr=1e-3", "optim.lr=2e-3"]], "no point occurs twice"
    with pytest.raises(ConfigError, match="one of its values is empty"):
        divided(["optim.lr=1e-3,"])


def test_a_grid_has_all_combinations_and_a_random_choice_different_ones() -> None:
    swept = [["a=1", "a=2", "a=3"], ["b=1", "b=2"]]
    points = grid(swept)
    assert points == [(a, b) for a in swept[0] for b in swept[1]]
    some = chosen(swept, 4, seed=1)
    assert len(set(some)) == 4 and set(some) <= set(points) and some == chosen(swept, 4, seed=1)
    assert set(chosen(swept, 100, seed=1)) == set(points)
    with pytest.raises(ConfigError, match="--random 50"):
        grid([[f"k{key}={value}" for value in range(10)] for key in range(5)])
    assert len(chosen([[f"k{key}={value}" for value in range(10)] for key in range(9)], 50, seed=0)) == 50


def test_every_point_is_run_once_and_the_best_stands_first(
    trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["sweep", "run.dir=all", *TWO, "model.num_hidden_layers=2,4", "steps=3"]
    assert main(words) == 0
    assert trainers.started == ["0", "1", "2", "3"]
    assert trainers.points == [(1e-3, 2), (1e-3, 4), (3e-4, 2), (3e-4, 4)]
    shown = capsys.readouterr().out
    assert shown.index("optim.lr=3e-4 model.num_hidden_layers=2") < shown.index("optim.lr=1e-3")
    assert (tmp_path / "all" / "report.html").read_text().count("all-2") > 1
    assert main(words) == 0
    assert len(trainers.started) == 4, "given again it starts nothing"
    assert main(["train", "-m", "run.dir=all", *TWO, "model.num_hidden_layers=4,6", "steps=3"]) == 0
    assert trainers.started[4:] == ["4", "5"], "trials keep their numbers, and new ones follow"


@pytest.mark.long
def test_what_was_interrupted_goes_on_and_what_failed_is_tried_again(trainers: Trainers, tmp_path: Path) -> None:
    words = ["sweep", "run.dir=all", "optim.lr=1e-3,3e-4,1e-4"]
    trainers.ends = {"0": (Outcome.FAILED, 1), "1": (Outcome.STOPPED, 0)}
    assert main(words) == 130
    assert trainers.started == ["0", "1"], "a person who stops a trial stops the sweep"
    trainers.ends = {"1": (Outcome.PREEMPTED, 75)}
    assert main(words) == 75
    assert trainers.started == ["0", "1", "0", "1"]
    trainers.ends = {"1": (Outcome.NONFINITE, 1)}
    assert main(words) == 1
    assert trainers.started[4:] == ["1", "2"] and len(RunDirectory(tmp_path / "all" / "1").attempt_numbers()) == 3
    assert main(words) == 1
    assert len(trainers.started) == 6


def test_a_trial_that_was_killed_before_its_first_checkpoint_starts_over(
    trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words, run = ["sweep", "run.dir=all", *TWO], RunDirectory(tmp_path / "all" / "0")
    trainers.ends = {"0": (Outcome.FAILED, 1), "1": (Outcome.FAILED, 1)}
    assert main(words) == 1
    other = RunDirectory(tmp_path / "all" / "1")
    write_identity(other, Identity("0" * 32, str(other.path), os.stat(other.path).st_ino, saved=True))
    assert main(words) == 0 and trainers.started == ["0", "1", "0", "1"]
    assert (run.earlier(1) / "metrics.jsonl").exists() and not other.earlier(1).exists()
    told = f"it ended at step 3, before its first checkpoint, and starts over; those steps are in {run.earlier(1)}"
    assert told in capsys.readouterr().err


def test_a_point_that_is_refused_is_named_before_any_run_begins(
    trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, message in (
        (["optim.lr=1e-3,0"], "optim.lr=0: optim.lr=0.0: must be above 0"),
        (["optim.lr=1e-3,x"], "optim.lr=x: optim.lr=x: expected a number"),
        (["optim.lr=1e-3"], "nothing to sweep"),
        ([*TWO, "run.fresh=true"], "would do finished trials again"),
        ([*TWO, "--ask", "true"], "optim.lr has several values"),
        ([*TWO, "--random", "0"], "at least 1"),
        (["optm.lr=1,2"], "did you mean 'optim.lr'"),
    ):
        assert main(["sweep", "run.dir=all", *words]) == 2
        assert message in capsys.readouterr().err
    assert trainers.started == [] and not (tmp_path / "all" / "0").exists()


def test_one_process_at_a_time_runs_a_sweep(trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with Trials(tmp_path / "all").held():
        assert main(["sweep", "run.dir=all", *TWO]) == 2
    assert "another process is running the sweep" in capsys.readouterr().err
    assert main(["sweep", "run.dir=all", *TWO]) == 0


PROPOSER = """
import json, pathlib, sys
results = json.load(sys.stdin)
with open("seen.jsonl", "a") as file:
    file.write(json.dumps(results) + "\\n")
rates = [1e-3, 5e-4, 2e-4]
if len(results) < 3:
    print(json.dumps({"optim.lr": rates[len(results)], "model.num_hidden_layers": 2}))
"""


def test_a_program_proposes_each_point_from_the_results_before(trainers: Trainers, tmp_path: Path) -> None:
    (tmp_path / "propose.py").write_text(PROPOSER)
    words = ["sweep", "run.dir=asked", "--ask", f"{sys.executable} propose.py"]
    trainers.ends = {"1": (Outcome.PREEMPTED, 75)}
    assert main(words) == 75
    assert main(words) == 0
    assert trainers.started == ["0", "1", "1", "2"]
    assert [point[0] for point in trainers.points] == [1e-3, 5e-4, 5e-4, 2e-4]
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [len(results) for results in seen] == [0, 1, 2, 3], "an interrupted proposal is not asked for again"
    assert seen[-1][1] == {
        "number": 1, "settings": {"optim.lr": 5e-4, "model.num_hidden_layers": 2}, "value": 0.5, "outcome": "completed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('3e-4')", "expected a JSON object"),
        ("print('{}')", "expected a JSON object"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('{\"optim.lr\": -1}')", "must be above 0"),
        ("print('{\"optim.lr\": 1e-3}')", "a second time"),
        ('print(\'{"model.target": "evil:build"}\')', "cannot change which code runs"),
    ],
)
def test_a_bad_proposal_ends_the_sweep(
    trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture, program: str, message: str
) -> None:
    (tmp_path / "propose.py").write_text(program)
    assert main(["sweep", "run.dir=asked", "--ask", f"{sys.executable} propose.py"]) == 2
    assert message in capsys.readouterr().err


def test_a_list_of_trials_that_another_wrote_runs_no_code(
    trainers: Trainers, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "asked").mkdir()
    stored = {"trials": [["model.target=evil:build"]], "job": None}
    (tmp_path / "asked" / "sweep.json").write_text(json.dumps(stored))
    assert main(["sweep", "run.dir=asked", "--ask", "true"]) == 2
    assert "cannot change which code runs" in capsys.readouterr().err and trainers.started == []
    (tmp_path / "asked" / "sweep.json").write_text('{"trials": [3]}')
    assert main(["sweep", "run.dir=asked", *TWO]) == 1
    assert "sweep.json is not the list of a sweep's trials" in capsys.readouterr().err


@pytest.mark.long
def test_on_slurm_a_sweep_is_one_array_with_a_file_of_settings_for_each_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    submitted: list[list[str]] = []
    state = {"JobState": "PENDING"}
    monkeypatch.setattr("stoker.launch.slurm.submit.submit_jobs", lambda words: submitted.append(words) or ["17"])
    monkeypatch.setattr("stoker.launch.slurm.commands.facts_of_job", lambda job: state)
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "launch=slurm", "run.dir=all", "optim.betas=[0.9,0.95],[0.8,0.9]", "model=tiny,small"]
    assert main(words) == 0
    assert [word for word in submitted[0] if word.startswith("launch.array")] == ["launch.array=0,1,2,3"]
    text = settled(submitted[0]).text
    assert "settings/{task}.yaml" in text and "#SBATCH --array=0,1,2,3" in text
    job = job_from({"SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"})
    from stoker.conf.compose import compose
    from stoker.conf.files import expand

    own = settings_of(job, expand([own_file(job, word) for word in submitted[0]]))
    config = compose([word for word in own if not word.startswith("launch.array")])
    assert (config.optim.betas, config.model.name, config.run.dir) == ([0.8, 0.9], "small", str(tmp_path / "all" / "3"))
    assert main(words) == 0
    assert len(submitted) == 1 and "job 17 of this sweep is pending" in capsys.readouterr().err
    state["JobState"] = "COMPLETED"
    for number in (0, 2):
        run = RunDirectory(tmp_path / "all" / str(number))
        run.attempt(1).mkdir(parents=True)
        write_ending(run, 1, Ending(Outcome.COMPLETED, "", 3))
    killed = RunDirectory(tmp_path / "all" / "1")  # before its first checkpoint
    killed.attempt(1).mkdir(parents=True)
    killed.metrics.write_text('{"step": 1, "loss": 9.0}\n')
    assert main(words) == 0
    assert "launch.array=1,3" in submitted[1], "what is done is not submitted again"
    assert not killed.metrics.exists() and (killed.earlier(1) / killed.metrics.name).exists()


@pytest.mark.long
def test_the_runs_of_a_sweep_are_those_of_the_same_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = write_text(tmp_path / "text")
    monkeypatch.setattr(sweeps, "train", lambda words: train_forked(tmp_path, list(words))[0])
    words = overrides(tmp_path / "swept", text, "steps=4", "launch.nproc=1", "parallel.zero=0", "optim.lr=1e-2,3e-3")
    assert main(["sweep", *words]) == 0
    alone = [word if not word.startswith("optim.lr") else "optim.lr=3e-3" for word in words]
    train_here(tmp_path, [*[word for word in alone if "run.dir" not in word], f"run.dir={tmp_path / 'alone'}"])
    assert steps_of(tmp_path / "swept" / "1") == steps_of(tmp_path / "alone")
    assert_same_state(tmp_path / "swept" / "1", tmp_path / "alone")
    assert steps_of(tmp_path / "swept" / "0") != steps_of(tmp_path / "alone")
