"""A rank as a process: death with its launcher, malloc, stamps, log. Its requests: `stoker.trainer.runtime.requests`.

All of it works under any launcher that sets the usual torchrun variables, because it uses only the run directory:
logs, progress stamps, request files and the outcome.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from stoker.conf.durable import is_full, naming, open_own
from stoker.conf.parent_death import die_with
from stoker.conf.printable import printable
from stoker.conf.records import is_sane

LAUNCHER_VARIABLE = "STOKER_LAUNCHER"  # the process id of our launcher on this machine
LAUNCH_VARIABLE = "STOKER_LAUNCH"  # which launch this is, the same for all its restarts
ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"
RESTARTS_VARIABLE = "STOKER_RESTARTS"  # how often a Slurm job has started its ranks again
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_STAMP_BYTES = 128  # of a stamp: each is written over the one before


@dataclass(frozen=True)
class Place:
    """This process's numbers among the ranks, from torchrun's variables; a single rank where they are not set."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    restart: int  # how often the launcher has started the ranks again, or the scheduler the job


def place_from_environment() -> Place:
    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    restart = sum(number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", RESTARTS_VARIABLE, "SLURM_RESTART_COUNT"))
    return Place(
        number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1), restart
    )


def die_with_launcher() -> None:
    """Make the kernel kill this rank when its launcher ends, so that kill -9 of a launcher leaves no rank behind.

    Only under an elastic launcher: a rank started by hand may outlive its shell. To be called before torch is imported,
    which takes seconds.
    """
    if LAUNCHER_VARIABLE in os.environ:
        die_with(int(os.environ[LAUNCHER_VARIABLE]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def launch_id() -> str:
    """Which launch this rank is of: the same after restarts, another when a person or a scheduler starts anew."""
    given = os.environ.get(LAUNCH_VARIABLE)
    if given is not None:
        return given
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return secrets.token_hex(8)  # started by hand, and restarted by none
    parent = os.getppid()  # torchrun, which lives as long as its launch
    with suppress(OSError):
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{socket.gethostname()}-{parent}-{began}"
    return f"{socket.gethostname()}-{parent}"


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next step, instead of returning it to the system and faulting it in again:
    3 to 5% of a step on CPUs. Every step needs the same blocks, so that it grows no further; the holes between blocks
    of different sizes took up to 37% more than what lived, where it was measured."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_freed_memory_back() -> None:
    """The opposite, where memory is what there is too little of: large blocks go back to the system as they are freed.

    By default malloc keeps them, and blocks of many sizes leave holes: 3 bytes for each parameter, under NVMe.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def set_allocator() -> None:
    """Before torch is loaded: the settings of its allocators for GPUs, where the user has none."""
    if not {ALLOCATOR_VARIABLE, "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ[ALLOCATOR_VARIABLE] = allocator_settings(version("torch"))


def allocator_settings(torch_version: str) -> str:
    """Segments that grow leave no holes. Page-locked memory is not rounded up to a power of two (torch 2.13)."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return "expandable_segments:True" + (",pinned_max_round_threshold_mb:1" if (major, minor) >= (2, 13) else "")


class Phase(enum.StrEnum):
    """What a rank is doing, in the order of a run: those of the start, of every step, of some steps, and of the end."""

    START = "start"  # threads, device, process groups
    OPEN_DATA = "open_data"
    BUILD = "build"  # model and optimizer
    RESUME = "resume"  # from a checkpoint, or initial weights
    DATA = "data"
    FORWARD_BACKWARD = "forward_backward"
    AWAIT_STAGED = "await_staged"
    UPDATE = "update"
    EVALUATE = "evaluate"
    SAVE = "save"
    ROLLBACK = "rollback"
    LAST_SAVE = "last_save"
    UPLOAD = "upload"


class Phases:
    """Stamps where others can read them (see `Stamp`), and adds up seconds per phase."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_own(path, os.O_CREAT | os.O_WRONLY)
        self._phase, self._since = Phase.START, time.perf_counter()
        self._seconds: dict[Phase, float] = {}  # since `take_seconds`
        self._totals: dict[Phase, float] = {}  # before that
        self.folder = path.parent
        self._pid, self._host, self._first_step = os.getpid(), socket.gethostname(), 0
        self(0, Phase.START)

    def __call__(self, step: int, phase: Phase) -> None:
        """The rank enters `phase` of `step`."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        self._first_step = self._first_step or step
        stamp = f"{step} {phase} {time.time():.3f} {self._pid} {self._host} {self._first_step}"
        try:
            with naming(self._path):
                os.pwrite(self._file, stamp.ljust(_STAMP_BYTES).encode(), 0)
        except OSError as error:
            if not is_full(error):  # where even overwriting needs room, the next phase stamps again
                raise

    def close(self) -> None:
        """No phase follows."""
        os.close(self._file)

    def take_seconds(self) -> dict[Phase, float]:
        """Seconds per phase since the last call, the present one included."""
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, {}
        seconds[self._phase] = seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        _add(self._totals, seconds)
        return seconds

    def spent(self, phase: Phase) -> float:
        """Seconds in a phase that is over, since the last `take_seconds`."""
        return self._seconds.get(phase, 0.0)

    def totals(self) -> dict[Phase, float]:
        """Seconds per phase since the beginning, the present one included."""
        totals = dict(self._totals)
        _add(totals, self._seconds)
        _add(totals, {self._phase: time.perf_counter() - self._since})
        return totals


def _add(totals: dict[Phase, float], seconds: dict[Phase, float]) -> None:
    for phase, own in seconds.items():
        totals[phase] = totals.get(phase, 0.0) + own


@dataclass(frozen=True)
class Stamp:
    """The last stamped position of a rank."""

    step: int
    phase: Phase
    time: float  # seconds since the epoch
    pid: int
    host: str
    first_step: int = 0  # of the attempt, by this rank; 0 before it


def read_stamps(attempt: Path) -> dict[int, Stamp]:
    """The newest stamp of each rank of an attempt whose directory this is, in the order of ranks.

    Raises ValueError, naming the file, for what is no stamp and for a phase that this version of Stoker does not have.
    """
    found = {}
    for path in attempt.glob("rank-*.stamp"):
        with open(path, "rb") as file:
            words = file.read(_STAMP_BYTES).split()
        if len(words) == 6:  # else it is being written for the first time
            try:
                found[int(path.stem.removeprefix("rank-"))] = _stamp(*(word.decode() for word in words))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    return dict(sorted(found.items()))


def _stamp(step: str, phase: str, moment: str, pid: str, host: str, first_step: str) -> Stamp:
    if phase not in tuple(Phase):
        raise ValueError(f"this version of Stoker has no phase {phase!r}, but {', '.join(Phase)}")
    stamp = Stamp(int(step), Phase(phase), float(moment), int(pid), host, int(first_step))
    possible = stamp.pid >= 1 and 0 <= stamp.time < 1e12  # other process ids stand for groups of processes
    if not possible or not is_sane(list(vars(stamp).values())):
        raise ValueError("it is no stamp of a rank")
    return stamp


class Console:
    """Where this rank writes: everything into its log, and lines for the user on the real terminal.

    Before an attempt is known both are the terminal. Afterwards file descriptors 1 and 2 are the log, so that what C++
    libraries print lands there too.
    """

    def __init__(self) -> None:
        self.screen: TextIO = sys.stdout
        self.errors: TextIO = sys.stderr
        self.log: TextIO | None = None  # once it is not the terminal

    def redirect(self, log_file: Path) -> None:
        self.screen = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        self.errors = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
        sys.stdout.flush()
        sys.stderr.flush()
        file = open_own(log_file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        self.log = sys.stdout
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )

    def say(self, line: str) -> None:
        """A line for the user. Names and messages of files are shown, whatever control characters they hold."""
        self.errors.write(printable(f"stoker: {line}\n"))

    @contextmanager
    def echoing_warnings(self) -> Iterator[None]:
        """While a run starts, warnings and errors of the log are shown too: a damaged checkpoint set aside, say."""
        handler = logging.StreamHandler(self.errors)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Shown("stoker: %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
