"""The command of a pod, run by hand on two hosts whose names a hosts file resolves as a headless service does."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.gate import new_key
from stoker.launch.kubernetes.pod import (
    COORDINATOR_VARIABLE,
    INDEX_VARIABLE,
    KEY_VARIABLE,
    NODES_VARIABLE,
    POD,
    not_answering,
)
from stoker.trainer.runtime.outcome import GOES_ON, Outcome, read_ending
from stoker.trainer.runtime.process import LAUNCH_VARIABLE, RESTARTS_VARIABLE
from tests.launch.runs import (
    assert_same_state,
    last_step,
    overrides,
    started,
    steps_of,
    train_here,
    wait_until,
    wait_until_gone,
    write_text,
)
from tests.launch.test_two_hosts import DEVICE, FIRST, HOSTS, SECOND, hosts  # noqa: F401 (a fixture)

COORDINATOR = "run-node-0-0.run"


def pod(index: int, key: str, restarts: int, words: list[str]) -> list[str]:
    """The process of a pod, in its network and under its name, with the service's names in /etc/hosts."""
    host = (FIRST, SECOND)[index]
    given = {
        INDEX_VARIABLE: str(index), NODES_VARIABLE: "2", COORDINATOR_VARIABLE: COORDINATOR, KEY_VARIABLE: key,
        LAUNCH_VARIABLE: "kubernetes-1", RESTARTS_VARIABLE: str(restarts), "GLOO_SOCKET_IFNAME": DEVICE,
    }  # fmt: skip
    program = ["env", *(f"{name}={value}" for name, value in given.items()), sys.executable, "-P", "-m", POD, *words]
    script = f'hostname {host} && mount --bind hosts /etc/hosts && exec "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *program]


@pytest.mark.full
def test_pods_meet_train_save_at_sigterm_and_resume_bit_equal(tmp_path: Path, hosts: None) -> None:  # noqa: F811
    write_text(tmp_path / "text")
    lines = [f"{HOSTS[FIRST]} {COORDINATOR} {FIRST}", f"{HOSTS[SECOND]} run-node-0-1.run {SECOND}"]
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{line}\n" for line in lines))
    more = ["steps=60", "checkpoint.every=20"]
    reference, run = tmp_path / "undisturbed", tmp_path / "run"
    train_here(tmp_path, overrides(reference, tmp_path / "text", *more))
    words = overrides(run, tmp_path / "text", *more, "launch=kubernetes", "launch.image=x", "launch.volume=v")
    words = [word for word in words if not word.startswith("launch.nproc")] + ["launch.nproc=1", "launch.nodes=2"]
    key = new_key()
    with started(tmp_path, pod(1, key, 0, words)) as second, started(tmp_path, pod(0, key, 0, words)) as first:
        wait_until(lambda: last_step(run) >= 8, first, 120)
        second.send_signal(signal.SIGTERM)
        told = first.communicate(timeout=120)[0] + second.communicate(timeout=60)[0]
        wait_until_gone(tmp_path)
    assert (first.returncode, second.returncode) == (GOES_ON, 128 + signal.SIGTERM), told
    ending = read_ending(RunDirectory(run), 1)
    assert ending is not None and ending.outcome is Outcome.PREEMPTED and last_step(run) < 60
    with started(tmp_path, pod(1, key, 1, words)) as second, started(tmp_path, pod(0, key, 1, words)) as first:
        told = first.communicate(timeout=120)[0] + second.communicate(timeout=60)[0]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert steps_of(run) == steps_of(reference)
    assert_same_state(run, reference)


def test_a_first_pod_that_never_answers_is_named() -> None:
    assert "has not answered at 127.0.0.1:1 within 0 s" in str(not_answering("127.0.0.1", 1, seconds=0.0))
