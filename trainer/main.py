"""The rank program: config -> mesh -> model -> engine -> data -> Trainer.fit(), and how it ends."""

from __future__ import annotations

import gc
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist

from stoker.checkpoint import Owner, fence, newest_step
from stoker.conf.durable import ROOM_SECONDS
from stoker.conf.identity import read_identity
from stoker.conf.printable import printable
from stoker.conf.reasons import reason
from stoker.conf.rundir import RunDirectory, make_run_directory, run_directory, write_config
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data import keep_tokenizer
from stoker.parallel.devices import backend_of, exactness_now, order_kernels, set_exactness
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import start_mesh, stop_mesh, use_threads
from stoker.trainer.assemble import assemble
from stoker.trainer.base_model import keep_base, keep_weights
from stoker.trainer.failure import Attempt, fail, in_one_line
from stoker.trainer.history import begin_anew
from stoker.trainer.loop import Trainer
from stoker.trainer.parallelize import compiles
from stoker.trainer.places import claim_places
from stoker.trainer.plan.record import PlanRecord, wants_plan
from stoker.trainer.probe.preflight import preflight
from stoker.trainer.rendezvous import CONFIG_VARIABLE, RENDEZVOUS_SECONDS, config_of_rank, store_of_rank
from stoker.trainer.report.summary import summarize
from stoker.trainer.runtime.compiled import compiled_folder, remove_unfinished_builds
from stoker.trainer.runtime.gpus import set_environment, take_device
from stoker.trainer.runtime.outcome import (
    Beginning,
    Ending,
    Outcome,
    Superseded,
    is_first_of_launch,
    write_beginning,
    write_ending,
)
from stoker.trainer.runtime.preflight import ask_for_attempt, meet, tell_attempt
from stoker.trainer.runtime.process import (
    Console,
    Phase,
    Phases,
    Place,
    give_freed_memory_back,
    keep_freed_memory,
    launch_id,
    place_from_environment,
)
from stoker.trainer.runtime.requests import Requests, deadline_of
from stoker.trainer.runtime.signal_listener import SignalListener
from stoker.trainer.runtime.stack_dump import StackDump
from stoker.trainer.runtime.starts import Start, begin_attempt
from stoker.trainer.runtime.timeouts import Timeouts
from stoker.trainer.trust import remember

log = logging.getLogger(__name__)

UPLOAD_LOOK_SECONDS = 30.0  # interval of the ranks' checks at the end while the last checkpoint is uploaded


def main(overrides: Sequence[str], work: Callable[[Trainer], Outcome] = Trainer.fit) -> int:
    """Run one rank, which calls `work` once the trainer is assembled; returns the exit status of the process."""
    requests, listener = Requests(), SignalListener()
    console = Console()
    place = place_from_environment()
    attempt: Attempt | None = None

    def leave(outcome: Outcome, why: str) -> None:
        """A request to end before the first step: there is nothing to save, and no need to wait for peers."""
        if attempt is not None:
            ending = Ending(outcome, f"{outcome} before the first step ({why})", signal=requests.signal)
            write_ending(attempt.run, attempt.number, ending)
        os._exit(0)

    requests.listen(leave, listener)
    try:
        config = config_of_rank(overrides, place)
        run = run_directory(config)
        store = store_of_rank(place)
        if place.rank == 0:
            make_run_directory(run, config.run.public)
        attempt = Attempt(run, _agree_on_attempt(store, run, place), place)
        store = dist.PrefixStore(f"stoker/{attempt.number}", store)
        warning = meet(store, run, attempt.number, place)  # first: the run directory, and so the log, may not be shared
        attempt.config = config
        attempt.device, attempt.gpu = take_device(config, place, store)
        attempt.met = True
        console.redirect(run.log(attempt.number, place.rank))
        if warning is not None:
            console.say(warning)
        StackDump(run.stacks(attempt.number, place.rank), run.flight(attempt.number, place.rank), listener)
        if CONFIG_VARIABLE not in os.environ:  # our launcher does both itself
            if place.local_rank == 0:
                _start_watchdog(config, attempt, console)
            if place.rank == 0 and wants_plan(config):
                _start_plan(attempt)
        ending = _train(config, store, attempt, requests, console, work)
        # A launcher restarts ranks that end with another status, and these have finished.
        return 0 if ending.outcome in (Outcome.COMPLETED, Outcome.STOPPED, Outcome.PREEMPTED) else 1
    except BaseException as error:
        status = fail(error, attempt, place, console)
        with suppress(OSError):  # a log on a full disk
            sys.stderr.flush()
        os._exit(status)  # peers may be gone: the exit must not wait for them


def _start_watchdog(config: Config, attempt: Attempt, console: Console) -> None:
    """Start the watchdog of this machine: our own launcher is one itself, others are not. It ends with this process."""
    place, patience = attempt.place, config.launch.hang_seconds
    words = [os.getpid(), str(attempt.run.path), attempt.number, place.rank, place.local_world, patience or ""]
    program = [sys.executable, "-P", "-m", "stoker.trainer.runtime.watchdog", *map(str, words)]
    subprocess.Popen(program, stdin=subprocess.DEVNULL, stderr=console.errors)


