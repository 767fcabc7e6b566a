"""`python -P -m stoker.launch.kubernetes.pod KEY=VALUE ...`: the ranks of one pod.

The first pod of a set keeps the store at which ranks meet, behind a gate on a port that all know; the others wait until
its name resolves and its port answers. With one pod, this is `stoker train`.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.conf.schema import Config
    from stoker.parallel.start import Ranks

POD = "stoker.launch.kubernetes.pod"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"  # of an indexed job, from 0
NODES_VARIABLE = "STOKER_NODES"  # pods of the set
COORDINATOR_VARIABLE = "STOKER_COORDINATOR"  # name or address of the first pod
KEY_VARIABLE = "STOKER_MEETING_KEY"  # what the gate wants to be shown: 64 hexadecimal digits
PORT = 29400  # of the gate
WAIT_SECONDS = 600.0  # for the first pod: its image may still be pulled
_POLL_SECONDS = 1.0


def ranks_on(nodes: int, config: Config) -> Ranks:
    """The ranks of all pods, with the GPUs of this one."""
    from stoker.launch.train import gpus, ranks_for
    from stoker.parallel.start import Ranks

    here = ranks_for(config)
    return Ranks(nodes * here, gpus(config), here)


def main(settings: Sequence[str]) -> int:
    """The status of the ranks; of docs/launch.md."""
    from stoker.conf.files import expand
    from stoker.conf.rundir import make_run_directory, run_directory
    from stoker.conf.values import ConfigError
    from stoker.data import prepare
    from stoker.launch.local import Meeting, launch
    from stoker.launch.train import ranks_for, refusing, say
    from stoker.trainer.runtime.process import RESTARTS_VARIABLE
    from stoker.trainer.settle import settle_config

    index, nodes = int(os.environ.get(INDEX_VARIABLE, "0")), int(os.environ.get(NODES_VARIABLE, "1"))
    restarts = os.environ.get(RESTARTS_VARIABLE) or "0"
    os.environ[RESTARTS_VARIABLE] = restarts

    try:
        config, changes = settle_config(
            expand(settings, say),
            functools.partial(ranks_on, nodes),
            refitted=say,
            tell=say,
            restarted=int(restarts) > 0,
            check_import=index == 0,
        )
        with refusing():
            prepare(config)
    except ConfigError as error:
        say(str(error))
        return 2
    make_run_directory(run_directory(config), config.run.public)
    for change in changes if index == 0 else []:
        say(f"changed since the last start: {change}")
    if nodes == 1:
        return launch(config, ranks_for(config), say)

    from stoker.launch.gate import Gate, address_of
    from stoker.parallel.loopback import loopback_store

    host, key = os.environ[COORDINATOR_VARIABLE], bytes.fromhex(os.environ[KEY_VARIABLE])
    if index == 0:
        store = loopback_store()
        gate = Gate(address_of(socket.gethostname()), store.port, key, PORT)
        status = launch(config, ranks_for(config), say, meeting=Meeting(gate.address, PORT, index, nodes, key))
        gate.close()
        del store
        return status
    problem = not_answering(host, PORT)
    if problem is not None:
        say(problem)
        return 1
    return launch(config, ranks_for(config), say, meeting=Meeting(host, PORT, index, nodes, key))


def not_answering(host: str, port: int, seconds: float = WAIT_SECONDS) -> str | None:
    """Waits until something accepts connections at `host`; why it has not, where the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return None
        except OSError as error:
            if time.monotonic() > deadline:
                return f"the first pod has not answered at {host}:{port} within {seconds:.0f} s: {error}"
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
