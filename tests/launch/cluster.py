"""A Slurm cluster on this machine: one controller and three nodes of two processors, all ended by process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stoker.launch.slurm.commands import facts_of_job

NODES = ("n1", "n2", "n3")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={third} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

PATIENCE = 240.0  # seconds; a busy machine is no failure


def missing() -> str | None:
    """Why no cluster can be had here, or None."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm"
    return "slurmd wants to be root" if os.geteuid() != 0 else None


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """While this lasts, Slurm's commands of this process and its children use a private cluster."""
    ports = _free_ports(4)
    host = socket.gethostname().partition(".")[0]
    names = dict(zip(("port", "first", "second", "third"), ports, strict=True))
    (folder / "state").mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, **names))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(config)
    daemons = [["slurmctld", "-D", "-i", "-f", str(config)]]
    daemons += [["slurmd", "-D", "-N", node, "-f", str(config)] for node in NODES]
    started = []
    try:
        for words in daemons:
            started.append(subprocess.Popen(words, start_new_session=True))
        wait(lambda: _idle() == len(NODES), "the nodes are not idle")
        yield
    finally:
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
        for daemon in started:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def state(job: str) -> str:
    return facts_of_job(job)["JobState"]


def start_now(job: str) -> None:
    """A requeued job waits two minutes; this one does not."""
    wait(lambda: state(job) == "PENDING", f"job {job} has not come back to the queue")
    time.sleep(2)  # a node takes no job that it has ended in the same second
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)


def wait(condition: Callable[[], Any], otherwise: str, log: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{otherwise} after {PATIENCE:.0f} s\n{log()}")


def _idle() -> int:
    ended = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%N %t"], capture_output=True, text=True)
    return sum(line.endswith(" idle") for line in ended.stdout.splitlines())


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
