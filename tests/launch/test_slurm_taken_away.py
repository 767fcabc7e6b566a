"""A Slurm job whose machines are wanted back, in every way there is: its losses do not show it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.slurm import commands
from stoker.launch.slurm.notes import read_notes
from stoker.trainer.runtime.outcome import Outcome, read_beginning
from tests.launch import cluster
from tests.launch.jobs import Home, at_home, come_to, ending_of, log_of
from tests.launch.runs import last_step, steps_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing())),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with at_home(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def test_a_run_survives_time_limit_preemption_a_lost_node_and_a_cancel_bitwise(home: Home) -> None:
    run = home.path / "disturbed"
    directory = RunDirectory(run)
    tracked = ["tracker=wandb", "tracker.mode=offline", "steps=100000"]
    [job] = home.submit(run, *tracked, "launch.time=10", "launch.grace_seconds=25", "launch.partition=low")

    # The time limit, which is brought near once steps are taken: saved, requeued.
    come_to(run, 3)
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 40))
    subprocess.run(["scontrol", "update", f"jobid={job}", f"endtime={soon}"], check=True)
    assert ending_of(run, 1).outcome is Outcome.PREEMPTED, log_of(run)
    first = last_step(run)
    assert first > 0 and f"step-{first:08}" in {path.name for path in directory.checkpoints.iterdir()}
    cluster.wait(lambda: cluster.state(job) == "PENDING", "not requeued")
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=10"], check=True)
    cluster.start_now(job)

    # A job of a higher partition takes all nodes: saved, requeued, and resumed once that job is done.
    come_to(run, first + 3)
    urgent = ["sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "--wrap", "true", "-o", "/dev/null"]
    subprocess.run(urgent, check=True, capture_output=True)
    assert ending_of(run, 2).outcome is Outcome.PREEMPTED, log_of(run)
    second = last_step(run)
    cluster.start_now(job)

    # A node is set down: resumed elsewhere.
    come_to(run, second + 3)
    lost = commands.facts_of_job(job)["NodeList"]
    assert lost == "n[1-2]"
    subprocess.run(["scontrol", "update", "nodename=n2", "state=down", "reason=test"], check=True)
    cluster.start_now(job)
    cluster.wait(lambda: len(directory.attempt_numbers()) == 4, "not resumed", lambda: log_of(run))
    third = last_step(run)
    come_to(run, third + 3)
    assert commands.facts_of_job(job)["NodeList"] == "n[1,3]"
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], check=True)

    # Cancelled: saved, and not resurrected.
    commands.cancel(job)
    cancelled = ending_of(run, 4)
    assert cancelled.outcome is Outcome.PREEMPTED and cancelled.step == last_step(run)
    cluster.wait(lambda: cluster.state(job) == "CANCELLED", "not gone")
    cluster.wait(lambda: len(read_notes(directory)) == 5, "no last note", lambda: log_of(run))
    assert [note["move"] for note in read_notes(directory)] == ["submit", "requeue", "requeue", "end", "end"]
    assert (directory.checkpoints / f"step-{cancelled.step:08}" / "MANIFEST.json").exists()

    beginnings = [read_beginning(directory, number) for number in directory.attempt_numbers()]
    assert [beginning is not None and (beginning.job, beginning.ranks) for beginning in beginnings] == [(job, 4)] * 4
    assert [beginning.from_step for beginning in beginnings if beginning is not None][:3] == [0, first, second]
    assert steps_of(run) == home.undisturbed(len(steps_of(run)))
    tracked_as = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert len(list((run / "wandb").glob("offline-run-*"))) > 1 and len(tracked_as) == 1, "it is one W&B run"
