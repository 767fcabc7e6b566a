"""What a stranger's connection reaches: nothing on other addresses, and nothing without the launch's key."""

from __future__ import annotations

import errno
import hmac
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from stoker.launch.gate import Gate, Tunnel, address_of, new_key
from stoker.parallel.loopback import LOOPBACK, is_loopback, keep_on_loopback, listen, loopback_store
from tests.launch.runs import listening_addresses

KEY = bytes.fromhex(new_key())
CLOSED = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)  # by the other side, before all was sent or read
SECOND = "127.0.0.2"  # another address of the same machine


@pytest.fixture
def store() -> TCPStore:
    return loopback_store()


@pytest.fixture
def gate(store: TCPStore) -> Iterator[Gate]:
    gate = Gate(LOOPBACK, store.port, KEY)
    yield gate
    gate.close()


def answer(port: int, *messages: bytes) -> bytes:
    """All that comes back over a connection to `port` over which `messages` are sent."""
    with socket.create_connection((LOOPBACK, port), timeout=20) as stranger:
        received = b""
        try:
            for message in messages:
                stranger.sendall(message)
            stranger.shutdown(socket.SHUT_WR)
            while data := stranger.recv(4096):
                received += data
        except OSError as error:
            if error.errno not in CLOSED:
                raise
        return received


def test_a_store_listens_on_loopback_only(store: TCPStore) -> None:
    assert listening_addresses([os.getpid()]) == {LOOPBACK}
    with pytest.raises(OSError):
        socket.create_connection((SECOND, store.port), timeout=5)


def test_ranks_of_one_machine_listen_on_loopback_unless_the_user_names_an_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    environment: dict[str, str] = {}
    keep_on_loopback(environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "eth7"}


def test_who_knows_the_key_reaches_the_store_through_a_tunnel(store: TCPStore, gate: Gate) -> None:
    tunnel = Tunnel(LOOPBACK, gate.port, KEY)
    client = TCPStore(LOOPBACK, tunnel.port, is_master=False, timeout=timedelta(seconds=20))
    client.set("large", "x" * 300_000)
    assert store.get("large") == b"x" * 300_000
    store.set("answer", "y")
    assert client.get("answer") == b"y" and client.add("count", 2) == 2
    tunnel.close()


def test_who_does_not_know_the_key_reads_and_sets_nothing(
    store: TCPStore, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    store.set("secret", "x")
    before = store.num_keys()
    tunnel = Tunnel(LOOPBACK, gate.port, os.urandom(32))
    with pytest.raises(RuntimeError):
        TCPStore(LOOPBACK, tunnel.port, is_master=False, timeout=timedelta(seconds=1)).set("mine", "x")
    tunnel.close()
    for said in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(64), bytes(200_000)):
        assert len(answer(gate.port, said)) <= 32, "a nonce, and nothing after it"
    with socket.create_connection((LOOPBACK, gate.port), timeout=20) as mirror:
        nonce = mirror.recv(32, socket.MSG_WAITALL)
        mirror.sendall(nonce + hmac.digest(b"", b"tunnel" + nonce + nonce, "sha256"))
        assert mirror.recv(1) == b""
    assert store.num_keys() == before
    refusals = sorted(record.message for record in caplog.records if "was refused" in record.message)
    sides = [refusal.partition(" was refused")[0] for refusal in refusals]
    assert sides == [f"gate: a connection from {LOOPBACK}", f"tunnel: a connection from {LOOPBACK}"], "once each"


def test_a_stranger_in_the_place_of_the_gate_is_refused() -> None:
    stranger = listen(LOOPBACK)
    tunnel = Tunnel(LOOPBACK, stranger.getsockname()[1], KEY)
    with socket.create_connection((LOOPBACK, tunnel.port), timeout=20) as rank:
        rank.sendall(b"what a rank sets")
        far, _ = stranger.accept()
        nonce = far.recv(32, socket.MSG_WAITALL)
        far.sendall(nonce)
        proof = far.recv(32, socket.MSG_WAITALL)
        far.sendall(proof)  # its own, sent back
        assert rank.recv(1) == b"" and far.recv(1) == b"", "closed, and nothing of the rank was sent on"
        far.close()
    tunnel.close()
    stranger.close()


def test_the_address_for_other_machines_is_none_that_leads_back_to_themselves() -> None:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    found = address_of(socket.gethostname())
    assert found in addresses if not all(map(is_loopback, addresses)) else found
    assert is_loopback("127.0.1.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("10.0.0.7") and not is_loopback("node-1")