def _start_plan(attempt: Attempt) -> None:
    """Start the process that writes this attempt's plan. It ends with this one, and no failure of it is the run's."""
    try:
        PlanRecord(attempt.run, attempt.number, attempt.place.world)
    except OSError as error:
        log.warning("no plan of this attempt: %s", reason(error))


def run(overrides: Sequence[str]) -> Ending:
    """Train from Python, as `python -m stoker.trainer` does: in this process, which is the only rank unless the
    environment has other values (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Returns how the run ended. Errors are raised, signals are left to the caller, and nothing is redirected. However it
    ends, process group, environment, threads and files are as they were: it can be called again.
    """
    if dist.is_initialized():
        raise ConfigError("this process already has a process group, and a run makes its own: destroy that one first")
    with _left_as_found(), ExitStack() as on_failure:
        place = place_from_environment()
        config = config_of_rank(overrides, place)
        directory = run_directory(config)
        store = store_of_rank(place)
        if place.rank == 0:
            make_run_directory(directory, config.run.public)
        attempt = Attempt(directory, _agree_on_attempt(store, directory, place), place)
        try:
            store = dist.PrefixStore(f"stoker/{attempt.number}", store)
            meet(store, directory, attempt.number, place)
            attempt.device, attempt.gpu = take_device(config, place, store)
            ending = _train(config, store, attempt, Requests(), Console(), Trainer.fit, on_failure)
        except BaseException as error:
            ending = Ending(Outcome.FAILED, in_one_line(error), attempt.step, place.rank)
            with suppress(OSError):  # what broke the run is raised
                write_ending(directory, attempt.number, ending)
            raise
        on_failure.pop_all()  # all of it has ended
        return ending


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Restores, at the end of the block, what a run changes in its process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    exactness, collects = exactness_now(), gc.isenabled()
    try:
        yield
    finally:
        stop_mesh()
        if collects:
            gc.enable()
        torch.set_num_threads(threads)
        exactness.restore()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _agree_on_attempt(store: dist.Store, run: RunDirectory, place: Place) -> int:
    if place.rank > 0:
        return ask_for_attempt(store)
    number = begin_attempt(run, launch_id())
    tell_attempt(store, number, place.world, RENDEZVOUS_SECONDS)
    return number


def _train(
    config: Config,
    store: dist.Store,
    attempt: Attempt,
    requests: Requests,
    console: Console,
    work: Callable[[Trainer], Outcome],
    on_failure: ExitStack | None = None,
) -> Ending:
    """Resources that must be closed on failure are pushed on `on_failure`; a rank's process just ends."""
    on_failure = on_failure or ExitStack()
    run, place, rank, device = attempt.run, attempt.place, attempt.place.rank, attempt.device
    phase = Phases(run.attempt(attempt.number) / f"rank-{rank}.stamp")
    on_failure.callback(phase.close)
    owner: Owner | None = None
    start = Start(run, attempt.number)
    superseded = False
    if rank == 0:
        with start.exclusively() as newest:
            superseded = not newest
            if newest:
                owner = _take_over(config, attempt, requests, console)
    use_threads(config.launch.threads, place.local_world)
    set_exactness(config.deterministic)
    order_kernels(device)
    if config.parallel.offload == "nvme":
        give_freed_memory_back()
    elif device.type == "cpu":
        keep_freed_memory()
    layout = layout_of(config, place.world)
    backend = backend_of(config.launch.backend, device)
    if device.type == "cuda":
        set_environment(run.attempt(attempt.number))
    if compiles(config, device):
        remove_unfinished_builds(compiled_folder())
    timeouts = Timeouts(config.parallel.timeout_seconds, config.launch.hang_seconds)
    mesh = start_mesh(layout, device, store, rank, timeouts.at_start(), backend)
    if any(mesh.any([superseded])):  # all ranks end in the same way: a launcher must not start them again
        raise Superseded
    if config.launch.preflight:
        preflight(config, mesh, place, console.say)
    with console.echoing_warnings() if rank == 0 else nullcontext():
        trainer = assemble(config, mesh, place, start, requests, phase, console.screen, on_failure, owner, console.log)
    if place.local_rank == 0 and (identity := read_identity(run)) is not None:
        remember(identity.run, config)
    if rank == 0:
        with start.exclusively() as newest:
            if newest:  # else the first step ends this start
                write_config(run, config)  # after all ranks have read the old one
                keep_tokenizer(config.data, run.tokenizer)
                if trainer.progress.step == 0:
                    keep_base(config, run)
                if config.adapter.keep_base:
                    keep_weights(config, run)
    attempt.training = True
    requests.training()
    try:
        outcome = work(trainer)
    except BaseException:
        if trainer.observers is not None:
            with suppress(Exception):  # the failure matters more than how the end is shown
                trainer.observers.finish(Outcome.FAILED, trainer.progress.step)
        raise
    finally:
        attempt.step = trainer.progress.step
        trainer.rows.close()
    ending = _end(trainer, outcome, requests)
    if rank == 0:
        write_ending(run, attempt.number, ending)
    if trainer.booking is not None:
        trainer.booking.write()
    if trainer.observers is not None:
        trainer.observers.finish(ending.outcome, trainer.progress.step)
        if config.log.progress != "none":
            with suppress(OSError):  # the terminal may have been closed
                print(printable(summarize(run.path, config, ending.message)), file=console.screen)
    mesh.all_gather_text(
        "the end is reported"
    )  # ranks leave together: a launcher kills the others when one leaves with a failure
    stop_mesh()
    phase.close()
    return ending


