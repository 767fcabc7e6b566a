"""Ranks on this machine, through torch's elastic agent.

What differs from torchrun: when a rank ends, the others are killed at once instead of after 30 s (without a peer they
cannot save), a failure that would repeat is not retried, a killed rank is named, and the user's output is one line.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from stoker.checkpoint import newest_step
from stoker.conf.durable import with_room, write_whole
from stoker.conf.rundir import RunDirectory, run_directory
from stoker.conf.schema import Config, to_dict
from stoker.conf.scratch import Scratch
from stoker.launch.gate import Tunnel
from stoker.parallel.layout import threads_per_rank
from stoker.parallel.loopback import LOOPBACK, keep_on_loopback, loopback_store
from stoker.trainer.plan.record import PlanRecord, wants_plan
from stoker.trainer.rendezvous import CONFIG_VARIABLE
from stoker.trainer.runtime.outcome import GOES_ON, Ending, Outcome, read_ending, write_ending
from stoker.trainer.runtime.process import LAUNCH_VARIABLE, LAUNCHER_VARIABLE, launch_id
from stoker.trainer.runtime.starts import attempt_of, is_superseded
from stoker.trainer.runtime.watchdog import Watchdog

MONITOR_SECONDS = 0.05
GRACE_SECONDS = 600.0  # for a final save after a signal
PEERS_SECONDS = 2.0  # for another machine to report how its ranks ended
LAUNCHER_ROOM_SECONDS = 1800.0  # for room on a full disk before ranks are started again
_PROBE_BYTES = 64 << 10  # that must find room before ranks are started again
_WELL = (Outcome.COMPLETED, Outcome.STOPPED)
EXIT_BARRIER_SECONDS = 10.0  # for other machines to end too; one that was told to by a signal does not report it
EXIT_SECONDS = 5.0  # for processes to end after the outcome is written


@dataclass(frozen=True)
class Meeting:
    """The gate to the store at which the launchers of several machines meet; another process keeps it."""

    host: str
    port: int
    node: int  # of this machine, from 0
    nodes: int
    key: bytes = field(repr=False)  # that the gate wants to be shown


def launch(
    config: Config, ranks: int, say: Callable[[str], None], *arguments: str, meeting: Meeting | None = None
) -> int:
    """Run `ranks` ranks of a settled config until they end; the exit status for the shell. They get `arguments`.

    A failed attempt is followed by another, until `launch.max_restarts` in a row have not reached a new checkpoint; at
    a `meeting` with other machines restarts are left to the owner of its store. SIGTERM, SIGUSR1 and SIGINT are passed
    on and the ranks save before they end; a second SIGINT kills. SIGHUP acts like SIGTERM; where it is ignored, as
    under nohup, it stays ignored, here and in the ranks.
    """
    run = run_directory(config)
    threads = threads_per_rank(config.launch.threads, ranks)
    given = {
        CONFIG_VARIABLE: json.dumps(to_dict(config)),
        LAUNCHER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(handled_signals()),
    }
    if meeting is None:
        given[LAUNCH_VARIABLE] = secrets.token_hex(8)
    if meeting is None or meeting.nodes == 1:
        keep_on_loopback(given)
    with _environment(given), _quiet_agent(), Scratch("stoker-launch-") as folder:
        spec = WorkerSpec(
            role="rank",
            local_world_size=ranks,
            rdzv_handler=_LocalRendezvous() if meeting is None else _MeetingRendezvous(meeting),
            entrypoint=sys.executable,
            args=("-P", "-m", "stoker.trainer", *arguments),
            max_restarts=config.launch.max_restarts if meeting is None else 0,
            monitor_interval=MONITOR_SECONDS,
            master_addr=LOOPBACK,
        )
        agent = _Agent(
            spec, DefaultLogsSpecs(log_dir=str(folder)), run, config.launch.hang_seconds, say, alone=meeting is None
        )
        if wants_plan(config) and (meeting is None or meeting.node == 0):
            agent.planned_ranks = ranks * (1 if meeting is None else meeting.nodes)
        try:
            agent.run()
        except SignalException as interrupt:
            ended, number = agent.ending(), int(interrupt.sigval)
            by_person = number == signal.SIGINT and ended is not None and ended.outcome in _WELL
            return 0 if by_person else 128 + number
        except KeyboardInterrupt:
            say("killed")
            return 128 + signal.SIGINT
        finally:
            agent.kill()
    ending = agent.ending()
    if ending is not None and ending.outcome is Outcome.PREEMPTED:
        return GOES_ON
    return 0 if ending is not None and ending.outcome in _WELL else 1


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """The environment of ranks, for as long as they run."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Nothing of torch's elastic agent below a critical error: the lines for the user are printed here."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in before:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def handled_signals() -> list[str]:
    """The signals that end the run in order."""
    handled = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handled.append(signal.SIGHUP)
    return [number.name for number in handled]


class _LocalRendezvous(StaticTCPRendezvous):
    """One machine, one agent: for every attempt a new store, on a port that the system picks."""

    def __init__(self) -> None:
        super().__init__(LOOPBACK, 0, rank=0, world_size=1, run_id="stoker", timeout=60)

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = store = loopback_store()
        self.master_port = store.port
        return super().next_rendezvous()


class _MeetingRendezvous(StaticTCPRendezvous):
    """Several machines, one attempt: the store is reached through a tunnel, by this process and by its ranks."""

    def __init__(self, meeting: Meeting) -> None:
        self._tunnel = Tunnel(meeting.host, meeting.port, meeting.key)
        super().__init__(LOOPBACK, self._tunnel.port, meeting.node, meeting.nodes, run_id="stoker", timeout=60)

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = TCPStore(LOOPBACK, self._tunnel.port, is_master=False)
        return super().next_rendezvous()


