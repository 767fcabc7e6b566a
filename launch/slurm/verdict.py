"""What a job does when its ranks have ended. A pure function: tests/launch/test_slurm_verdict.py is its table."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stoker.trainer.runtime.outcome import GOES_ON, Ending, Outcome


class Move(enum.Enum):
    END = "end"
    RESTART = "restart"  # the ranks, inside the allocation
    REQUEUE = "requeue"  # the job
    NEXT = "next"  # leave it to the next job of the chain


@dataclass(frozen=True)
class Situation:
    """The facts when the ranks have ended."""

    ending: Ending | None  # of their attempt; None: they could not write one
    asked: bool  # the scheduler has signalled that the allocation ends
    job_state: str | None  # from the controller; None: it does not answer
    stalled: int  # attempts of this job in a row without a new checkpoint
    limit: int  # how many of them may be followed by another
    may_requeue: bool
    links_left: int  # jobs of the chain that wait for this one
    superseded: bool = False  # another start of the run has begun meanwhile


@dataclass(frozen=True)
class Verdict:
    move: Move
    why: str
    status: int  # of this process


def judge(now: Situation) -> Verdict:
    """What follows, and why."""
    ending = now.ending
    if ending is not None and ending.outcome in (Outcome.COMPLETED, Outcome.STOPPED):
        return Verdict(Move.END, ending.message, 0)
    if now.superseded:
        return Verdict(Move.END, "another start of this run has begun meanwhile", 1)
    preempted = now.asked or (ending is not None and ending.outcome is Outcome.PREEMPTED)
    if ending is not None and not preempted and not ending.retry:
        return Verdict(Move.END, f"a new attempt would fail in the same way: {ending.message}", 1)
    if now.job_state is not None and now.job_state != "RUNNING":
        return Verdict(Move.END, f"the job is {now.job_state}: not coming back", 1)
    if now.stalled > now.limit:
        why = f"{now.stalled} attempts in a row have not reached a new checkpoint (launch.max_restarts={now.limit})"
        return Verdict(Move.END, why, 1)
    if not preempted:
        return Verdict(Move.RESTART, ending.message if ending is not None else "ranks left no exit record", 1)
    if now.links_left:
        return Verdict(Move.NEXT, f"{now.links_left} more of the chain", GOES_ON)
    if not now.may_requeue:
        return Verdict(Move.END, "launch.requeue=false", GOES_ON)
    if now.job_state is None:
        return Verdict(Move.END, "scontrol does not answer, so the job cannot be requeued from here", GOES_ON)
    return Verdict(Move.REQUEUE, ending.message if ending is not None else "requested before ranks had begun", GOES_ON)