def _take_over(config: Config, attempt: Attempt, requests: Requests, console: Console) -> Owner:
    """On rank 0 of the newest start: make the run, its places and its checkpoints this attempt's."""
    run, number, launch = attempt.run, attempt.number, launch_id()
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0  # by a scheduler: the same launch goes on
    first = not requeued and is_first_of_launch(run, number, launch)
    if config.run.fresh and first and (aside := begin_anew(run)) is not None:
        console.say(f"files of the earlier run were moved to {aside}")
    owner = claim_places(run, config)
    fence(run.checkpoints, number)
    requests.watch(run, number, first, deadline_of(config.launch.deadline), config.checkpoint.minutes)
    job = os.environ.get("SLURM_JOB_ID")
    step, host = newest_step(run.checkpoints), socket.gethostname()
    write_beginning(run, number, Beginning(time.time(), step, attempt.place.world, host, job, launch))
    return owner


def _end(trainer: Trainer, outcome: Outcome, requests: Requests) -> Ending:
    """Wait for the last save and agree on how the run ended."""
    step = trainer.progress.step
    trainer.phase(step, Phase.LAST_SAVE)
    errors = _await_last_save(trainer, step)
    while trainer.mesh.all_gather_text("busy" if trainer.checkpoints.uploading(UPLOAD_LOOK_SECONDS) else "")[0]:
        trainer.phase(step, Phase.UPLOAD)
    trainer.report_saves()
    trainer.checkpoints.close()
    errors = [error for error in trainer.mesh.all_gather_text(errors[0] if errors else "") if error]
    if errors:
        message = f"the last checkpoint could not be saved: {errors[0]}"
        return Ending(Outcome.FAILED, message, step, retry=True, save=trainer.saved)
    if trainer.config.checkpoint.on_error == "fail":
        reasons = [reason for reason in trainer.mesh.all_gather_text(trainer.failed_save or "") if reason]
        if reasons:
            message = f"{reasons[0]} (checkpoint.on_error=fail; saved at step {step})"
            return Ending(Outcome.FAILED, message, step, save=trainer.saved)
    why = next((reason for reason in trainer.mesh.all_gather_text(requests.why()) if reason), "requested")
    progress = trainer.progress
    if outcome == Outcome.COMPLETED and progress.step and not progress.updates:
        outcome = Outcome.FAILED
    finished = next((text for text in trainer.mesh.all_gather_text(trainer.finished_by or "") if text), "")
    messages = {
        Outcome.FAILED: _why_nothing_was_learned(trainer),
        Outcome.COMPLETED: f"completed at step {step}" + (f", ended by {finished}" if finished else ""),
        Outcome.STOPPED: f"stopped at step {step}, saved ({why})",
        Outcome.PREEMPTED: f"preempted at step {step}, saved ({why})",
        Outcome.NONFINITE: _why_bad(trainer),
    }
    return Ending(outcome, messages[outcome], step, signal=requests.signal, save=trainer.saved)


def _why_nothing_was_learned(trainer: Trainer) -> str:
    progress = trainer.progress
    if progress.empty_in_a_row:
        what = f"{progress.empty_in_a_row} steps in a row, up to step {progress.step}, without a label to train on"
        return f"{what} (prompts longer than seq_len={trainer.config.seq_len}, or no turn that is trained on?)"
    return f"no update was made in {progress.step} steps: each was skipped"


def _await_last_save(trainer: Trainer, step: int) -> list[str]:
    """This rank's reason why the state after `step` is not saved. On a full disk the save is retried for a while."""
    deadline, pause = time.monotonic() + ROOM_SECONDS, 1.0
    while True:
        failed = [report for report in trainer.checkpoints.wait() if report.error and report.step == step]
        full = bool(failed) and failed[-1].full and time.monotonic() < deadline
        if not any(trainer.mesh.any([full])):
            return [report.error for report in failed[-1:] if report.error]
        trainer.report_saves()
        time.sleep(pause)
        pause *= 2
        trainer.save()
        trainer.phase(step, Phase.LAST_SAVE)


def _why_bad(trainer: Trainer) -> str:
    progress, bad = trainer.progress, trainer.config.nonfinite
    what = "a finite loss and gradient norm" if bad.spike is None else "a loss and gradient norm within the ceilings"
    if bad.action == "skip":
        return f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, without {what}"
    taken = len(progress.passed_over)
    why = "nonfinite.action=stop"
    if bad.action == "rollback":
        why = f"{taken} rollbacks, nonfinite.limit={bad.limit}" if taken >= bad.limit else "no checkpoint to go back to"
    return f"a step up to step {progress.step} was without {what} ({why})"
