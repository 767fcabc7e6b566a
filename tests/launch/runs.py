"""Real runs for tests: `stoker train` as a process, small enough for seconds."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from stoker.checkpoint import newest
from stoker.checkpoint.compare import compare
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, to_dict
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome, read_ending
from stoker.trainer.runtime.process import LAUNCH_VARIABLE, read_stamps
from tests import world

SMALL = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.intermediate_size=64",
    "seq_len=32", "batch.size=8", "batch.micro_size=2", "steps=30", "launch.nproc=2", "parallel.zero=2",
    "precision=fp32", "optim.lr=1e-2", "checkpoint.every=5", "data=text", "launch.threads=1", "log.every=1",
    "eval.sequences=0",
]  # fmt: skip
COMPARED = ("step", "updates", "loss", "grad_norm", "lr", "tokens")  # the columns that "bitwise" compares


def write_text(folder: Path, documents: int = 40) -> Path:
    """A folder of small documents of very unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = (f"document {number} says {n * n % 97} and {n}" for n in range(1 + number * number % 61))
        (folder / f"{number:03}.txt").write_text("\n".join(words) + "\n")
    return folder


def overrides(run: Path, data: Path, *more: str) -> list[str]:
    """The words of a small run; `more` comes last and wins."""
    chosen = {word.split("=")[0]: word for word in (*SMALL, f"data.path={data}", f"run.dir={run}", *more)}
    return list(chosen.values())


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "stoker.launch.cli", *words]


@contextmanager
def started(home: Path, words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a separate session. When the block ends, it and everything that runs under `home` are ended."""
    process = subprocess.Popen(
        words, env=environment(home), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, cwd=options.pop("cwd", home), **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in processes_of(home):
            kill(pid)
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:  # `wait_until` has read it where it failed
            process.communicate()


def finish(home: Path, words: list[str], timeout: float = 480.0, **options: Any) -> tuple[int, str]:
    """Run to the end; (exit status, all output)."""
    with started(home, words, **options) as process:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output


def train_forked(home: Path, words: list[str]) -> tuple[int, str]:
    """`stoker train` on forked ranks: (exit status, all output), as `finish` gives them.

    It takes none of the seconds that the start of processes takes. There is no launcher: nothing is restarted, and no
    other process watches.
    """
    given = [int(word.removeprefix("launch.nproc=")) for word in words if word.startswith("launch.nproc=")]
    return _forked(home, given[0] if given else 2, words, None)


def launch_forked(home: Path, config: Config, ranks: int, *arguments: str) -> tuple[int, str]:
    """As `train_forked`, of a settled config: what `stoker.launch.local.launch` does for commands that train."""
    return _forked(home, ranks, list(arguments), json.dumps(to_dict(config)))


def _forked(home: Path, ranks: int, words: list[str], settled: str | None) -> tuple[int, str]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    meeting[LAUNCH_VARIABLE] = secrets.token_hex(8)
    with tempfile.NamedTemporaryFile() as output:
        given = environment(home) | meeting, home, words, settled, output.name
        statuses = world.exit_statuses(_train, ranks, *given, timeout=500.0)
        own = [status for status in statuses if status >= 0]  # the others were killed when a rank had ended
        return max(own, default=0) or max(map(abs, statuses)), Path(output.name).read_text()


def _train(environment: dict[str, str], home: Path, words: list[str], settled: str | None, output: str) -> None:
    from stoker.conf.values import ConfigError  # not at the top: tests that only start processes do not need these
    from stoker.trainer.checking import measure
    from stoker.trainer.main import main
    from stoker.trainer.rendezvous import CONFIG_VARIABLE
    from stoker.trainer.settle import settle_config
    from stoker.trainer.tasks import run_tasks
    from stoker.trainer.teaching import teach

    os.environ |= environment
    os.chdir(home)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if settled is None:
        try:
            settled = json.dumps(to_dict(settle_config(words, lambda _: (int(os.environ["WORLD_SIZE"]), 0))[0]))
        except ConfigError as error:
            print(f"stoker: {error}")
            os._exit(2)
    os.environ[CONFIG_VARIABLE] = settled
    work = {"--measure": measure, "--teach": teach, "--tasks": run_tasks}.get("".join(words))
    status = main(words) if work is None else main([], work)
    sys.stdout.flush()
    os._exit(status)


def train_here(home: Path, words: list[str]) -> None:
    """`train_forked` to the last step. Raises AssertionError unless the run is completed."""
    status, output = train_forked(home, words)
    (run,) = (RunDirectory(Path(word.removeprefix("run.dir="))) for word in words if word.startswith("run.dir="))
    ending = read_ending(run, run.attempt_numbers()[-1]) if status == 0 else None
    assert ending is not None and ending.outcome is Outcome.COMPLETED, output


def steps_of(run: Path) -> list[tuple[Any, ...]]:
    """The part of metrics.jsonl that must not depend on where and how a run ran."""
    return [tuple(step[key] for key in COMPARED) for step in read(RunDirectory(run).metrics)]


def assert_same_state(run: Path, reference: Path) -> None:
    """Weights and optimizer state of the newest checkpoints of two runs are equal to the last bit."""
    (path, *_), (expected, *_) = (newest(RunDirectory(folder).checkpoints) for folder in (run, reference))
    assert path.name == expected.name
    found = compare(path, expected)
    assert found.equal_tensors > 0 and not found.tensors, found.tensors[:5]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240.0) -> Any:
    """What `condition` returns once it is true. Raises AssertionError when the process ends or the time is up first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, f"ended early:\n{process.communicate()[0]}"
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


def last_step(run: Path) -> int:
    steps = read(RunDirectory(run).metrics)
    return steps[-1]["step"] if steps else 0


def rank_pids(run: Path) -> dict[int, int]:
    """Process ids of the ranks of the newest attempt that are alive, by rank."""
    directory = RunDirectory(run)
    numbers = directory.attempt_numbers()
    found = {}
    for rank, stamp in read_stamps(directory.attempt(numbers[-1])).items() if numbers else ():
        if is_alive(stamp.pid):
            found[rank] = stamp.pid
    return found


def processes_of(home: Path) -> list[int]:
    """Living processes of the runs under `home`: all of them, orphans too, inherited its cache in their environment."""
    mark = f"XDG_CACHE_HOME={home / 'cache'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and is_alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """The IP addresses at which these processes listen for TCP connections, as the kernel lists them."""
    held = set()
    for pid in pids:
        for entry in (Path("/proc") / str(pid) / "fd").iterdir():
            with suppress(OSError):
                held.add(os.readlink(entry))
    found = set()
    for table, words in (("tcp", 1), ("tcp6", 4)):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                packed = struct.pack(f"={words}I", *struct.unpack(f">{words}I", bytes.fromhex(fields[1].split(":")[0])))
                found.add(str(ipaddress.ip_address(packed)))
    return found


def wait_until_gone(home: Path, seconds: float = 5.0) -> None:
    """Raises AssertionError naming the processes of `home` that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(home)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"left behind: {left}"


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
