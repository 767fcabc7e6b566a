"""Hosts in separate network namespaces, behind one switch, each with a fault that probes are to find.

A slow link is a token bucket on a host's interface: not every kernel has netem.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.extent import some
from tests.launch.runs import started

pytestmark = pytest.mark.long

MARK = f"skp{os.getpid()}"
SWITCH, HOSTS = f"{MARK}s", {f"{MARK}{letter}": f"10.78.0.{number}" for number, letter in enumerate("abc", 1)}
DEVICE = "probe0"
PORT = 29556
CLOCK = "import time; real = time.time; time.time = lambda: real() - 2"
SLOW = "tc qdisc add dev {device} root tbf rate 10mbit burst 32kb latency 400ms"
CODE = """
import json, os, socket, sys
from datetime import timedelta
import torch, torch.distributed as dist
from stoker.conf.schema import Config
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import start_mesh
from stoker.trainer.probe.judge import judge
from stoker.trainer.probe.measure import PREFLIGHT, measure
from stoker.trainer.runtime.process import place_from_environment
place = place_from_environment()
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.world, place.rank == 0)
mesh = start_mesh(layout_of(Config(), place.world), torch.device("cpu"), store, place.rank, 120.0, "gloo")
torch.set_num_threads(1)
findings = judge(measure(Config(), mesh, place, PREFLIGHT), Config())
if place.rank == 0:
    for finding in findings:
        print("FOUND", finding.severity, finding.subject, finding.text, flush=True)
    print("DONE", flush=True)
mesh.any([False])
os._exit(0)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Three namespaces on a switch; skips where they cannot be made."""
    if any(shutil.which(program) is None for program in ("ip", "tc", "unshare")):
        pytest.skip("needs ip, tc (iproute2) and unshare (util-linux)")
    try:
        for name in (SWITCH, *HOSTS):
            ip("netns", "add", name)
        ip("-n", SWITCH, "link", "add", "switch", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "switch", "up")
        for name, address in HOSTS.items():
            port = f"port{name[-1]}"
            ip("link", "add", DEVICE, "netns", name, "type", "veth", "peer", "name", port, "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", port, "master", "switch", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", DEVICE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in (SWITCH, *HOSTS):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def program(host: str, words: list[str], before: str, count: int) -> list[str]:
    """A rank of `count` hosts with one rank each, in its network, after the shell's `before`."""
    rank = list(HOSTS).index(host)
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": PORT}
    given = [f"{name}={value}" for name, value in place.items()]
    given += [f"MASTER_ADDR={next(iter(HOSTS.values()))}", f"GLOO_SOCKET_IFNAME={DEVICE}", "OMP_NUM_THREADS=1"]
    script = f'hostname {host} && {before} && exec env {" ".join(given)} "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *words]


def findings(home: Path, words: list[str], befores: dict[str, str], count: int) -> str:
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(started(home, program(host, words, befores.get(host, "true"), count)))
            for host in list(HOSTS)[:count]
        ]
        said = ranks[0].communicate(timeout=240)[0]
        for rank in ranks[1:]:
            rank.communicate(timeout=60)
    assert ranks[0].returncode in (0, 1), said
    return said


def shaped(number: int, ends: tuple[str, ...]) -> str:
    """Slow the link of one host, at its own end, the switch's, or both. The command that takes it back follows."""
    host = list(HOSTS)[number]
    places = {"own": (host, DEVICE), "switch": (SWITCH, f"port{host[-1]}")}
    for end in ends:
        where, device = places[end]
        subprocess.run(["ip", "netns", "exec", where, *SLOW.format(device=device).split()], check=True)
    return host


def restored() -> None:
    for where, devices in ((SWITCH, [f"port{name[-1]}" for name in HOSTS]), *((name, [DEVICE]) for name in HOSTS)):
        for device in devices:
            subprocess.run(["tc", "-n", where, "qdisc", "del", "dev", device, "root"], capture_output=True)


CASES = [(number, ends) for ends in (("own", "switch"), ("own",), ("switch",)) for number in (2, 1, 0)]


@pytest.mark.parametrize(("number", "ends"), some(CASES, 5), ids=str)
def test_a_host_with_a_slow_link_is_named(tmp_path: Path, hosts: None, number: int, ends: tuple[str, ...]) -> None:
    try:
        host = shaped(number, ends)
        said = findings(tmp_path, [sys.executable, "-c", CODE], {}, 3)
    finally:
        restored()
    way = {2: "to and from", 1: "from" if ends == ("own",) else "to"}[len(ends)]
    assert f"FOUND warn link messages {way} {host} go at" in said, said  # processors that are busy slow others too


def test_a_clock_a_package_and_a_small_dev_shm_are_found_on_the_host_that_has_them(tmp_path: Path, hosts: None) -> None:
    second = list(HOSTS)[1]
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(CLOCK)
    info = tmp_path / "late" / "safetensors-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    before = f"mount -t tmpfs -o size=16m none /dev/shm && export PYTHONPATH={tmp_path / 'late'}"
    said = findings(tmp_path, [sys.executable, "-c", CODE], {second: before}, 2)
    for words in (
        f"warn clock the clock of {second} is 2.0 s behind",
        f"warn shm /dev/shm of {second} has 16 MiB",
        f"refuse version safetensors is 0.0.1 on {second} (ranks 1)",
    ):
        assert words in said, said
    others = [line for line in said.splitlines() if line.startswith("FOUND") and " link " not in line]
    assert len(others) == 3, said  # two busy hosts' directions may differ
