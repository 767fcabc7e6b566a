"""Jobs on a Slurm cluster that these tests start. What takes a job's machines away: test_slurm_taken_away.py."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.slurm import commands
from stoker.trainer.runtime.outcome import Outcome
from tests.launch import cluster
from tests.launch.jobs import FOUR, SLOW, Home, at_home, come_to, ending_of, log_of
from tests.launch.runs import command, kill, last_step, overrides, rank_pids, steps_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing())),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with at_home(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def test_the_plain_script_restarts_a_killed_rank_in_its_allocation_is_requeued_on_request_and_trains_to_the_end(
    home: Home,
) -> None:
    run, log = home.path / "plain", home.path / "plain.log"
    words = overrides(run, home.path / "text", *FOUR, SLOW, "steps=60", "launch.nproc=2", "checkpoint.every=5")
    script = ["sbatch", "--parsable", "-N2", "-c2", "-o", str(log), "launch/slurm/train.sbatch"]
    status, job = home.call(*script, *words)
    assert status == 0, job
    job = job.strip()
    come_to(run, 7)
    kill(rank_pids(run)[3])
    cluster.wait(lambda: len(RunDirectory(run).attempt_numbers()) == 2, "not restarted", log.read_text)
    come_to(run, 12)
    status, said = home.call(*command("requeue", str(run)))
    assert status == 0 and f"job {job} goes back to the queue" in said, said
    assert ending_of(run, 2).message.endswith("saved (the file REQUEUE)")
    cluster.start_now(job)
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "not done", log.read_text)
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert "restarting: rank 3 was killed by SIGKILL" in said and "completed at step 60" in said
    assert RunDirectory(run).attempt_numbers() == [1, 2, 3]
    assert steps_of(run) == home.undisturbed(60)


def test_the_tasks_of_an_array_are_separate_runs(home: Home) -> None:
    run = home.path / "sweep"
    array = ["steps=2", "launch=slurm", "launch.nproc=1", "launch.cpus=1", "launch.array=0-1", "run.seed={task}"]
    status, output = home.call(*command("submit", *overrides(run, home.path / "text", *array)))
    assert status == 0, output
    job = output.split(" as job ")[1].split(";")[0]
    for task in ("0", "1"):
        cluster.wait(lambda: last_step(run / task) == 2, f"task {task}", lambda: log_of(run))  # noqa: B023
    cluster.wait(lambda: cluster.state(f"{job}_1") == "COMPLETED", "not done", lambda: log_of(run))
    assert steps_of(run / "0") != steps_of(run / "1"), "they have different seeds"


@pytest.mark.full
def test_a_chain_continues_where_a_job_ends_and_ends_where_one_is_cancelled(home: Home) -> None:
    run = home.path / "chain"
    bare = home.path / "bin"  # the first job's own process finds srun, but no scontrol, as in a container
    bare.mkdir()
    (bare / "srun").symlink_to(str(shutil.which("srun")))
    setup = f"launch.setup=test $STOKER_LINK = 1/3 && PATH={bare}"
    jobs = home.submit(run, "steps=100000", "launch.chain=3", setup)
    come_to(run, 3)
    subprocess.run(["scancel", "--signal=USR1", "--batch", jobs[0]], check=True)  # as before its time limit
    assert ending_of(run, 1).outcome is Outcome.PREEMPTED
    saved = last_step(run)
    come_to(run, saved + 3)
    assert cluster.state(jobs[0]) == "FAILED", "its status means that the run continues"
    commands.cancel(jobs[1])
    assert ending_of(run, 2).outcome is Outcome.PREEMPTED
    cluster.wait(lambda: cluster.state(jobs[2]) == "COMPLETED", "the chain goes on", lambda: log_of(run))
    assert "nothing to do for link 3 of 3: the job before was cancelled" in log_of(run)
    assert RunDirectory(run).attempt_numbers() == [1, 2]
    assert steps_of(run) == home.undisturbed(last_step(run))


@pytest.mark.full
def test_jobs_that_wait_in_the_queue_are_shown_and_cancelled_all_of_them(home: Home) -> None:
    run = home.path / "waiting"
    jobs = home.submit(run, "launch.chain=2", "launch.sbatch_args=[--hold]")
    status, said = home.call(*command("status", str(run)))
    assert status == 1 and f"has not begun; job {jobs[-1]} waits in the queue" in said, said
    status, said = home.call(*command("requeue", str(run)))
    assert status == 2 and f"job {jobs[0]} waits in the queue already" in said, said
    status, said = home.call(*command("stop", str(run)))
    assert status == 0 and all(f"cancelled job {job}" in said for job in jobs), said
    assert [cluster.state(job) for job in jobs] == ["CANCELLED", "CANCELLED"]
    status, said = home.call(*command("requeue", str(run)))
    assert status == 0 and "submitted" in said, said
    assert home.call(*command("stop", str(run)))[0] == 0


def test_a_refused_job_is_one_line(home: Home) -> None:
    words = overrides(home.path / "refused", home.path / "text", "launch=slurm", "launch.partition=gpus")
    status, output = home.call(*command("submit", *words))
    assert status == 1 and len(output.splitlines()) == 1
    assert "Invalid partition" in output and "low" in output
