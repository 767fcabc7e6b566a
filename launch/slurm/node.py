"""`python -P -m stoker.launch.slurm.node`: the ranks of one node of a job, started by srun."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from stoker.conf.schema import from_dict
from stoker.parallel.loopback import is_loopback


def main() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a rank to pass it on to
    from stoker.launch.local import Meeting, launch
    from stoker.launch.slurm.batch import KEY_VARIABLE, MEETING_VARIABLE
    from stoker.launch.train import say
    from stoker.trainer.rendezvous import CONFIG_VARIABLE
    from stoker.trainer.runtime.process import LAUNCH_VARIABLE

    if not os.environ.keys() >= {MEETING_VARIABLE, KEY_VARIABLE, LAUNCH_VARIABLE}:
        say("only a job's process starts this: see launch/slurm/train.sbatch")
        return 2
    config = from_dict(json.loads(os.environ[CONFIG_VARIABLE]))
    host, _, gate = os.environ[MEETING_VARIABLE].partition(":")
    address, _, port = gate.rpartition(":")
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    problem = unreachable(host, address)
    if problem is not None:
        say(problem)
        return 1
    meeting = Meeting(address, int(port), node, nodes, bytes.fromhex(os.environ[KEY_VARIABLE]))
    return launch(config, config.launch.nproc, say, meeting=meeting)


def unreachable(host: str, address: str) -> str | None:
    """Why this machine cannot reach the job's first node `host` at `address`, if that is plain from the address."""
    here = socket.gethostname()
    if host == here or not is_loopback(address):
        return None
    return (
        f"the job's first node {host} knows no address of its own but {address}, which on {here} is {here} itself: "
        f"correct /etc/hosts on {host}"
    )


if __name__ == "__main__":
    sys.exit(main())
