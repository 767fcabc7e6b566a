"""What a Slurm job is made of, decided without a cluster."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.launch.slurm import commands
from stoker.launch.slurm.batch import Job, job_from, settings_of, stalled_attempts
from stoker.launch.slurm.node import unreachable
from stoker.launch.slurm.submit import option
from stoker.launch.slurm.verdict import Move, Situation, judge
from stoker.trainer.runtime.outcome import Beginning, Ending, Outcome, write_beginning

FAILED = Ending(Outcome.FAILED, "rank 1 was killed by SIGKILL", 7, rank=1, retry=True)
PREEMPTED = Ending(Outcome.PREEMPTED, "preempted at step 9, saved (SIGUSR1)", 9)
USUAL = Situation(PREEMPTED, False, "RUNNING", stalled=0, limit=3, may_requeue=True, links_left=0)


@pytest.mark.parametrize(
    ("changed", "move", "status"),
    [
        ({}, Move.REQUEUE, 75),
        ({"ending": None, "asked": True}, Move.REQUEUE, 75),
        ({"ending": FAILED, "asked": True}, Move.REQUEUE, 75),
        ({"job_state": "CANCELLED"}, Move.END, 1),
        ({"job_state": "COMPLETING"}, Move.END, 1),
        ({"job_state": None}, Move.END, 75),
        ({"stalled": 4}, Move.END, 1),
        ({"stalled": 3}, Move.REQUEUE, 75),
        ({"may_requeue": False}, Move.END, 75),
        ({"links_left": 2}, Move.NEXT, 75),
        ({"links_left": 2, "job_state": "CANCELLED"}, Move.END, 1),
        ({"ending": Ending(Outcome.COMPLETED, "completed at step 9", 9)}, Move.END, 0),
        ({"ending": Ending(Outcome.STOPPED, "stopped at step 9, saved", 9)}, Move.END, 0),
        ({"ending": Ending(Outcome.NONFINITE, "10 steps in a row", 9)}, Move.END, 1),
        ({"ending": FAILED}, Move.RESTART, 1),
        ({"ending": None}, Move.RESTART, 1),
        ({"ending": FAILED, "job_state": None}, Move.RESTART, 1),
        ({"ending": FAILED, "stalled": 4}, Move.END, 1),
        ({"ending": FAILED, "job_state": "CANCELLED"}, Move.END, 1),
        ({"ending": dataclasses.replace(FAILED, retry=False)}, Move.END, 1),
        ({"superseded": True}, Move.END, 1),
    ],
)
def test_what_comes_after_the_ranks_have_ended(changed: dict, move: Move, status: int) -> None:
    verdict = judge(dataclasses.replace(USUAL, **changed))
    assert (verdict.move, verdict.status) == (move, status), verdict.why


def checkpoint(run: RunDirectory, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `run` look as if its newest checkpoint were of `step`."""
    monkeypatch.setattr("stoker.launch.slurm.batch.newest_step", lambda _: step)


def test_only_attempts_of_this_job_in_a_row_without_progress_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    for job, from_step in (("7", 0), ("7", 10), ("8", 10), ("8", 10)):
        write_beginning(run, next_attempt(run), Beginning(0.0, from_step, 4, "host", job))
    next_attempt(run)  # and one that ended before it could write anything
    checkpoint(run, 10, monkeypatch)
    assert stalled_attempts(run, "8") == 3
    checkpoint(run, 20, monkeypatch)
    assert stalled_attempts(run, "8") == 1
    write_beginning(run, next_attempt(run), Beginning(0.0, 20, 4, "host", "8"))
    assert stalled_attempts(run, "8") == 1 + 1
    assert stalled_attempts(run, "9") == 0


def job(**changed: str) -> Job:
    return job_from({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "pretrain", "SLURM_JOB_NUM_NODES": "4", **changed})


def test_every_start_of_a_job_finds_the_same_run_directory_and_array_tasks_have_separate_ones() -> None:
    assert settings_of(job(), ["steps=3"]) == ["steps=3", "run.dir=runs/pretrain-12"]
    assert settings_of(job(), ["run.name=a"]) == ["run.name=a"]
    assert settings_of(job(), ["run.dir=/a"]) == ["run.dir=/a"]
    task = job(SLURM_ARRAY_TASK_ID="3")
    assert settings_of(task, ["run.dir=/a", "run.seed={task}"]) == ["run.dir=/a/3", "run.seed=3"]
    assert settings_of(task, ["run.dir=/a/seed-{task}"]) == ["run.dir=/a/seed-3"]
    assert (job(STOKER_LINK="2/5").link, job(STOKER_LINK="2/5").links) == (2, 5)
    with pytest.raises(ValueError, match="not inside a Slurm job"):
        job_from({})


