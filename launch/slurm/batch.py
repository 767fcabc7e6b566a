"""`python -P -m stoker.launch.slurm.batch KEY=VALUE ...`: a Slurm job's process on its first node."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from stoker.checkpoint import newest_step
from stoker.conf.files import expand
from stoker.conf.rundir import RunDirectory, make_run_directory, run_directory
from stoker.conf.schema import Config, to_dict
from stoker.conf.values import ConfigError
from stoker.launch.slurm import commands
from stoker.launch.slurm.notes import SUBMITTED, read_notes, write_note
from stoker.launch.slurm.verdict import Move, Situation, Verdict, judge
from stoker.launch.train import say
from stoker.parallel.start import Ranks
from stoker.trainer.rendezvous import CONFIG_VARIABLE
from stoker.trainer.runtime.outcome import Ending, Outcome, read_beginning, read_ending
from stoker.trainer.runtime.process import LAUNCH_VARIABLE, RESTARTS_VARIABLE
from stoker.trainer.runtime.requests import DEADLINE_VARIABLE
from stoker.trainer.runtime.shutdown_estimate import GRACE_VARIABLE
from stoker.trainer.runtime.starts import attempt_of, is_superseded
from stoker.trainer.settle import settle_config
from stoker.trainer.trust import TRAINING

MEETING_VARIABLE = "STOKER_MEETING"  # host:address:port of the gate at which the nodes meet
KEY_VARIABLE = "STOKER_MEETING_KEY"  # what the gate wants to be shown: 64 hexadecimal digits
LINK_VARIABLE = "STOKER_LINK"  # which job of how many of a chain this is: 2/5
RANKS_DEFAULT = 2  # on a node without GPUs
NODE = "stoker.launch.slurm.node"


@dataclass(frozen=True)
class Job:
    """Slurm's environment variables of a batch script."""

    number: str
    name: str
    nodes: int
    gpus: int  # of this node
    task: str | None  # of an array
    restarts: int
    partition: str | None
    end_time: float | None  # seconds since the epoch; Slurm 23.02 and later
    link: int
    links: int

    def where(self, config: Config) -> Ranks:
        """The ranks that the job starts."""
        here = config.launch.nproc or self.gpus or RANKS_DEFAULT
        return Ranks(self.nodes * here, 0 if config.launch.device == "cpu" else self.gpus, here)


def job_from(environment: Mapping[str, str]) -> Job:
    """Raises ValueError where there is no job."""
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            "this is not inside a Slurm job: `sbatch launch/slurm/train.sbatch ...` or `stoker submit ...`"
        )
    end, (link, _, links) = environment.get("SLURM_JOB_END_TIME"), environment.get(LINK_VARIABLE, "1/1").partition("/")
    return Job(
        number=environment["SLURM_JOB_ID"],
        name=environment.get("SLURM_JOB_NAME", "stoker"),
        nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
        gpus=int(environment.get("SLURM_GPUS_ON_NODE", "0")),
        task=environment.get("SLURM_ARRAY_TASK_ID"),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        partition=environment.get("SLURM_JOB_PARTITION"),
        end_time=float(end) if end else None,
        link=int(link),
        links=int(links),
    )


def settings_of(job: Job, settings: Sequence[str]) -> list[str]:
    """The settings of this job's run, with a run directory that every start finds; one for each array task."""
    chosen = [setting.replace("{task}", job.task or "0") for setting in settings]
    place = next((at for at, setting in enumerate(settings) if setting.startswith("run.dir=")), None)
    if place is None:
        if not any(setting.startswith("run.name=") for setting in settings):
            chosen.append(f"run.dir=runs/{job.name}-{job.number}")
    elif job.task is not None and "{task}" not in settings[place]:
        chosen[place] = f"{chosen[place]}/{job.task}"
    return chosen


def own_file(job: Job, setting: str) -> str:
    """`--config=.../{task}.yaml` with this job's task: a file of settings for each."""
    return setting.replace("{task}", job.task or "0") if setting.startswith("--config=") else setting


def stalled_attempts(run: RunDirectory, job: str) -> int:
    """How many of the newest attempts, in a row and of this job, have not reached a checkpoint newer than they had."""
    step = newest_step(run.checkpoints)
    count = 0
    for number in reversed(run.attempt_numbers()):
        beginning = read_beginning(run, number)
        if beginning is not None and (beginning.job != job or beginning.from_step < step):
            break
        count += 1
    return count


