"""Ranks of `stoker probe` on this machine. They make no run directory, and none is started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from stoker.conf.schema import to_dict
from stoker.launch.train import ranks_for, say, where
from stoker.parallel.layout import threads_per_rank
from stoker.parallel.loopback import LOOPBACK, keep_on_loopback, loopback_store
from stoker.trainer.rendezvous import CONFIG_VARIABLE
from stoker.trainer.runtime.process import LAUNCHER_VARIABLE
from stoker.trainer.settle import settle_config

LOOK_SECONDS = 0.05


def probe(overrides: Sequence[str], options: Sequence[str]) -> int:
    """Run the ranks that `stoker train` would start, with `options`; the first one's status, or another's failure.

    Raises ConfigError for a start that is refused.
    """
    config, _ = settle_config(overrides, where, tell=say)
    ranks = ranks_for(config)
    store = loopback_store()
    environment = {
        **os.environ,
        CONFIG_VARIABLE: json.dumps(to_dict(config)),
        LAUNCHER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads_per_rank(config.launch.threads, ranks)),
        "PYTHONSAFEPATH": "1",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    keep_on_loopback(environment)
    program = [sys.executable, "-P", "-m", "stoker.launch.probe", *options]
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:  # by the first rank, at its end
        try:
            for rank in range(ranks):
                place, output = {"RANK": str(rank), "LOCAL_RANK": str(rank)}, printed if rank == 0 else None
                processes.append(
                    subprocess.Popen(program, env={**environment, **place}, stdin=subprocess.DEVNULL, stdout=output)
                )
            return _ended(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            printed.seek(0)
            sys.stdout.write(printed.read())


def _ended(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for the first rank, unless another one fails before."""
    while True:
        statuses = [process.poll() for process in processes]
        if statuses[0] is not None:
            return statuses[0] if statuses[0] >= 0 else 128 - statuses[0]
        for rank, status in enumerate(statuses):
            if status:
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                say(f"rank {rank} {how}")
                return 1 if status != 2 else 2
        time.sleep(LOOK_SECONDS)
