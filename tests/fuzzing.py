"""Files as strangers may make them: mutations of sound ones, from a seed, through what reads them.

`fuzz` runs in this process, under audit hooks: no code is compiled or run, no process started, no connection made, no
file outside of the fuzz's folder and of Python's own opened, no error raised that a user would see as a traceback, and
neither more time nor more memory taken than the limits here. The subjects are those of `tests.fuzz_subjects`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from stoker.checkpoint import CheckpointMismatch, DamagedCheckpoint
from stoker.data.remote import Damaged

SECONDS = 5.0  # of processor time that one file may take
MEBIBYTES = 1024  # that reading mutated files may add to the memory of this process
REFUSED = (ValueError, OSError, DamagedCheckpoint, CheckpointMismatch, Damaged)
FORBIDDEN = {"exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
FORBIDDEN |= {"socket.connect", "socket.bind", "os.fork", "ctypes.dlopen"}
SNIPPETS = [
    b"[" * 5000, b'{"a":' * 5000, b"1e999", b"-1", b"9" * 400, b"NaN", b"\x1b]0;x\x07", b"\xff\xfe", b"\0" * 64,
    b"../../../../etc/passwd", b"/etc/passwd", b"pipe:touch owned", b"!!python/object/apply:os.system [id]", b"&a [*a]",
    b"tests.toy:build", b"{{ ''.__class__.__mro__ }}", b"\x80\x04cos\nsystem\n", b"null", b"[]", b'""', b"true",
]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A folder of sound files, and what reads them. What it raises of `REFUSED` is an answer."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    share: int = 4  # how often its turn comes, beside others: less for those that take half a second


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` changed in one to three places."""
    for _ in range(chance.randrange(1, 4)):
        at, length = chance.randrange(len(content) + 1), chance.choice([0, 1, 2, 8, 60, 1000])
        what = chance.randrange(6)
        if what == 0 and content:
            place = min(at, len(content) - 1)
            content = content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]
        elif what == 1:
            content = content[:at]
        elif what == 2:
            content = content[:at] + content[at + length :]
        elif what == 3:
            content = content[:at] + content[at : at + length] * 3 + content[at + length :]
        elif what == 4:
            content = content[:at] + chance.choice(SNIPPETS) + content[at + length :]
        else:
            content = content[:at] + chance.randbytes(length) + content[at + length :]
    return content


class _Watch:
    """An audit hook, which cannot be taken away, and so is switched on and off."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        self.bystanders: set[int] = set()  # threads of tests before: not the reader's
        roots = {*sysconfig.get_paths().values(), *sys.path, sys.prefix, sys.base_prefix}
        roots |= {"/proc", "/sys", "/dev", "/usr", str(Path(__file__).parent.parent)}
        roots |= {os.path.realpath(root) for root in roots}
        self._python = tuple(root for root in roots if root and root not in ("/", "."))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or threading.get_ident() in self.bystanders:
            return
        if event in ("exec", "compile") and self._is_import(event, arguments):
            return
        if event in FORBIDDEN and not (event == "os.fork" and _is_called_by("forks.py")):  # readers of data are forked
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, writes = os.path.abspath(os.fsdecode(arguments[0])), bool((arguments[2] or 0) & 3)
            writes = writes and path != os.devnull
            if not path.startswith(str(self.folder)) and (writes or not path.startswith(self._python)):
                self.seen.append(f"open {path}")

    def _is_import(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """A module of Python's or ours that is imported for the first time, types that classes declare, or a chat
        template, which jinja2 compiles for its sandbox."""
        name = arguments[0].co_filename if event == "exec" else str(arguments[1])
        if event == "compile" and name == "<unknown>":
            return True  # ast.parse, of the header of a .npy file: it makes no code
        if name in ("<template>", "<unknown>") and _is_called_by("jinja2"):
            return True
        own = name == "<string>" and (_is_called_by("typing.py") or _is_called_by("_bootstrap>"))
        return name.startswith(self._python) or name.startswith("<frozen") or own


def _is_called_by(part: str) -> bool:
    """Whether a function of a file with this in its name is being called: typing and dataclasses make code of types."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if part in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


_watch: list[_Watch] = []


def fuzz(
    folder: Path, subjects: Sequence[Subject], seed: int, numbers: range, say: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """Read a mutated file for each of `numbers`; how many of each subject were accepted and refused.

    Raises AssertionError naming seed, number, subject and file for each that does what none may.
    """
    if not _watch:
        _watch.append(_Watch())
    found, misdeeds = Counter[str](), list[str]()
    with _temporary_files_in(folder):
        for subject in subjects:  # sound ones first: what they import is imported, what they cache is cached
            subject.make(folder / subject.name)
            with _quiet():
                subject.read(folder / subject.name)
        _forget_peak()  # of what this process did before
        memory = _peak_mebibytes()
        turns = [subject for round_ in range(4) for subject in subjects if round_ < subject.share]
        for number in numbers:
            subject = turns[number % len(turns)]
            try:
                found[f"{subject.name} {_read_one(folder, subject, f'{seed}-{number}', memory)}"] += 1
            except AssertionError as misdeed:
                misdeeds.append(str(misdeed))
                say(misdeeds[-1])
            if (number + 1) % 500 == 0:
                say(f"{number + 1:,} files, {len(misdeeds)} of them do what none may")
    assert not misdeeds, "\n".join(misdeeds)
    return found


def _read_one(folder: Path, subject: Subject, seed: str, memory: float) -> str:
    """Read the subject with one of its files mutated: was it accepted or refused? Raises AssertionError."""
    watch, chance = _watch[0], random.Random(seed)
    watch.seen = []
    watch.bystanders = {thread.ident or 0 for thread in threading.enumerate()} - {threading.get_ident()}
    place = folder / subject.name
    files = [entry for entry in place.rglob("*") if entry.is_file() and "cache" not in entry.parts]
    path = chance.choice(sorted(files))
    sound, began = path.read_bytes(), time.process_time()
    path.write_bytes(mutated(sound, chance))
    where = f"{seed}: {subject.name}/{path.relative_to(place)}"
    watch.folder = folder
    try:
        with _quiet() as output:
            subject.read(place)
        verdict = "accepted"
    except REFUSED:
        verdict = "refused"
    except BaseException as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        watch.folder = None
        path.write_bytes(sound)
    seconds = time.process_time() - began
    assert not watch.seen, f"{where}: {watch.seen[:3]}"
    assert seconds < SECONDS, f"{where}: {seconds:.1f} s"
    assert _peak_mebibytes() < memory + MEBIBYTES, f"{where}: {_peak_mebibytes():,.0f} MiB, {memory:,.0f} before"
    assert not set("\x1b\x07\x9b") & set(output.getvalue()), f"{where}: control sequences are printed"
    return verdict


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Temporary files and caches of this process are made under `folder`."""
    before, cache = tempfile.tempdir, os.environ.get("XDG_CACHE_HOME")
    (folder / "tmp").mkdir()
    tempfile.tempdir, os.environ["XDG_CACHE_HOME"] = str(folder / "tmp"), str(folder / "cache")
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.environ.pop("XDG_CACHE_HOME")
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache


def _peak_mebibytes() -> float:
    """The most memory that this process held since `_forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
