"""The store at which ranks meet, closed to unauthenticated connections.

torch's store has no authentication: who reaches its port can read, set and wait. So it listens on loopback only. Where
ranks run on several machines, a `Gate` on the first one listens on the interface of the rendezvous, and forwards a
connection to the store once its sender has proven that it knows the launch's key. Every other launcher, and that of
the first machine too, keeps a `Tunnel`: a port on its own loopback, from which its ranks reach the gate.

    rank -> loopback: Tunnel == key proven by HMAC-SHA256 over fresh nonces, both ways ==> Gate -> loopback: store

The key is in the environment that the scheduler hands to the job's own processes. What follows the proof is not
encrypted: the network between the machines of a job is trusted not to be read.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from stoker.conf.reasons import reason
from stoker.parallel.loopback import LOOPBACK, is_loopback, listen

log = logging.getLogger(__name__)

PROOF_SECONDS = 10.0  # for the other side to prove that it has the key
_NONCE, _PROOF = 32, 32  # bytes
_CHUNK = 1 << 16

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def address_of(host: str) -> str:
    """The address of this machine, called `host`, for other machines: not a loopback one if it has another."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    return next((address for address in found if not is_loopback(address)), _routed() or LOOPBACK)


def _routed() -> str | None:
    """The address from which this machine sends by default. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: only the route is looked up
        except OSError:
            return None
        return str(probe.getsockname()[0])


class _Forwarder(ABC):
    """A listening socket, and a thread that forwards what connects to it once `open` has found where to."""

    def __init__(self, address: str) -> None:
        self._listening = listen(address)
        self._refused = False  # has one been, and been logged? Who sends many would else fill the log
        self.port: int = self._listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="stoker-gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @abstractmethod
    async def open(self, near: Connection) -> Connection:
        """The other end for a connection that has come in. Raises OSError or EOFError to refuse it."""

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._forward, sock=self._listening))
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far: Connection | None = None
        try:
            far = await asyncio.wait_for(self.open((reader, writer)), PROOF_SECONDS)
            await asyncio.gather(_copy(reader, far[1]), _copy(far[0], writer))
        except (OSError, EOFError, TimeoutError) as error:
            if far is None and not self._refused:  # else one end has gone, which is how ranks leave
                self._refused = True
                who, *_ = writer.get_extra_info("peername") or ("an address that is gone",)
                side = type(self).__name__.lower()
                log.warning(
                    "%s: a connection from %s was refused (%s); later ones are not logged", side, who, reason(error)
                )
        finally:
            writer.close()
            if far is not None:
                far[1].close()


class Gate(_Forwarder):
    """On the first machine: lets those to `store_port` on loopback who know `key`. Listens on `address` only."""

    def __init__(self, address: str, store_port: int, key: bytes) -> None:
        self._store_port, self._key = store_port, key
        super().__init__(address)

    async def open(self, near: Connection) -> Connection:
        await prove(near, self._key, b"gate", b"tunnel")
        return await _connect(LOOPBACK, self._store_port)


class Tunnel(_Forwarder):
    """On every machine: a port on loopback that leads to the gate at `host`, `port`."""

    def __init__(self, host: str, port: int, key: bytes) -> None:
        self._host, self._far_port, self._key = host, port, key
        super().__init__(LOOPBACK)

    async def open(self, near: Connection) -> Connection:
        far = await _connect(self._host, self._far_port)
        try:
            await prove(far, self._key, b"tunnel", b"gate")
        except BaseException:
            far[1].close()
            raise
        return far


async def prove(connection: Connection, key: bytes, me: bytes, other: bytes) -> None:
    """Prove that this side has `key` and verify that the other has. Raises PermissionError where it has not.

    A side shows its proof only over the other's fresh nonce and its own role, so that no proof can be sent back.
    The tunnel proves itself first: an unauthenticated peer gets only a nonce.
    """
    reader, writer = connection
    own = secrets.token_bytes(_NONCE)
    writer.write(own)
    theirs = await reader.readexactly(_NONCE)

    def proof(role: bytes, first: bytes, second: bytes) -> bytes:
        return hmac.digest(key, role + first + second, "sha256")

    async def check() -> None:
        if not hmac.compare_digest(await reader.readexactly(_PROOF), proof(other, own, theirs)):
            raise PermissionError("the other side does not have the key of this launch")

    async def show() -> None:
        writer.write(proof(me, theirs, own))
        await writer.drain()

    steps: tuple[Callable[[], Awaitable[None]], ...] = (check, show) if me == b"gate" else (show, check)
    for step in steps:
        await step()


async def _connect(host: str, port: int) -> Connection:
    reader, writer = await asyncio.open_connection(host, port)
    _without_delay(writer)
    return reader, writer


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    _without_delay(writer)
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()


def _without_delay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def new_key() -> str:
    """The key of a launch, in hexadecimal digits."""
    return secrets.token_hex(32)
