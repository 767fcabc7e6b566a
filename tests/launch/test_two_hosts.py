"""Two hosts, each a separate network namespace, under torchrun: a link that fails, and shared resources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import to_dict
from stoker.launch.slurm.batch import KEY_VARIABLE, MEETING_VARIABLE
from stoker.trainer.rendezvous import CONFIG_VARIABLE
from stoker.trainer.runtime.outcome import Outcome, read_ending
from stoker.trainer.runtime.process import LAUNCH_VARIABLE
from stoker.trainer.settle import settle_config
from tests.launch.runs import (
    command,
    finish,
    last_step,
    overrides,
    started,
    steps_of,
    wait_until,
    wait_until_gone,
    write_text,
)

pytestmark = pytest.mark.long

HOSTS = {f"stk{os.getpid()}a": "10.77.0.1", f"stk{os.getpid()}b": "10.77.0.2"}
FIRST, SECOND = HOSTS
DEVICE = "stoker0"
PORT = 29555  # in separate namespaces no port is taken


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces that see each other; skips where they cannot be made."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip (iproute2) and unshare (util-linux)")
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", DEVICE, "netns", FIRST, "type", "veth", "peer", "name", DEVICE, "netns", SECOND)
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", DEVICE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def node(host: str, words: list[str], restarts: int, before: str = "true", interface: str = DEVICE) -> list[str]:
    """torchrun of one host, in its network, under its name and with separate mounts, after the shell's `before`."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--node-rank", str(list(HOSTS).index(host)), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{HOSTS[FIRST]}:{PORT}",
        "--rdzv-conf", f"is_host={int(host == FIRST)}",  # it would look up the host's name, which does not resolve
        "--rdzv-id", "stoker", "--local-addr", HOSTS[host], "--max-restarts", str(restarts),
        "-m", "stoker.trainer", *words,
    ]  # fmt: skip
    script = f'hostname {host} && {before} && exec env GLOO_SOCKET_IFNAME={interface} "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *torchrun]


def test_a_link_cut_in_mid_step_is_a_hang_and_the_run_continues_once_it_is_repaired(
    tmp_path: Path, hosts: None
) -> None:
    write_text(tmp_path / "text")
    more = ["steps=60", "checkpoint.every=5", "launch.hang_seconds=2", "tracker=none"]
    reference, run = tmp_path / "undisturbed", tmp_path / "cut"
    status, output = finish(tmp_path, command("train", *overrides(reference, tmp_path / "text", *more)))
    assert status == 0, output
    words = overrides(run, tmp_path / "text", *more)
    with started(tmp_path, node(FIRST, words, 3)) as first, started(tmp_path, node(SECOND, words, 3)) as second:
        wait_until(lambda: last_step(run) >= 12, first)
        ip("-n", SECOND, "link", "set", DEVICE, "down")
        ending = wait_until(lambda: read_ending(RunDirectory(run), 1), first)
        ip("-n", SECOND, "link", "set", DEVICE, "up")
        told, _ = first.communicate(timeout=120)
        second.communicate(timeout=60)
        wait_until_gone(tmp_path)
    assert first.returncode == 0, told
    assert ending.outcome is Outcome.HUNG and "all 2 ranks wait for each other" in ending.message
    assert told.count("innermost Python frame") == 1 and all(host in told for host in HOSTS)
    assert steps_of(run) == steps_of(reference)


GATE = """
import socket, sys, time
from stoker.launch.gate import Gate, new_key
from stoker.parallel.loopback import loopback_store
store, key = loopback_store(), new_key()
gate = Gate(sys.argv[1], store.port, bytes.fromhex(key))
print("gate", store.port, gate.port, key, flush=True)
time.sleep(600)
"""


