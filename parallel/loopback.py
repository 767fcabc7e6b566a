"""Rendezvous that only processes of this machine can reach: torch's store lets in all who reach its port."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
_BACKLOG = 4096


def loopback_store(port: int = 0) -> TCPStore:
    """A store on this machine's loopback address, by default on a port that the system picks.

    Raises OSError where the port is taken.
    """
    listening = listen(LOOPBACK, port)
    port = listening.getsockname()[1]
    descriptor = listening.detach()  # the store closes it
    return TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
    )


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on this address only. Raises OSError where the port is taken."""
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier listener's connections may linger
        listening.bind((address, port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def is_loopback(address: str) -> bool:
    """Whether this address, or the name `localhost`, leads to this machine alone."""
    try:
        return address == "localhost" or ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:  # another name
        return False


def keep_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Have the groups of ranks that all run on this machine listen on loopback, unless the user names an interface.

    `environment` is what ranks get beside this process's own.
    """
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment[variable] = os.environ.get(variable) or name
