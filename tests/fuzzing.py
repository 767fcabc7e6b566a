"""Files as strangers may make them: mutations of sound ones, from a seed, through what reads them.

`fuzz` runs in this process, under audit hooks: no code is compiled or run, no process started, no connection made, no
file outside of the subject's folder and of Python's own opened, no error raised that a user would see as a traceback.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from stoker.checkpoint import CheckpointMismatch, DamagedCheckpoint
from stoker.conf.schema import DataConfig
from stoker.data.remote import Damaged
from stoker.data.tokenizer_files import load_kept
from stoker.launch.cli import main
from stoker.models.hugging_face_weights import open_weights
from stoker.parallel.shards import Chunk
from stoker.trainer.report.metrics import steps
from stoker.trainer.report.summary import History

GOLDEN = Path(__file__).parent / "golden"
SECONDS = 5.0  # that one file may take
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
        roots = {*sysconfig.get_paths().values(), *sys.path, sys.prefix, sys.base_prefix}
        roots |= {"/proc", "/sys", "/dev", "/usr", str(Path(__file__).parent.parent)}
        roots |= {os.path.realpath(root) for root in roots}
        self._python = tuple(root for root in roots if root and root not in ("/", "."))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in ("exec", "compile") and self._is_import(event, arguments):
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, writes = os.path.abspath(os.fsdecode(arguments[0])), bool((arguments[2] or 0) & 3)
            if not path.startswith(str(self.folder)) and (writes or not path.startswith(self._python)):
                self.seen.append(f"open {path}")

    def _is_import(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """A module of Python's or ours that is imported for the first time, or types that our classes declare."""
        name = arguments[0].co_filename if event == "exec" else str(arguments[1])
        if event == "compile" and name == "<unknown>":
            return True  # ast.parse, of the header of a .npy file: it makes no code
        return name.startswith(self._python) or name.startswith("<frozen") or (name == "<string>" and _declares())


def _declares() -> bool:
    """Whether dataclasses make a class, or typing looks up what one declares."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("_find_and_load", "get_type_hints"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_watch: list[_Watch] = []


def fuzz(folder: Path, seed: int, count: int, say: Callable[[str], None] = lambda _: None) -> Counter[str]:
    """Read `count` mutated files; how many of each subject were accepted and refused.

    Raises AssertionError naming seed, subject and file for the first that does what none may.
    """
    if not _watch:
        _watch.append(_Watch())
    watch, found = _watch[0], Counter[str]()
    watch.seen = []
    for subject in SUBJECTS:  # sound ones first: what they import is imported, what they cache is cached
        subject.make(folder / subject.name)
        with _quiet():
            subject.read(folder / subject.name)
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        subject = SUBJECTS[number % len(SUBJECTS)]
        place = folder / subject.name
        files = [entry for entry in place.rglob("*") if entry.is_file() and "cache" not in entry.parts]
        path = chance.choice(sorted(files))
        sound, began = path.read_bytes(), time.process_time()
        path.write_bytes(mutated(sound, chance))
        where = f"seed {seed}, number {number}: {subject.name}/{path.relative_to(place)}"
        watch.folder = folder
        try:
            with _quiet() as output:
                subject.read(place)
            found[f"{subject.name} accepted"] += 1
        except REFUSED:
            found[f"{subject.name} refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        finally:
            watch.folder = None
            path.write_bytes(sound)
        seconds = time.process_time() - began
        assert not watch.seen, f"{where}: {watch.seen[:3]}"
        assert seconds < SECONDS, f"{where}: {seconds:.1f} s"
        assert not set("\x1b\x07\x9b") & set(output.getvalue()), f"{where}: control sequences are printed"
        if (number + 1) % 500 == 0:
            say(f"{number + 1} of {count}")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


def _make_run(place: Path) -> None:
    shutil.copytree(GOLDEN / "indexed", place)
    (place / "attempts" / "1" / "rank-0.stamp").write_text(f"6 update {time.time():.3f} 4194000 host 1\n")
    (place / "attempts" / "1" / "rank-0.log").write_text("a line\n" * 20)


def _read_run(place: Path) -> None:
    for words in (["status"], ["logs", "--lines", "0"], ["checkpoint", "ls"], ["checkpoint", "verify"]):
        assert main([*words[:1], *(words[1:] if words[0] == "checkpoint" else []), str(place), *(
            words[1:] if words[0] == "logs" else [])]) in (0, 1, 2)  # fmt: skip
    History(steps(place / "metrics.jsonl"))
    load_kept(place / "tokenizer")


TEXTS = [{"id": number, "text": f"text of document {number}"} for number in range(20)]
LINES = "".join(json.dumps(value) + "\n" for value in TEXTS).encode()


def _texts(name: str, content: Callable[[], bytes]) -> Subject:
    """Documents of one file, in both modes."""

    def make(place: Path) -> None:
        place.mkdir()
        (place / name).write_bytes(content())

    def read(place: Path) -> None:
        from tests.data.test_formats import indexed, streamed

        indexed(place / name)
        streamed(place / name, max_decompressed_gib=0.05)

    return Subject(f"texts-{name}", make, read)


def _table(kind: str) -> bytes:
    table, file = pa.Table.from_pylist(TEXTS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=6)
    else:
        with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    return file.getvalue()


def _make_tar(place: Path) -> None:
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as archive:
        for number in range(8):
            entry = tarfile.TarInfo(f"{number:04}.txt")
            entry.size = 20
            archive.addfile(entry, io.BytesIO(b"text of document 12\n"))


def _read_tar(place: Path) -> None:
    from stoker.conf.targets import import_target
    from stoker.data.remote import refuse
    from stoker.data.streaming.sources import open_store

    splits = "stoker.data.streaming.webdataset:open_webdataset"
    config = DataConfig(splits=splits, name="tar", urls=str(place / "a.tar"), cache=str(place / "cache"))
    found, store = import_target(splits)(config), open_store(config)
    for split in range(len(found)):
        list(found.read(split, store, refuse))


def _make_ids(place: Path) -> None:
    (place / "ids").mkdir(parents=True)
    np.save(place / "ids" / "a.npy", np.arange(200, dtype=np.uint16))


def _read_ids(place: Path) -> None:
    from stoker.data.token_files import open_source

    shutil.rmtree(place / "cache", ignore_errors=True)
    target, path, cache = "stoker.data.token_files:open_source", str(place / "ids"), str(place / "cache")
    found = open_source(DataConfig(target=target, path=path, cache=cache)).whole
    assert found is None or len(found.ids) >= 0


def _make_tokenizer(place: Path) -> None:
    shutil.copytree(GOLDEN / "indexed" / "tokenizer", place)


def _make_model(place: Path) -> None:
    place.mkdir()
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, place / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_model(place: Path) -> None:
    with open_weights(place) as tensors:
        for tensor in tensors.values():
            tensor.read(Chunk((0,) * len(tensor.shape), tensor.shape))


SUBJECTS = [
    Subject("run", _make_run, _read_run),
    _texts("a.jsonl", lambda: LINES),
    _texts("a.jsonl.gz", lambda: gzip.compress(LINES)),
    _texts("a.csv", lambda: b"id,text\n" + b"".join(b"%d,text of document %d\n" % (n, n) for n in range(20))),
    _texts("a.parquet", lambda: _table("parquet")),
    _texts("a.arrow", lambda: _table("arrow")),
    _texts("s.arrow", lambda: _table("stream")),
    Subject("tar", _make_tar, _read_tar),
    Subject("ids", _make_ids, _read_ids),
    Subject("tokenizer", _make_tokenizer, load_kept),
    Subject("model", _make_model, _read_model),
]
