"""Checks between machines before training: a later hang or lost checkpoint becomes one line now.

The first rank of each machine checks whether it sees rank 0's run directory and how its host name resolves. Rank 0
evaluates the findings and publishes the result with its time, against which the others compare their clocks.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.trainer.runtime.process import Place

SHARED_SECONDS = 15.0  # for a network file system to show what another machine has written
SKEW_SECONDS = 5.0  # by which clocks may differ without a warning
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Machine:
    """What the first rank of a machine found."""

    host: str
    sees_run: bool
    loopback: str | None  # the address of its host name, if no other machine can reach it


def ask_for_attempt(store: dist.Store) -> int:
    """The number of the attempt that this rank is of, as rank 0 answers it (`tell_attempt`).

    `store` may hold keys of earlier attempts, and machines may count restarts differently after one has lost its
    connection. So a rank asks under a fresh random name, and only an answer to that name counts.
    """
    name = secrets.token_hex(8)
    store.set(f"stoker/asked/{store.add('stoker/asked', 1)}", name)
    number = int(store.get(f"stoker/answer/{name}"))
    store.add(f"stoker/heard/{number}", 1)
    return number


def tell_attempt(store: dist.Store, number: int, world: int, seconds: float) -> None:
    """Rank 0: answer every request until all ranks have confirmed. Requests of ranks that have ended are answered too.

    Raises ConfigError when ranks are missing after `seconds`.
    """
    deadline = time.monotonic() + seconds
    before = asked = store.add("stoker/told", 0)
    waiting: set[int] = set()
    while (heard := store.add(f"stoker/heard/{number}", 0)) < world - 1:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"only {heard + 1} of {world} ranks have connected within {seconds:.0f} s: see the logs of the others"
            )
        new = range(asked + 1, store.add("stoker/asked", 0) + 1)
        asked += len(new)
        waiting.update(new)
        for place in sorted(waiting):
            if store.check([f"stoker/asked/{place}"]):
                store.set(f"stoker/answer/{store.get(f'stoker/asked/{place}').decode()}", str(number))
                waiting.remove(place)
        time.sleep(_POLL_SECONDS)
    store.add("stoker/told", asked - before)


def meet(
    store: dist.Store, run: RunDirectory, attempt: int, place: Place, machine: Machine | None = None
) -> str | None:
    """Run the checks on all machines; returns a warning about this machine's clock, if any.

    A collective of all ranks over `store`. Raises ConfigError, on all ranks, when the machines cannot train together.
    `machine` stands for this one in tests.
    """
    if place.world <= place.local_world:
        return None
    if place.rank == 0:
        mark = run.attempt(attempt) / f".shared-{secrets.token_hex(8)}"
        mark.touch()
        store.set("stoker/mark", mark.name)
    if place.local_rank == 0:
        name = store.get("stoker/mark").decode()
        found = machine or Machine(socket.gethostname(), _appears(run, attempt, name), _loopback())
        index = store.add("stoker/machines", 1)
        store.set(f"stoker/machine/{index}", json.dumps(asdict(found)))
        store.add("stoker/met", place.local_world)
    if place.rank == 0:
        while store.add("stoker/met", 0) < place.world:
            time.sleep(_POLL_SECONDS)
        machines = [
            Machine(**json.loads(store.get(f"stoker/machine/{index}")))
            for index in range(1, store.add("stoker/machines", 0) + 1)
        ]
        mark.unlink(missing_ok=True)
        store.set("stoker/verdict", json.dumps([time.time(), problem_of(machines, run)]))
    then, problem = json.loads(store.get("stoker/verdict"))
    ahead = time.time() - then
    if problem is not None:
        raise ConfigError(problem)
    if place.local_rank or abs(ahead) < SKEW_SECONDS:
        return None
    way = "ahead of" if ahead > 0 else "behind"
    return (
        f"the clock of {socket.gethostname()} is {abs(ahead):.0f} s {way} that of rank 0: times in logs will not fit "
        "together, and deadlines go by rank 0's"
    )


def problem_of(machines: Sequence[Machine], run: RunDirectory) -> str | None:
    """Why these machines cannot train together, in one line."""
    blind = sorted(machine.host for machine in machines if not machine.sees_run)
    if blind:
        return (
            f"the run directory {run.path} is not shared: {', '.join(blind)} does not see what rank 0 writes there; "
            "name a run.dir on a file system that all machines mount"
        )
    if len({machine.host for machine in machines}) > 1:
        for machine in machines:
            if machine.loopback is not None:
                return (
                    f"{machine.host} resolves its own name to {machine.loopback}, where other machines cannot reach "
                    "its "
                    "ranks: correct its /etc/hosts, or set GLOO_SOCKET_IFNAME to its network interface"
                )
    return None


def _appears(run: RunDirectory, attempt: int, name: str) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not (run.attempt(attempt) / name).exists():
        if time.monotonic() > deadline:
            return False
        if run.attempt(attempt).is_dir():
            os.listdir(run.attempt(attempt))  # makes a network file system refresh its cache
        time.sleep(_POLL_SECONDS)
    return True


def _loopback() -> str | None:
    """The address at which gloo would listen, if no other machine can reach it."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return "no address"
    addresses = [str(info[4][0]).partition("%")[0] for info in found]
    return addresses[0] if all(ipaddress.ip_address(address).is_loopback for address in addresses) else None
