"""Saves of real runs that fail, `stoker checkpoint`, and a run that moves to a new machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stoker.checkpoint import newest, read_state, verify
from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import (
    command,
    finish,
    last_step,
    overrides,
    started,
    steps_of,
    train_forked,
    train_here,
    wait_until,
    wait_until_gone,
)


def run_with_an_obstacle(home: Path, name: str, *more: str) -> tuple[int, str, RunDirectory]:
    """A run in which something else has the name of the checkpoint of step 5."""
    run = RunDirectory(home / name)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "step-00000005").touch()
    words = overrides(run.path, home / "text", "steps=14", "checkpoint.every=5", *more)
    status, output = train_forked(home, words)
    return status, output, run


def test_a_save_that_fails_is_reported_and_the_run_continues(home: Path) -> None:
    status, output, run = run_with_an_obstacle(home, "warned")
    assert status == 0, output
    assert output.count("checkpoint of step 5 failed") == 1 and "exists already" in output
    for rank in (0, 1):
        assert "checkpoint of step 5 failed" in run.log(1, rank).read_text()
    steps = read(run.metrics)
    told = [step["checkpoint_step"] for step in steps if "checkpoint_step" in step]
    assert told == [5, 10] and next(step["step"] for step in steps if "checkpoint_failed" in step) >= 6
    (good,) = [step for step in steps if "checkpoint_stall_seconds" in step]
    assert good["checkpoint_stall_seconds"] < 10 and good["checkpoint_staged_bytes"] > 10_000
    assert good["checkpoint_write_bytes_per_second"] > 0 and good["checkpoint_commit_seconds"] > 0
    assert [path.name for path in newest(run.checkpoints)] == ["step-00000014", "step-00000010"]


def test_a_save_that_fails_ends_the_run_with_on_error_fail(home: Path) -> None:
    status, _, run = run_with_an_obstacle(home, "failed", "checkpoint.on_error=fail", "steps=40")
    assert status == 1
    ending = read_ending(run, 1)
    assert ending is not None and ending.outcome is Outcome.FAILED and not ending.retry
    assert "checkpoint of step 5 failed" in ending.message and "exists already" in ending.message
    assert f"saved at step {ending.step}" in ending.message and ending.step is not None and ending.step < 10
    assert newest(run.checkpoints)[0].name == f"step-{ending.step:08d}", "what was computed until then is not lost"


@pytest.mark.long
def test_checkpoints_are_saved_by_time_as_well_by_all_ranks_after_the_same_step(home: Path) -> None:
    run = RunDirectory(home / "timed")
    words = overrides(run.path, home / "text", "steps=25", "checkpoint.every=0", "checkpoint.keep=50")
    train_here(home, [*words, "checkpoint.minutes=0.0005"])  # 30 ms, which is some steps
    found = newest(run.checkpoints)
    assert len(found) >= 3 and found[0].name == "step-00000025"
    for checkpoint in found:
        assert verify(checkpoint) == [] and len(list(checkpoint.glob("rank-*.safetensors"))) == 2


@pytest.mark.long
def test_a_remote_that_cannot_be_written_ends_the_run_with_on_error_fail(home: Path) -> None:
    run = RunDirectory(home / "remote-failed")
    words = ["steps=3", "checkpoint.remote=file:///proc/nobody-writes-here", "checkpoint.on_error=fail"]
    status, output = train_forked(home, overrides(run.path, home / "text", *words))
    assert status == 1, output
    ending = read_ending(run, 1)
    assert ending is not None and ending.outcome is Outcome.FAILED and not ending.retry
    assert "upload of step 3 failed" in ending.message and "nobody-writes-here" in ending.message
    assert [path.name for path in newest(run.checkpoints)] == ["step-00000003"], "what was computed is not lost"


@pytest.mark.long
def test_a_run_keeps_checkpoints_in_a_faster_place_and_resumes_from_the_remote_when_that_is_lost(home: Path) -> None:
    run, fast, remote = RunDirectory(home / "tiered"), home / "nvme", f"checkpoint.remote=file://{home}/tiered-remote"
    words = overrides(run.path, home / "text", f"checkpoint.dir={fast}", remote, "steps=3", "schedule.total_steps=9")
    status, output = train_forked(home, words)
    assert status == 0, output
    assert [path.name for path in newest(fast)] == ["step-00000003"]
    ending = read_ending(run, 1)
    assert ending is not None and ending.save is not None
    assert ending.save["checkpoint_step"] == 3 and ending.save["checkpoint_staged_bytes"] > 10_000
    shutil.rmtree(fast)
    status, output = train_forked(home, [f"run.dir={run.path}", remote, "steps=5"])
    assert status == 0, output
    assert [path.name for path in newest(fast)] == ["step-00000005", "step-00000003"]
    assert [step["step"] for step in read(run.metrics)] == [1, 2, 3, 4, 5]
    status, output = train_forked(home, [f"run.dir={run.path}", f"checkpoint.dir={home}/other", "steps=6"])
    assert status == 2 and f"keeps its checkpoints in {fast}" in output


@pytest.fixture(scope="module")
def asked(home: Path) -> tuple[RunDirectory, str, int]:
    """A run with a request for a checkpoint while it ran; the output of `save`, and the step the run had reached."""
    run = RunDirectory(home / "asked")
    words = overrides(run.path, home / "text", "steps=100000", "checkpoint.every=0", "data.epochs=null")
    with started(home, command("train", *words)) as process:
        wait_until(lambda: last_step(run.path) >= 3, process)
        before = last_step(run.path)
        status, said = finish_beside(home, command("checkpoint", "save", str(run.path)))
        assert status == 0, said
        run.stop.touch()
        process.communicate(timeout=60)
    wait_until_gone(home)
    return run, said, before


def finish_beside(home: Path, words: list[str]) -> tuple[int, str]:
    """As `finish`, without ending what else runs under `home`."""
    import subprocess

    from tests.launch.runs import environment

    ended = subprocess.run(words, env=environment(home), capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.long
def test_a_running_job_saves_on_request(asked: tuple[RunDirectory, str, int]) -> None:
    run, said, before = asked
    found = [path.name for path in reversed(newest(run.checkpoints))]
    assert len(found) == 2 and found[0] in said
    assert before < read_state(run.checkpoints / found[0])["progress"]["step"]
    assert not run.save.exists()


@pytest.mark.long
def test_a_request_to_save_fails_where_no_rank_runs(
    asked: tuple[RunDirectory, str, int], capsys: pytest.CaptureFixture
) -> None:
    run, _, _ = asked
    assert main(["checkpoint", "save", str(run.path)]) == 1
    assert "no rank is training" in capsys.readouterr().err and not run.save.exists()


@pytest.mark.long
def test_two_checkpoints_are_compared(asked: tuple[RunDirectory, str, int], capsys: pytest.CaptureFixture) -> None:
    run, _, _ = asked
    new, old = (str(int(path.name.removeprefix("step-"))) for path in newest(run.checkpoints))
    assert main(["checkpoint", "diff", str(run.path), old, new, "--tensors", "3"]) == 1
    said = capsys.readouterr().out
    assert "progress.step" in said and "not shown; --all shows them" in said and "0 tensors are equal" in said
    shown = [line.split("/")[0] for line in said.splitlines() if "/" in line and "e-" in line]
    assert shown == ["param"] * 3, said
    assert main(["checkpoint", "diff", str(run.path), old, new, "--kind", "optim.exp_avg", "--all"]) == 1
    said = capsys.readouterr().out
    assert "optim.exp_avg/embedding.weight" in said and "param/" not in said and "not shown" not in said, said
    assert main(["checkpoint", "diff", str(run.path), old, new, "--kind", "exp_avg"]) == 2
    assert "--kind exp_avg: the kinds of tensors there are optim.exp_avg, " in capsys.readouterr().err
    assert main(["checkpoint", "diff", str(run.path), new, new]) == 0
    assert " 0 differ" in capsys.readouterr().out


@pytest.mark.long
def test_the_last_valid_checkpoint_is_never_removed(
    asked: tuple[RunDirectory, str, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "copy")
    shutil.copytree(asked[0].path, run.path)
    new, old = (str(int(path.name.removeprefix("step-"))) for path in newest(run.checkpoints))
    assert main(["checkpoint", "rm", str(run.path), old, new]) == 2
    assert "no valid checkpoint would be left" in capsys.readouterr().err and len(newest(run.checkpoints)) == 2
    (run.checkpoints / f"step-{int(new):08d}" / "rank-00001.safetensors").write_bytes(b"broken")
    assert main(["checkpoint", "rm", str(run.path), old]) == 2, "the other is no checkpoint to resume from"
    assert main(["checkpoint", "rm", str(run.path), new]) == 0
    assert [path.name for path in newest(run.checkpoints)] == [f"step-{int(old):08d}"]
    assert verify(newest(run.checkpoints)[0]) == []
    assert main(["checkpoint", "rm", str(run.path), "77"]) == 2
    assert "no checkpoint of step 77" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_resumes_from_the_remote_only_without_a_difference(home: Path) -> None:
    remote = f"checkpoint.remote=file://{home}/remote"
    words = ("checkpoint.every=5", "eval.sequences=8", "eval.every=5", "checkpoint.keep=1", "checkpoint.keep_best=1")
    whole = home / "whole"
    train_here(home, overrides(whole, home / "text", "steps=16", *words))
    first, second = home / "first", home / "second"
    ten = overrides(first, home / "text", "steps=10", "schedule.total_steps=16", *words, remote)
    status, output = train_forked(home, ten)
    assert status == 0 and "uploaded step 10" in output
    shutil.rmtree(first)
    words_of_second = [f"run.dir={second}", remote, "steps=16", "launch.nproc=1", "parallel.zero=0"]
    assert main(["train", *words_of_second]) == 2, "another directory may be another run"
    status, output = finish(home, command("train", *words_of_second, "run.adopt=true"))
    assert status == 0, output
    assert [step[0] for step in steps_of(second)] == list(range(11, 17))
    for a, b in zip(steps_of(whole)[10:], steps_of(second), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    third = home / "third"  # by the words of the first start, as a script would have it
    again = overrides(third, home / "text", "data=text", "model=tiny", "steps=16", *words, remote, "run.adopt=true")
    status, output = train_forked(home, again)
    assert status == 0 and "nothing to do: step 16" in output, output
