"""The messages of one real step, kept in a run beside those that `stoker plan` predicts (`log.plan=true`)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.conf.durable import write_whole
from stoker.conf.records import read_record
from stoker.conf.rundir import RunDirectory
from stoker.parallel.mesh import Mesh

log = logging.getLogger(__name__)

COUNTED = 2  # the step of an attempt that is counted: in the first one libraries ask more


@dataclass(frozen=True)
class Counted:
    """What rank 0 sent and received in a step: for each kind and group how many messages, and their bytes together."""

    step: int
    rows: int  # sequences of the step on each data-parallel rank
    messages: list[dict[str, Any]]


def as_list(messages: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """Counts by (kind, group) as JSON has them."""
    return [
        {"kind": kind, "group": group, "count": traffic.count, "bytes": traffic.bytes}
        for (kind, group), traffic in sorted(messages.items())
    ]


class StepMessages:
    """Counts, on a rank with a `path`, the messages of its second step and writes them there.

    In that step each operation is seen by Python, which makes it slower and changes no number.
    """

    def __init__(self, path: Path | None = None, mesh: Mesh | None = None) -> None:
        self._path, self._mesh = path, mesh
        self._steps = 0
        self._mode: Any = None

    @contextmanager
    def of(self, step: int, rows: int | None = None) -> Iterator[None]:
        """Contexts for the passes of `step` and, with the `rows` of this rank, for its update."""
        if self._path is None or self._mesh is None:
            yield
            return
        if self._steps == COUNTED - 1:
            from stoker.trainer.rehearsal.collectives import Collectives  # a second, and few runs count

            self._mode = self._mode or Collectives(self._mesh)
            with self._mode:
                yield
            if rows is not None:
                self._keep(step, rows)
                self._path = None
        else:
            yield
        self._steps += rows is not None

    def _keep(self, step: int, rows: int) -> None:
        assert self._path is not None
        counted = Counted(step, rows, as_list(self._mode.found))
        try:
            write_whole(self._path, (json.dumps(dataclasses.asdict(counted)) + "\n").encode())
        except OSError as error:  # it is for comparison only
            log.warning("the messages of step %d were not written: %s", step, error)


def read_counted(run: RunDirectory, attempt: int) -> Counted | None:
    """The record of an attempt, None where it has none. Raises ValueError for a damaged one."""
    try:
        return read_record(run.messages(attempt), Counted, "a count of messages")
    except FileNotFoundError:
        return None


def beside(predicted: Sequence[Mapping[str, Any]], counted: Counted) -> list[dict[str, Any]]:
    """Rows of kind, group and pairs of predicted and counted numbers and bytes, and whether they are equal."""
    sides = [{(each["kind"], each["group"]): each for each in side} for side in (predicted, counted.messages)]
    none = {"count": 0, "bytes": 0}
    rows = []
    for kind, group in sorted(sides[0].keys() | sides[1].keys()):
        pair = [side.get((kind, group), none) for side in sides]
        of = {what: [each[what] for each in pair] for what in ("count", "bytes")}
        equal = all(one == other for one, other in of.values())
        rows.append({"kind": kind, "group": group, **of, "equal": equal})
    return rows
