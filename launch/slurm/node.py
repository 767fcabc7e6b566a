"""`python -P -m stoker.launch.slurm.node`: the ranks of one node of a job, started by srun."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import sys

from stoker.conf.schema import from_dict


def main() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a rank to pass it on to
    from stoker.launch.local import Meeting, launch
    from stoker.launch.slurm.batch import MEETING_VARIABLE
    from stoker.launch.train import say
    from stoker.trainer.main import CONFIG_VARIABLE

    if MEETING_VARIABLE not in os.environ:
        say("only a job's process starts this: see launch/slurm/train.sbatch")
        return 2
    config = from_dict(json.loads(os.environ[CONFIG_VARIABLE]))
    host, _, port = os.environ[MEETING_VARIABLE].rpartition(":")
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_STEP_NUM_NODES"])
    problem = unreachable(host) if node else None
    if problem is not None:
        say(problem)
        return 1
    return launch(config, config.launch.nproc, say, meeting=Meeting(host, int(port), node, nodes))


def unreachable(host: str) -> str | None:
    """Why this machine cannot reach the job's first node `host`, if its name shows it."""
    here = socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        return f"{here} cannot resolve {host}, the job's first node: {error.strerror}"
    if host != here and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        seen = ", ".join(sorted(addresses))
        return f"on {here} the job's first node {host} is {seen}, which is {here} itself: correct /etc/hosts there"
    return None


if __name__ == "__main__":
    sys.exit(main())