def test_durations_and_times_as_slurm_writes_them() -> None:
    assert [commands.seconds_of(text) for text in ("60", "01:30", "1-02:00:00", "UNLIMITED")] == [60, 90, 93600, None]
    assert commands.time_of("Unknown") is None and commands.time_of("2026-12-24T18:00:00") is not None


def script_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_without_slurm_submit_reports_that_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "launch=slurm", f"run.dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "sbatch is not found" in said


def test_the_script_has_the_requested_options_and_a_chain_waits_link_by_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script_named(tmp_path, "sbatch", f'echo "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = [
        "launch=slurm", f"run.dir={tmp_path / 'run'}", "launch.nodes=2", "launch.time=24:00:00", "launch.chain=3",
        "launch.sbatch_args=[--account=lab]", "data.args.pattern=*.t xt", "run.fresh=true",
    ]  # fmt: skip
    assert main(["submit", "--dry-run", *words]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and not (tmp_path / "calls").exists()
    assert main(["submit", *words]) == 0
    text = RunDirectory(tmp_path / "run").script.read_text()
    assert text == shown
    lines = text.splitlines()
    assert "#SBATCH --cpus-per-task=8" in lines, "of two ranks: a thread, a reader, the loader and the writer each"
    for line in ("--nodes=2", "--time=24:00:00", "--signal=B:USR1@120", "--account=lab", "--no-requeue"):
        assert f"#SBATCH {line}" in lines
    assert "'data.args.pattern=*.t xt'" in text
    assert "run.fresh" not in text, "a requeued job resumes"
    first, second, third = (tmp_path / "calls").read_text().splitlines()
    assert "dependency" not in first and "STOKER_LINK=1/3" in first
    assert "--dependency=afterany:1" in second and "--dependency=afterany:2" in third and "STOKER_LINK=3/3" in third


def test_options_of_sbatch_are_quoted_as_it_reads_them(tmp_path: Path) -> None:
    values = {
        "job-name": "a b", "account": 'say "x"', "partition": "it's", "qos": "back\\slash", "wckey": "# no comment",
        "reservation": "$HOME", "comment": "plain-1.2:3@4%j",
    }  # fmt: skip
    lines = [option(f"--{name}={value}") for name, value in values.items()]
    assert lines[0] == '#SBATCH --job-name="a b"' and lines[-1] == "#SBATCH --comment=plain-1.2:3@4%j"
    assert option("--exclusive") == "#SBATCH --exclusive" and option("-A lab") == "#SBATCH -A lab"
    with pytest.raises(ConfigError, match="is one line"):
        option("--comment=a\nrm -rf x")
    if shutil.which("sbatch") is None:
        pytest.skip("sbatch is not installed")
    cluster = "ClusterName=c\nSlurmctldHost=localhost\nSlurmctldPort=1\nAuthType=auth/none\nCredType=cred/none\n"
    (tmp_path / "slurm.conf").write_text(cluster)  # it does not answer: sbatch shows before what it has read
    (tmp_path / "script").write_text("\n".join(["#!/bin/bash", *lines, ""]))
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    words = ["sbatch", "-v", str(tmp_path / "script")]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        shown = list(iter(process.stderr.readline, "sbatch: end of defined options\n"))
        process.kill()
    found = dict(line.removeprefix("sbatch: ").split(":", 1) for line in shown if ":" in line[8:])
    found = {name.strip(): value.strip() for name, value in found.items()}
    assert {name: found.get(name) for name in values} == values


def test_a_first_node_that_its_peers_take_for_themselves_is_named() -> None:
    line = unreachable("node-1", "127.0.1.1")
    assert line is not None and "node-1 knows no address of its own but 127.0.1.1" in line
    assert "correct /etc/hosts on node-1" in line
    assert unreachable(socket.gethostname(), "127.0.0.1") is None, "several nodes on one machine reach each other so"
    assert unreachable("node-1", "10.0.0.7") is None
