"""How a rank's failure is reported: one line for the user, once for all ranks, the traceback in the log, an outcome."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field

import torch

from stoker.checkpoint import DamagedCheckpoint
from stoker.conf.durable import is_full
from stoker.conf.reasons import reason, root_cause
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.trainer.out_of_memory import explain, is_out_of_memory
from stoker.trainer.runtime.outcome import Ending, Outcome, Superseded, write_ending
from stoker.trainer.runtime.process import Console, Place

log = logging.getLogger(__name__)

LOST_PEER = (
    # gloo and the store
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Failed to recv, got 0 bytes",
    # NCCL: sockets, InfiniBand, and what torch makes of an error that NCCL reports later
    "Connection closed by remote peer",
    "remote process exiting prematurely",  # ncclRemoteError
    "unexpected exit of a remote peer",  # ncclSystemError of versions without ncclRemoteError
    "NCCL communicator was aborted",
    "Got completion from peer",  # ibv: retries exceeded
)
FAULTY_GPU = (
    "CUDA error:",
    "ncclUnhandledCudaError",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "uncorrectable ECC error",
)


class NotMet(ConfigError):
    """This rank cannot reach the others, so it reports this itself."""


@dataclass
class Attempt:
    """What is known of this start when it fails."""

    run: RunDirectory
    number: int
    place: Place
    met: bool = False  # the machines can train together
    config: Config | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu: str | None = None  # the UUID of this rank's GPU, and its host
    training: bool = False  # the first step has begun
    step: int | None = None


def fail(error: BaseException, attempt: Attempt | None, place: Place, console: Console) -> int:
    """Print in one line what went wrong, once for all ranks; the traceback goes to the log."""
    line = str(error) if isinstance(error, ConfigError) else in_one_line(error)
    if attempt is None or not attempt.met:  # all ranks found the same
        if place.rank == 0 or isinstance(error, NotMet):
            console.say(line)
        if place.rank == 0 and attempt is not None:
            retry = isinstance(error, RuntimeError)  # of the network, or of a lost rank
            _write_failure(attempt, Ending(Outcome.FAILED, line, rank=0, retry=retry or is_full(error)), console)
        return 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, Superseded):
        if place.rank == 0:
            at = "before its first step" if attempt.step is None else f"at step {attempt.step}"
            console.say(f"another start of this run has begun: this one ends {at}")
        return 0  # a launcher that started these ranks again would take the run from the other
    log.error("rank %d failed", place.rank, exc_info=error)
    if is_loss_of_a_peer(error):
        return 1  # the lost rank or its launcher reports the cause
    # Other errors of a start would repeat in the next one, and a run never restarts at step 0 without a request.
    retry = attempt.training or isinstance(error, RuntimeError) or is_full(error)
    retry = retry and not isinstance(error, DamagedCheckpoint)
    if is_out_of_memory(error):
        line, retry = _out_of_memory(error, attempt, place), False  # the next attempt would need as much
    elif attempt.gpu is not None and is_error_of_a_gpu(error):
        line = f"{line}; this was {attempt.gpu}: if it fails again, leave it out (`nvidia-smi -q -d ECC`, Xid in dmesg)"
    ending = Ending(Outcome.FAILED, line, attempt.step, place.rank, retry)
    if _write_failure(attempt, ending, console):
        where = attempt.run.log(attempt.number, place.rank)
        console.say(f"rank {place.rank} failed: {line} (see {where})")
    return 1


def _write_failure(attempt: Attempt, ending: Ending, console: Console) -> bool:
    """Whether this became the attempt's outcome; also True where it cannot be written, as no other rank could then."""

    try:
        return write_ending(
            attempt.run, attempt.number, ending, waiting=lambda line: console.say(f"{ending.message}; {line}")
        )
    except OSError as error:
        console.say(f"how this attempt ended is not kept: {reason(error)}")
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


def _out_of_memory(error: BaseException, attempt: Attempt, place: Place) -> str:
    assert attempt.config is not None, "known before anything large is made"
    try:
        return explain(error, attempt.config, place.world, attempt.device)
    except Exception:  # of the explanation: the error itself matters more
        log.exception("the out-of-memory error could not be explained")
        return in_one_line(error)


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether this rank failed only because another one, or the way to it, is gone."""
    error = root_cause(error)
    text = str(error)
    if not isinstance(error, RuntimeError) or "Watchdog caught collective operation timeout" in text:
        return False  # such a timeout is reported by those that waited: no rank may be gone
    return any(sign in text for sign in LOST_PEER)


def is_error_of_a_gpu(error: BaseException) -> bool:
    """Whether CUDA reported it. After most of these errors it accepts no more work from the process."""
    error = root_cause(error)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in FAULTY_GPU)