class _Agent(LocalElasticAgent):
    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        run: RunDirectory,
        hang_seconds: float | None,
        say: Callable[[str], None],
        alone: bool,
    ) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=EXIT_BARRIER_SECONDS)
        self._run, self._hang_seconds, self._say, self._alone = run, hang_seconds, say, alone
        self._watchdog: Watchdog | None = None  # of the present ranks, once there is an attempt
        self.planned_ranks: int | None = None  # of all machines, where each attempt gets a plan
        self._plan: PlanRecord | None = None
        self._launch = launch_id()
        self._attempts_before = 0
        self._step_before = 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # No rank of this attempt runs before the machines meet, so that all of them count the same attempts.
        self._attempts_before = len(self._run.attempt_numbers())
        self._step_before = newest_step(self._run.checkpoints)
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._watchdog = None
        pids = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close = self._pcontext.close

        def close_at_once(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            close(death_sig or signal.SIGKILL, timeout)

        self._pcontext.close = close_at_once  # type: ignore[method-assign]
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Pass a signal on and wait: as long as it takes to save, and a little for processes to end after that."""
        if self._pcontext is None:
            return
        if death_sig != signal.SIGKILL and any(_is_alive(pid) for pid in self._pcontext.pids().values()):
            for ignored in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(ignored, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for pid in self._pcontext.pids().values():
                if _is_alive(pid):
                    os.kill(pid, signal.SIGINT if death_sig == signal.SIGINT else signal.SIGTERM)
            self._wait_for_save()
            number = self._attempt()
            if number is not None:  # an outcome that a rank has written is kept
                outcome = Outcome.STOPPED if death_sig == signal.SIGINT else Outcome.PREEMPTED
                ending = Ending(outcome, f"{outcome} before the first step", signal=int(death_sig))
                write_ending(self._run, number, ending)
        self._pcontext.close(signal.SIGKILL)

    def _wait_for_save(self) -> None:
        assert self._pcontext is not None
        deadline = time.monotonic() + GRACE_SECONDS
        told = False
        while time.monotonic() < deadline and self._pcontext.wait(0) is None:
            if not told and self.ending() is not None:
                told, deadline = True, time.monotonic() + EXIT_SECONDS
            time.sleep(MONITOR_SECONDS)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._look_after_ranks()
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self._book_failure(result)
        return result

    def _look_after_ranks(self) -> None:
        """End ranks that make no progress. The monitor then sees them end like any other."""
        if self._watchdog is None and (number := self._attempt()) is not None:
            workers = self._worker_group.workers
            ranks = range(workers[0].global_rank, workers[-1].global_rank + 1)
            self._watchdog = Watchdog(self._run, number, ranks, self._hang_seconds, self._say)
            self._end_plan()
            if self.planned_ranks is not None:
                self._plan = PlanRecord(self._run, number, self.planned_ranks)
        if self._watchdog is not None:
            self._watchdog.look()

    def _book_failure(self, result: RunResult) -> None:
        """Write the outcome of ranks that could not, and print what follows."""
        if is_superseded(self._run, self._launch, self._attempts_before):
            self._remaining_restarts = 0
            self._say("not restarting: another start of this run has begun")
            return
        ending = self.ending()
        if not self._alone and ending is None and all(f.exitcode > 0 for f in result.failures.values()):
            deadline = time.monotonic() + PEERS_SECONDS  # these have lost a peer, whose machine reports how
            while ending is None and time.monotonic() < deadline:
                time.sleep(MONITOR_SECONDS)
                ending = self.ending()
        if ending is None:
            killed = {rank: -f.exitcode for rank, f in result.failures.items() if f.exitcode < 0}
            rank = min(result.failures, key=lambda rank: (rank not in killed, result.failures[rank].timestamp))
            status = result.failures[rank].exitcode
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            ending = Ending(Outcome.FAILED, f"rank {rank} {how}", rank=rank, retry=True)
            self._say(ending.message)
            number = self._attempt()
            if number is not None:
                write_ending(self._run, number, ending, LAUNCHER_ROOM_SECONDS, self._say)
        if not self._alone:
            return
        if ending.retry and self._remaining_restarts > 0:
            with_room(self._try_to_write, LAUNCHER_ROOM_SECONDS, self._say)
        if newest_step(self._run.checkpoints) != self._step_before:
            self._remaining_restarts = self._worker_group.spec.max_restarts  # it has progressed: the budget is renewed
        if not ending.retry:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            spec = self._worker_group.spec
            self._say(f"restarting ({spec.max_restarts - self._remaining_restarts + 1} of {spec.max_restarts})")
        else:
            self._say(f"giving up after {self._worker_group.spec.max_restarts} restarts")

    def _try_to_write(self) -> None:
        """Raises OSError where a new attempt could not write either."""
        probe = self._run.attempts / f".room-{os.getpid()}"
        try:
            write_whole(probe, b" " * _PROBE_BYTES)
        finally:
            probe.unlink(missing_ok=True)

    def _attempt(self) -> int | None:
        """The attempt of the present ranks, once one of them has made it."""
        return attempt_of(self._run, self._launch, self._attempts_before)

    def ending(self) -> Ending | None:
        """How the present ranks ended; None without a record."""
        number = self._attempt()
        return read_ending(self._run, number) if number is not None else None

    def _end_plan(self) -> None:
        if self._plan is not None:
            self._plan.end()

    def kill(self) -> None:
        """Make sure that no rank is left, on every path."""
        self._end_plan()
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
