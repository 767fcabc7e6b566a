"""Looking after a run from outside, through its directory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.slurm.notes import notes_file
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import command, environment, last_step, overrides, started, wait_until

SLOW = ["model.target=tests.launch.slow:build", "steps=100000", "schedule.total_steps=30", "checkpoint.every=3"]


def stoker(home: Path, *words: str) -> tuple[int, str]:
    ended = subprocess.run(command(*words), env=environment(home), capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.long
def test_status_logs_and_stop_work_from_outside(home: Path) -> None:
    run = home / "run"
    with started(home, command("train", *overrides(run, home / "text", *SLOW)), cwd=Path.cwd()) as process:
        wait_until(lambda: last_step(run) >= 4, process)
        following = subprocess.Popen(
            command("logs", str(run), "--follow", "--lines", "0", "--rank", "0"),
            env={**environment(home), "XDG_CACHE_HOME": "/nonexistent"},
            stdout=subprocess.PIPE,
            text=True,
        )
        status, said = stoker(home, "status", str(run))
        assert status == 0 and "running" in said and "of 100,000" in said and "tokens/s" in said, said
        assert "time left" in said and "checkpoint  step " in said and "% training, data " in said, said
        status, said = stoker(home, "logs", str(run), "--lines", "1")
        assert status == 0 and all(line[:4] in ("[0] ", "[1] ") for line in said.splitlines()), said
        status, said = stoker(home, "requeue", str(run))
        assert status == 2 and "does not run as a Slurm job" in said
        status, said = stoker(home, "stop", str(run))
        assert status == 0 and "requested: the run is at step" in said and "saved (the file STOP)" in said, said
        process.communicate(timeout=30)
        followed, _ = following.communicate(timeout=30)
    assert process.returncode == 0
    log = RunDirectory(run).log(1, 0).read_text()
    assert log.startswith(followed[:200]) and len(followed) > 0
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.STOPPED and ending.step == last_step(run)
    status, said = stoker(home, "status", str(run))
    assert status == 0 and f"stopped at step {ending.step}" in said
    assert stoker(home, "stop", str(run))[0] == 1, "no rank is running"
    assert "was not submitted" in stoker(home, "requeue", str(run))[1]
    status, said = stoker(home, "logs", str(run), "--attempt", "7")
    assert status == 2 and "no attempt 7" in said


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_deadline_ends_a_run_that_then_resumes_without_it(home: Path) -> None:
    """On a busy machine only the start may take longer than the first deadline: then it ends in time, too."""
    for seconds in (50, 120, 240):
        run = home / f"deadline-{seconds}"
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        words = command("train", *overrides(run, home / "text", *SLOW, f"launch.deadline={at}"))
        with started(home, words, cwd=Path.cwd()) as process:
            output, _ = process.communicate(timeout=seconds + 60)
        assert process.returncode == 75, output
        ending = read_ending(RunDirectory(run), 1)
        assert ending is not None and ending.outcome is Outcome.PREEMPTED and "the deadline at" in ending.message, (
            output
        )
        assert ending.time < time.mktime(time.strptime(at, "%Y-%m-%dT%H:%M:%S")), output
        if ending.step is not None:
            break
        assert "before the first step" in ending.message and last_step(run) == 0
    assert ending.step == last_step(run) > 0
    assert "to end takes about" in output
    assert "deadline: null" in RunDirectory(run).config.read_text(), "it was for that start"


def test_a_job_that_waits_in_the_queue_is_shown_as_such(home: Path) -> None:
    run = RunDirectory(home / "waiting")
    run.attempt(1).mkdir(parents=True)
    run.slurm.mkdir()
    notes_file(run).write_text('{"time": 0, "job": "17", "move": "requeue", "why": ""}\n')
    status, said = stoker(home, "status", str(run.path))
    assert status == 1 and "job 17 waits in the queue" in said
