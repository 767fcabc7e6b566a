"""metrics.jsonl: one JSON object per step, written by global rank 0, and how it is read back.

Every line is handed to the operating system at once, so that a killed process loses at most the line it was writing.
Floats are written by `repr`, so that equal text means bitwise equal numbers. JSON has neither nan nor infinity: such
a number is written as null, and the line lists its key under "nonfinite".
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from stoker.conf.durable import is_full, naming, open_own, sync_directory, with_room
from stoker.conf.reasons import reason
from stoker.conf.records import is_sane, parse_json
from stoker.conf.schema import Config
from stoker.trainer.report.observer import Observer, StepRecord
from stoker.trainer.runtime.starts import Start

_RECENT_BYTES = 1 << 20  # some three thousand steps
_BACKWARD_BYTES = 64 << 10  # read at a time from the end
_MOST_WAITING_BYTES = 256 << 20  # of lines that a full disk has not taken
_LONGEST_LINE = 1 << 20  # bytes
_NUMBER = (int, float, type(None))  # null: it was not finite
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("updates", "tokens"), (int,)),
    **dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "data_seconds"), _NUMBER),
    **dict.fromkeys(("skipped", "empty"), (bool, int)),
    **dict.fromkeys(("val_loss", "train_loss"), _NUMBER),
    "expert_tokens": (dict,),
}
_encode = json.JSONEncoder(allow_nan=False).encode


class MetricsFile(Observer):
    """Appends to `path`.

    Lines that a full disk does not take wait in memory, in order, and follow when there is room: what is lost with the
    process are lines of steps that no checkpoint has. `failure` is the reason why lines wait. Raises OSError, naming
    the file, for other errors, and when too much waits. A background thread may `flush`.

    Once another start of the run than `owner` has begun, the file belongs to that one: this one changes nothing in it.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, owner: Start | None = None) -> None:
        self.path = path
        self._owner = owner
        self.failure: str | None = None
        self._file: int | None = None
        self._waiting = bytearray()
        self._lock = threading.Lock()

    def start(self, config: Config, resumed_from_step: int | None, total_steps: int, facts: Mapping[str, str]) -> None:
        self._cut_back(resumed_from_step or 0)
        self._file = open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sync_directory(self.path.parent)

    def rolled_back(self, step: int) -> None:
        self.flush(sync=False)
        assert self._file is not None, "rolled back before start"
        os.close(self._file)
        self._cut_back(step)
        self._file = open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self, record: StepRecord) -> None:
        assert self._file is not None, "step before start"
        with self._lock:
            self._waiting += (_encode(as_dict(record)) + "\n").encode()
            try:
                self._write()
            except OSError as error:
                if not is_full(error) or len(self._waiting) > _MOST_WAITING_BYTES:
                    raise
                self.failure = reason(error)

    def flush(self, sync: bool = True) -> None:
        """Write what waits. With `sync`, return once every step so far is on the disk: a checkpoint commits after it.

        Raises OSError, naming the file, also for a full disk.
        """
        with self._lock:
            if self._file is None:
                return
            self._write()
            if sync:
                with naming(self.path):
                    os.fsync(self._file)

    def finish(self, outcome: str, step: int) -> None:
        if self._file is None:
            return
        with_room(self.flush)
        os.close(self._file)
        self._file = None

    def _cut_back(self, step: int) -> None:
        with self._owner.exclusively() if self._owner is not None else nullcontext(True) as newest:
            if newest:
                cut_back(self.path, step)

    def _write(self) -> None:
        assert self._file is not None
        if self._owner is not None and not self._owner.is_newest():
            self._waiting.clear()
        with naming(self.path):
            while self._waiting:  # a nearly full disk takes part of a line, and refuses the rest
                del self._waiting[: os.write(self._file, self._waiting)]
        self.failure = None


def as_dict(record: StepRecord) -> dict[str, Any]:
    """`record` as the JSON object of its line."""
    values: dict[str, Any] = {
        "step": record.step,
        "updates": record.updates,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "tokens": record.tokens,
        "tokens_per_second": record.tokens_per_second,
        "step_seconds": record.step_seconds,
        "data_seconds": record.data_seconds,
        "skipped": record.skipped,
    }
    if record.empty:
        values["empty"] = True
    if record.val_loss is not None:
        values["val_loss"] = record.val_loss
    for key, value in record.extra.items():
        assert key not in values, f"extra metric {key!r} has the name of a metric of every step"
        values[key] = value
    if record.expert_tokens:
        values["expert_tokens"] = {str(layer): own for layer, own in record.expert_tokens.items()}
    nonfinite = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if nonfinite:
        values |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
    return values


def read(path: Path) -> list[dict[str, Any]]:
    """The steps in the file, in order: `steps` as a list, for what needs them all at once."""
    return list(steps(path))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps in the file, in order, one at a time. No file means no steps.

    A line torn by a kill is left out, and so is one that no run writes: no object of a step, values of other types,
    numbers that are not finite.
    """
    yield from _lines(path)


def read_recent(path: Path) -> list[dict[str, Any]]:
    """As `read`, but no more than the last of them: as quick after a million steps as after ten thousand."""
    return list(_lines(path, _RECENT_BYTES))


def last_step(path: Path) -> int:
    """The last step in the file, 0 without one. Reads no more than the end."""
    try:
        with open(path, "rb") as file:
            return _last_line(file, None)[1]
    except FileNotFoundError:
        return 0


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after that of the last step up to `step`, torn ones too.

    In place, which needs no room on the disk and reads only what is dropped.
    """
    try:
        descriptor = open_own(path, os.O_RDWR)
    except FileNotFoundError:
        return
    with open(descriptor, "rb+", buffering=0) as file, naming(path):
        end = _last_line(file, step)[0]
        if end < os.fstat(descriptor).st_size:
            file.truncate(end)
            os.fsync(descriptor)


def _last_line(file: IO[bytes], most: int | None) -> tuple[int, int]:
    """Where the last whole line of a step ends, of one up to `most` if given, and its step; (0, 0) without one."""
    begin = file.seek(0, os.SEEK_END)
    tail, stop = b"", 0  # not searched yet: `stop` bytes of the file from `begin` on
    while begin or stop:
        start = tail.rfind(b"\n", 0, max(0, stop - 1)) + 1
        if start == 0 and begin:  # the line begins before what has been read
            if stop > _LONGEST_LINE:  # no line of ours: it is passed over, and not held
                tail, stop = b"", 0
            size = min(max(_BACKWARD_BYTES, stop), begin)
            begin -= size
            file.seek(begin)
            tail = file.read(size) + tail[:stop]
            stop += size
            continue
        step = _step_in(tail[start:stop])
        if step is not None and (most is None or step <= most):
            return begin + stop, step
        stop = start
    return 0, 0


def _step_in(line: bytes) -> int | None:
    """The step of a whole line; None for a torn one or something else."""
    values = _values_in(line)
    return None if values is None else values["step"]


def _lines(path: Path, most_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        if most_bytes is not None:
            file.seek(-min(most_bytes, os.fstat(file.fileno()).st_size), os.SEEK_END)
        while line := file.readline(_LONGEST_LINE):
            values = _values_in(line)
            if values is not None:
                yield values


def _values_in(line: bytes) -> dict[str, Any] | None:
    """What a whole line of a step holds; None for a torn one or something else."""
    try:
        values = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or not is_sane(values):
        return None
    for key, kinds in _KINDS.items():
        if key in values and type(values[key]) not in kinds:
            return None
    return values
