"""How a rank's failure is reported: one line for the user, once for all ranks, the traceback in the log, an outcome."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

from stoker.checkpoint import DamagedCheckpoint
from stoker.conf.durable import is_full
from stoker.conf.reasons import reason, root_cause
from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.trainer.runtime.outcome import Ending, Outcome, Superseded, write_ending
from stoker.trainer.runtime.process import Console, Place

log = logging.getLogger(__name__)


class NotMet(ConfigError):
    """This rank cannot reach the others, so it reports this itself."""


@dataclass
class Attempt:
    """What is known of this start when it fails."""

    run: RunDirectory
    number: int
    place: Place
    met: bool = False  # the machines can train together
    training: bool = False  # the first step has begun
    step: int | None = None


def fail(error: BaseException, attempt: Attempt | None, place: Place, console: Console) -> int:
    """Print in one line what went wrong, once for all ranks; the traceback goes to the log."""
    line = str(error) if isinstance(error, ConfigError) else in_one_line(error)
    if attempt is None or not attempt.met:  # all ranks found the same
        if place.rank == 0 or isinstance(error, NotMet):
            console.errors.write(f"stoker: {line}\n")
        if place.rank == 0 and attempt is not None:
            retry = isinstance(error, RuntimeError)  # of the network, or of a lost rank
            _write_failure(attempt, Ending(Outcome.FAILED, line, rank=0, retry=retry or is_full(error)), console)
        return 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, Superseded):
        if place.rank == 0:
            console.errors.write(f"stoker: another start of this run has begun: this one ends at step {attempt.step}\n")
        return 0  # a launcher that started these ranks again would take the run from the other
    log.error("rank %d failed", place.rank, exc_info=error)
    if _is_loss_of_a_peer(error):
        return 1  # the lost rank or its launcher reports the cause
    # Other errors of a start would repeat in the next one, and a run never restarts at step 0 without a request.
    retry = attempt.training or isinstance(error, RuntimeError) or is_full(error)
    retry = retry and not isinstance(error, DamagedCheckpoint)
    ending = Ending(Outcome.FAILED, line, attempt.step, place.rank, retry)
    if _write_failure(attempt, ending, console):
        where = attempt.run.log(attempt.number, place.rank)
        console.errors.write(f"stoker: rank {place.rank} failed: {line} (see {where})\n")
    return 1


def _write_failure(attempt: Attempt, ending: Ending, console: Console) -> bool:
    """Whether this became the attempt's outcome; also True where it cannot be written, as no other rank could then."""

    def tell(line: str) -> None:
        console.errors.write(f"stoker: {ending.message}; {line}\n")

    try:
        return write_ending(attempt.run, attempt.number, ending, waiting=tell)
    except OSError as error:
        console.errors.write(f"stoker: how this attempt ended is not kept: {reason(error)}\n")
        return True


def in_one_line(error: BaseException) -> str:
    """The root cause, with its place when it is a defect of a program rather than something its user can fix.

    An error that was written for the user stays one whatever error of a library caused it.
    """
    text, root = reason(error), root_cause(error)
    if any(isinstance(one, ValueError | OSError | DamagedCheckpoint) for one in (error, root)):
        return text
    place = ""
    if root.__traceback__ is not None:
        last = traceback.extract_tb(root.__traceback__)[-1]
        place = f" ({last.filename}:{last.lineno})"
    return f"{type(root).__name__}: {text}{place}"


def _is_loss_of_a_peer(error: BaseException) -> bool:
    error = root_cause(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