class Batch:
    """One start of a job: rounds of ranks until there is a verdict that is no restart."""

    def __init__(self, job: Job, config: Config) -> None:
        self.job, self.config = job, config
        self.run = run_directory(config)
        self._launch = f"slurm-{job.number}"  # also when it comes back from the queue
        self._asked: int | None = None
        self._ranks: subprocess.Popen[bytes] | None = None
        self._before_attempts = 0  # rounds in a row in which ranks did not even make an attempt

    def main(self) -> int:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        finished = self._finished_before()
        if finished is not None:
            say(f"nothing to do for link {self.job.link} of {self.job.links}: {finished}")
            return 0
        environment = {**os.environ, **self._facts(), CONFIG_VARIABLE: json.dumps(to_dict(self.config))}
        environment[LAUNCH_VARIABLE] = self._launch
        for round_ in range(1_000_000):
            environment[RESTARTS_VARIABLE] = str(round_)
            known = self.run.attempt_numbers()
            self._start_ranks(environment)
            verdict = self._judge(known)
            write_note(self.run, self.job.number, verdict.move.value, verdict.why)
            if verdict.move is not Move.RESTART:
                break
            say(f"restarting: {verdict.why}")
        if verdict.move is Move.REQUEUE:
            say(f"back to the queue: {verdict.why}")
            commands.requeue(self.job.number)
        else:
            say(f"the job ends: {verdict.why}")
        return verdict.status

    def _start_ranks(self, environment: dict[str, str]) -> None:
        from stoker.launch.gate import Gate, address_of, new_key
        from stoker.parallel.loopback import LOOPBACK, loopback_store

        # A new store for every round: keys of earlier ranks cannot mislead these.
        store, key, host = loopback_store(), new_key(), socket.gethostname()
        address = address_of(host) if self.job.nodes > 1 else LOOPBACK
        gate = Gate(address, store.port, bytes.fromhex(key))
        environment[MEETING_VARIABLE] = f"{host}:{address}:{gate.port}"
        environment[KEY_VARIABLE] = key
        if self._asked is None:  # else the allocation ends before ranks could start
            self._ranks = subprocess.Popen(self._srun(), env=environment)
            if self._asked is not None:
                self._ranks.send_signal(signal.SIGUSR1)
            self._ranks.wait()
        gate.close()
        del store

    def _srun(self) -> list[str]:
        nodes = str(self.job.nodes)
        words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--input=none"]
        words += ["--kill-on-bad-exit=1", "--export=ALL"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            words.append(f"--cpus-per-task={cpus}")  # since 22.05 srun does not take the job's
        return [*words, *self.config.launch.srun_args, *in_container(self.config, self.run), "-P", "-m", NODE]

    def _pass_on(self, number: int, _frame: object) -> None:
        """The allocation ends soon. Slurm may have signalled the ranks too; a second signal has no effect."""
        self._asked = number
        if self._ranks is not None and self._ranks.poll() is None:
            self._ranks.send_signal(signal.SIGUSR1)

    def _facts(self) -> dict[str, str]:
        """The time limits for the ranks' environment."""
        end, grace = self.job.end_time, float(self.config.launch.grace_seconds)
        with suppress(ValueError):  # no scontrol here, as in a container
            end = end or commands.time_of(commands.facts_of_job(self.job.number).get("EndTime", ""))
            partition = commands.facts_of_partition(self.job.partition or "")
            given = commands.seconds_of(partition.get("GraceTime", ""))
            if given and partition.get("PreemptMode", "OFF") != "OFF":
                grace = min(grace, given)
        facts = {GRACE_VARIABLE: str(grace)}
        return facts if end is None else {**facts, DEADLINE_VARIABLE: str(end)}

    def _judge(self, known: list[int]) -> Verdict:
        made = attempt_of(self.run, self._launch, len(known))
        self._before_attempts = 0 if made is not None else self._before_attempts + 1
        state: str | None = None
        with suppress(ValueError):
            state = commands.facts_of_job(self.job.number).get("JobState")
        return judge(
            Situation(
                ending=read_ending(self.run, made) if made is not None else None,
                superseded=is_superseded(self.run, self._launch, len(known)),
                asked=self._asked is not None,
                job_state=state,
                stalled=self._before_attempts or stalled_attempts(self.run, self.job.number),
                limit=self.config.launch.max_restarts,
                may_requeue=self.config.launch.requeue,
                links_left=self.job.links - self.job.link,
            )
        )

    def _finished_before(self) -> str | None:
        """Why a later job of a chain has nothing to do, if it has not."""
        numbers = self.run.attempt_numbers()
        if self.job.link == 1 or not numbers:
            return None
        with suppress(ValueError):  # forgotten by the controller, or no scontrol here
            moves = [note for note in read_notes(self.run) if note["move"] != SUBMITTED]
            if any(commands.facts_of_job(note["job"])["JobState"] == "CANCELLED" for note in moves[-1:]):
                return "the job before was cancelled"
        ending: Ending | None = read_ending(self.run, numbers[-1])
        if ending is None or ending.outcome is Outcome.PREEMPTED or ending.retry:
            return None
        return ending.message


def in_container(config: Config, run: RunDirectory) -> list[str]:
    """Options of srun, or a command, and the interpreter: of this machine, or of `launch.image`.

    The working directory and the folder of the run directory are in a container where they are outside it.
    """
    launch, places = config.launch, dict.fromkeys([os.getcwd(), str(run.path.parent)])
    if launch.image is None:
        return [sys.executable]
    if launch.container == "pyxis":
        mounts = ",".join(f"{place}:{place}" for place in places)
        return [f"--container-image={launch.image}", f"--container-mounts={mounts}",
                f"--container-workdir={os.getcwd()}", "python3"]  # fmt: skip
    binds = [word for place in places for word in ("--bind", place)]
    gpu = ["--nv"] if launch.gpus else []
    return ["apptainer", "exec", *gpu, *binds, "--pwd", os.getcwd(), launch.image, "python3"]


def main(settings: Sequence[str]) -> int:
    try:
        job = job_from(os.environ)

        again = job.restarts > 0 or job.link > 1
        config, changes = settle_config(
            settings_of(job, expand([own_file(job, setting) for setting in settings], say)),
            job.where,
            refitted=say,
            tell=say,
            restarted=again,
            uses=(*TRAINING, "launch.srun_args", "launch.image"),
        )
        config.launch.name = "slurm"
        config.launch.nproc = config.launch.nproc or job.gpus or RANKS_DEFAULT
        run = run_directory(config)
        make_run_directory(run, config.run.public)
        run.slurm.mkdir(exist_ok=True)
        say(f"job {job.number}, start {job.restarts + 1}, {job.nodes} nodes, run directory {run.path}")
        for change in changes:
            say(f"changed since the last start: {change}")
        return Batch(job, config).main()
    except ConfigError as error:
        say(str(error))
        return 2
    except (ValueError, OSError) as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
