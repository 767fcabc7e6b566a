"""The hang watchdog: detects from outside that ranks make no progress, names them, and ends the attempt.

Every machine has one: our launcher, or under another launcher a process beside local rank 0 (`python -m
stoker.trainer.runtime.watchdog`). All read the stamps of all ranks in the run directory and use their own clocks. When
the rank that is furthest behind has not moved for longer than its phase may take, each examines the ranks of its
machine (`stoker.trainer.runtime.hang_report`), the one of rank 0 prints one table, and each kills its ranks; the
launcher starts them again.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stoker.conf.durable import write_whole
from stoker.conf.parent_death import die_with
from stoker.conf.reasons import reason
from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.hang_report import Finding, behind, examine, explain, is_stopped, place_of, table
from stoker.trainer.runtime.outcome import Ending, Outcome, read_ending, write_ending
from stoker.trainer.runtime.process import Phase, Stamp, read_stamps

LOOK_SECONDS = 0.5
REST = 50  # a watchdog waits this many times as long as a check takes, which grows with the ranks
LEAST_SECONDS = 120.0  # a file system on a network may show stamps a minute late
STEPS = 30  # median steps without progress are a hang
GENEROUS = 10  # factor for rare phases, and for the first step, which may compile
LEAST_GENEROUS_SECONDS = 900.0
ALLOWED = {  # factors of the limit for a phase of every step
    Phase.START: GENEROUS,
    Phase.OPEN_DATA: GENEROUS,
    Phase.BUILD: GENEROUS,
    Phase.RESUME: GENEROUS,
    Phase.DATA: 1,
    Phase.FORWARD_BACKWARD: 1,
    Phase.AWAIT_STAGED: GENEROUS,
    Phase.UPDATE: 1,
    Phase.EVALUATE: GENEROUS,
    Phase.SAVE: GENEROUS,
    Phase.ROLLBACK: GENEROUS,
    Phase.LAST_SAVE: GENEROUS,
    Phase.UPLOAD: GENEROUS,
}
LATE_SECONDS = 10.0  # a look this late: the watchdog itself was stopped, suspended or starved
OTHERS_SECONDS = 8.0  # the watchdogs of other machines have this long to examine their ranks


class Watch:
    """Stamps over time, by the clock of the watchdog; pure arithmetic."""

    def __init__(self, hang_seconds: float | None) -> None:
        self._given = hang_seconds
        self._stamps: dict[int, Stamp] = {}
        self._since: dict[int, float] = {}  # when a rank's present stamp was first seen
        self._paces: deque[float] = deque(maxlen=50)  # seconds per step
        self._newest: tuple[int, float] | None = None  # step, when first seen

    def see(self, stamps: Mapping[int, Stamp], now: float) -> None:
        for rank, stamp in stamps.items():
            if rank not in self._stamps or self._stamps[rank] != stamp:
                self._stamps[rank], self._since[rank] = stamp, now
        step = max((stamp.step for stamp in stamps.values()), default=0)
        if self._newest is None or step > self._newest[0]:
            if self._newest is not None and self._newest[0] > max(stamp.first_step for stamp in stamps.values()) > 0:
                self._paces.append((now - self._newest[1]) / (step - self._newest[0]))
            self._newest = step, now

    def count_anew(self, now: float) -> None:
        """Nobody has been watched for a while, and may not have been run either: every rank has just come where it is.

        A step over this time says nothing about the pace.
        """
        self._since = dict.fromkeys(self._since, now)
        if self._newest is not None:
            self._newest = self._newest[0], now

    def limit(self, stamp: Stamp, stopped: bool = False) -> float:
        """Seconds that a rank may stay at `stamp`; in any phase the usual limit if a signal has stopped it there."""
        pace = statistics.median(self._paces) if self._paces else 0.0
        usual = self._given or max(LEAST_SECONDS, STEPS * pace)
        times = ALLOWED[stamp.phase] if stamp.step > stamp.first_step > 0 else GENEROUS
        if stopped or times == 1:
            return usual
        return times * usual if self._given else max(times * usual, LEAST_GENEROUS_SECONDS)

    def seconds(self, now: float) -> dict[int, float]:
        """For how long each rank has had its present stamp."""
        return {rank: now - since for rank, since in self._since.items()}

    def hangs(self, now: float, stopped: Collection[int] = ()) -> bool:
        """The rank furthest behind decides: the others may wait for it as long as its phase may take.

        `stopped`: ranks on this machine that a signal has stopped (SIGSTOP).
        """
        if not self._stamps:
            return False
        last = min(place_of(stamp) for stamp in self._stamps.values())
        return any(
            now - self._since[rank] > self.limit(stamp, rank in stopped)
            for rank, stamp in self._stamps.items()
            if place_of(stamp) == last
        )


class Watchdog:
    """Watches `ranks`, which run on this machine, in one attempt of `run`. `say` prints to the user's terminal."""

    def __init__(
        self, run: RunDirectory, attempt: int, ranks: range, hang_seconds: float | None, say: Callable[[str], None]
    ) -> None:
        self._run, self._attempt, self._ranks, self._say = run, attempt, ranks, say
        self._watch = Watch(hang_seconds)
        self._next_look: float | None = None

    def look(self) -> bool:
        """Check, if it is time to; True once the attempt has been ended."""
        now = time.monotonic()
        if self._next_look is not None:
            if now < self._next_look:
                return False
            if now - self._next_look > LATE_SECONDS:  # ranks that were frozen together with it do not hang
                self._watch.count_anew(now)
        stamps = read_stamps(self._run.attempt(self._attempt))
        self._next_look = now + max(LOOK_SECONDS, REST * (time.monotonic() - now))
        self._watch.see(stamps, now)
        stopped = {rank for rank in self._ranks if rank in stamps and is_stopped(stamps[rank].pid)}
        if not self._watch.hangs(now, stopped) or read_ending(self._run, self._attempt) is not None:
            return False
        self._end(self._watch.seconds(now))
        return True

    def _end(self, seconds: dict[int, float]) -> None:
        folder = self._run.attempt(self._attempt)
        stamps = read_stamps(folder)
        mine = {rank: stamp for rank, stamp in stamps.items() if rank in self._ranks}
        findings = examine(self._run, self._attempt, mine, seconds)
        if 0 not in self._ranks:
            note = folder / f".hang-{self._ranks.start}"
            note.write_text(json.dumps([asdict(finding) for finding in findings]))
            note.rename(folder / f"hang-{self._ranks.start}.json")
            self._wait(lambda: read_ending(self._run, self._attempt) is not None)
        else:
            others = {rank: stamp for rank, stamp in stamps.items() if rank not in self._ranks}
            findings += self._of_others(others, seconds)
            text = table(findings)
            try:
                write_whole(folder / "hang.txt", f"{text}\n".encode())
            except OSError as error:  # the table is shown; a full disk must not keep the ranks from being ended
                self._say(f"the table is not kept: {reason(error)}")
            self._say(f"no progress:\n{text}")
            line = explain(findings)
            self._say(line)
            first = behind(findings)[0]
            write_ending(self._run, self._attempt, Ending(Outcome.HUNG, line, first.step, first.rank, retry=True))
        for stamp in mine.values():
            with suppress(ProcessLookupError):
                os.kill(stamp.pid, signal.SIGKILL)

    def _of_others(self, stamps: dict[int, Stamp], seconds: dict[int, float]) -> list[Finding]:
        """Findings of the watchdogs of other machines; for a rank without one, its stamp."""
        found: dict[int, Finding] = {}

        def all_found() -> bool:
            for note in self._run.attempt(self._attempt).glob("hang-*.json"):
                for values in json.loads(note.read_text()):
                    found[values["rank"]] = Finding(**{**values, "phase": Phase(values["phase"])})
            return stamps.keys() <= found.keys()

        self._wait(all_found)
        unseen = {
            rank: Finding(rank, stamp.host, stamp.step, stamp.phase, seconds.get(rank, 0.0), "no report of its machine")
            for rank, stamp in stamps.items()
        }
        return [finding for _, finding in sorted((unseen | found).items())]

    def _wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + OTHERS_SECONDS
        while not condition() and time.monotonic() < until:
            time.sleep(0.1)


def main(words: list[str]) -> int:
    """`PARENT RUN ATTEMPT FIRST COUNT HANG_SECONDS`: the watchdog of a machine under another launcher.

    Ends when its parent, local rank 0, has.
    """
    die_with(int(words[0]))
    run, attempt, first, count = RunDirectory(Path(words[1])), int(words[2]), int(words[3]), int(words[4])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a launcher sends them to all processes; the watchdog ends with the rank

    def say(text: str) -> None:
        print(f"stoker: {text}", file=sys.stderr, flush=True)

    watchdog = Watchdog(run, attempt, range(first, first + count), float(words[5]) if words[5] else None, say)
    while not watchdog.look():
        time.sleep(LOOK_SECONDS / 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