def test_nodes_meet_at_a_gate_and_a_stranger_on_the_network_reaches_nothing(tmp_path: Path, hosts: None) -> None:
    run, address = RunDirectory(tmp_path / "run"), HOSTS[FIRST]
    write_text(tmp_path / "text")
    words = overrides(run.path, tmp_path / "text", "steps=3", "launch.nproc=1", "tracker=none")
    config, _ = settle_config(words, lambda _: (2, 0))
    run.attempts.mkdir(parents=True)
    gate = ["ip", "netns", "exec", FIRST, sys.executable, "-P", "-c", GATE, address]
    with started(tmp_path, gate) as first:
        assert first.stdout is not None
        lines = map(str.split, first.stdout)  # torch may print one of its own
        store_port, gate_port, key = next(words[1:] for words in lines if words[:1] == ["gate"])

        def launcher(number: int, host: str) -> list[str]:
            given = {
                CONFIG_VARIABLE: json.dumps(to_dict(config)), MEETING_VARIABLE: f"{FIRST}:{address}:{gate_port}",
                KEY_VARIABLE: key, LAUNCH_VARIABLE: "slurm-1", "SLURM_NODEID": str(number),
                "SLURM_STEP_NUM_NODES": "2",
            }  # fmt: skip
            program = ["env", *(f"{name}={value}" for name, value in given.items()), sys.executable, "-P", "-m"]
            script = f'hostname {host} && exec env GLOO_SOCKET_IFNAME={DEVICE} "$@"'
            inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", script, "sh"]
            return [*inside, *program, "stoker.launch.slurm.node"]

        stranger = "import socket; s = socket.create_connection(({!r}, {}), 5); s.sendall(b'x' * 64); "
        stranger += "s.shutdown(socket.SHUT_WR); assert len(s.recv(9999)) == 32 and s.recv(1) == b''"
        tried = [
            subprocess.run(
                ["ip", "netns", "exec", SECOND, sys.executable, "-c", stranger.format(address, port)],
                capture_output=True, text=True,
            )
            for port in (store_port, gate_port)
        ]  # fmt: skip
        assert "ConnectionRefusedError" in tried[0].stderr, "the store itself is on loopback"
        assert tried[1].returncode == 0, f"a nonce and no more: {tried[1].stderr}"
        with started(tmp_path, launcher(0, FIRST)) as node_0, started(tmp_path, launcher(1, SECOND)) as node_1:
            told = node_0.communicate(timeout=120)[0] + node_1.communicate(timeout=60)[0]
    assert (node_0.returncode, node_1.returncode) == (0, 0), told
    assert last_step(run.path) == 3


LATE = "import time; real = time.time; time.time = lambda: real() - 60"
NAMED = f"mount --bind hosts /etc/hosts && echo 127.0.1.1 {SECOND} > /etc/hosts"


@pytest.mark.parametrize(
    ("before", "interface", "line", "status"),
    [
        ("mount -t tmpfs none run", DEVICE, f"is not shared: {SECOND} does not see what rank 0 writes there", 1),
        (NAMED, "", f"{SECOND} resolves its own name to 127.0.1.1, where other machines cannot reach its ranks", 1),
        ("export PYTHONPATH=late", DEVICE, f"the clock of {SECOND} is 60 s behind that of rank 0", 0),
    ],
    ids=["run directory", "name", "clock"],
)
def test_what_hosts_must_have_in_common_is_one_line_where_they_have_it_not(
    tmp_path: Path, hosts: None, before: str, interface: str, line: str, status: int
) -> None:
    write_text(tmp_path / "text")
    for folder in ("run", "late"):
        (tmp_path / folder).mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(LATE)
    (tmp_path / "hosts").touch()
    words = overrides(tmp_path / "run", tmp_path / "text", "steps=1", "tracker=none")
    nodes = [node(FIRST, words, 0), node(SECOND, words, 0, before, interface)]
    with started(tmp_path, nodes[0]) as first, started(tmp_path, nodes[1]) as second:
        told, _ = first.communicate(timeout=60)
        told += second.communicate(timeout=60)[0]
    assert first.returncode == status, told
    assert len([one for one in told.splitlines() if one.startswith("stoker: ") and line in one]) == 1, told
    assert len(RunDirectory(tmp_path / "run").attempt_numbers()) == 1 or status, told
