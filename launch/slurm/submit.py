"""`stoker submit`: a settled config becomes a script in the run directory, and the script a job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.conf.durable import write_whole
from stoker.conf.files import expand
from stoker.conf.identity import identify
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory, make_run_directory, run_directory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.slurm import commands
from stoker.launch.slurm.batch import LINK_VARIABLE, RANKS_DEFAULT
from stoker.launch.slurm.notes import SUBMITTED, write_note
from stoker.launch.train import say
from stoker.parallel.start import Ranks
from stoker.trainer.history import begin_anew
from stoker.trainer.settle import settle_config
from stoker.trainer.trust import SLURM, TRAINING, remember, remember_script

TEMPLATE = Path(__file__).with_name("train.sbatch")
_PLAIN = re.compile(r"[\w@%+=:,./-]+")
_BODY = "# --- what follows is the same for every job ---\n"


@dataclass(frozen=True)
class Start:
    """A settled start, as a script."""

    config: Config
    run: RunDirectory  # of an array: the folder of its runs
    tasks: str | None  # of an array
    text: str


def submit(overrides: Sequence[str], dry_run: bool) -> int:
    """Write the script and submit it, or print it. Raises ConfigError for a start that is refused."""
    if dry_run:
        print(settled(overrides).text, end="")
    else:
        submit_jobs(overrides)
    return 0


def submit_jobs(overrides: Sequence[str]) -> list[str]:
    """Write the script and submit it; the numbers of its jobs. Raises ConfigError for a start that is refused."""
    start = settled(overrides)
    config, run = start.config, start.run
    if config.run.fresh and start.tasks is None and (aside := begin_anew(run)) is not None:
        say(f"files of the earlier run were moved to {aside}")
    make_run_directory(run, config.run.public)
    run.slurm.mkdir(exist_ok=True)
    write_whole(run.script, start.text.encode())
    owner = identify(run).run
    remember(owner, config)
    remember_script(owner, start.text)
    jobs = submit_script(run, config.launch.chain)
    say(f"submitted {run.script} as job {', then '.join(jobs)}; its output will be in {run.slurm}")
    return jobs


def settled(overrides: Sequence[str]) -> Start:
    """The start that these settings make. `--config=.../{task}.yaml` is a file of settings for each task of an array.

    Raises ConfigError.
    """
    tasks = next((parse(word).value for word in overrides if word.startswith("launch.array=")), None)
    first = str(tasks).partition("-")[0].partition(",")[0] if tasks else "0"
    words = expand([word.replace("{task}", first) for word in overrides], say)
    config, changes = settle_config(words, where, tell=say, uses=(*TRAINING, SLURM))
    if config.launch.name != "slurm":
        raise ConfigError(f"launch={config.launch.name}: set launch=slurm or kubernetes, and launch.nodes, ...")
    for change in changes:
        say(f"changed since the last start: {change}")
    run = run_directory(config)
    once = () if tasks else ("run.fresh",)  # done here, before a job that may be requeued
    settings = [word for word in overrides if word.partition("=")[0] not in ("run.dir", *once)]
    directory = next((word.partition("=")[2] for word in overrides if word.startswith("run.dir=")), None)
    if directory is not None and "{task}" in directory:
        run = RunDirectory(Path(directory.partition("{task}")[0].rstrip("/") or ".").expanduser().absolute())
        settings.insert(0, f"run.dir={Path(directory).expanduser().absolute()}")
    else:
        settings.insert(0, f"run.dir={run.path}")
    return Start(config, run, str(tasks) if tasks else None, script(config, run, settings))


def submit_script(run: RunDirectory, chain: int) -> list[str]:
    """Submit a run's script, as so many jobs that wait for one another; their numbers."""
    jobs: list[str] = []
    for link in range(1, chain + 1):
        options = [f"--export=ALL,{LINK_VARIABLE}={link}/{chain}"] if chain > 1 else []
        options += [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(commands.submit(run.script, *options))
        write_note(run, jobs[-1], SUBMITTED, f"{link} of {chain}")
    return jobs


def script(config: Config, run: RunDirectory, settings: Sequence[str]) -> str:
    """The batch script of a run, for users and for sbatch."""
    launch = config.launch
    ranks = launch.nproc or launch.gpus or RANKS_DEFAULT
    name = " ".join(str(config.run.name).split())
    folder = str(run.slurm).replace("%", "%%")  # sbatch fills in what follows a single %
    log = f"{folder}/{'%A_%a.log' if launch.array else '%j.log'}"
    asked = {
        "job-name": config.run.name,
        "chdir": Path.cwd(),
        "output": log,
        "open-mode": "append",
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": launch.cpus or ranks * cores_of_rank(config),
        "gpus-per-node": launch.gpus,
        "time": launch.time,
        "partition": launch.partition,
        "array": launch.array,
        "signal": f"B:USR1@{launch.grace_seconds}",
    }
    lines = [option(f"--{name}={value}") for name, value in asked.items() if value is not None]
    lines.append("#SBATCH --requeue" if launch.requeue and launch.chain == 1 else "#SBATCH --no-requeue")
    lines += [option(text) for text in launch.sbatch_args]
    words = " \\\n    ".join(shlex.quote(setting) for setting in settings)
    body = TEMPLATE.read_text(encoding="utf-8").partition(_BODY)[2].replace("120 s", f"{launch.grace_seconds} s")
    return "\n".join(
        [
            "#!/bin/bash",
            f"# The run {name}: {launch.nodes} nodes with {ranks} ranks each. Written by `stoker submit`.",
            *lines,
            "",
            *([launch.setup] if launch.setup else []),
            f"export STOKER_PYTHON={shlex.quote(sys.executable)}",
            f"set -- {words}",
            "",
            body,
        ]
    )


def option(text: str) -> str:
    """A line of a script with an option of sbatch, its value in quotes where sbatch would cut or change it.

    Raises ConfigError for a line break, after which Slurm would read a line of another kind.
    """
    if len(text.splitlines()) > 1:
        raise ConfigError(f"{text!r}: an option of sbatch is one line")
    name, equals, value = text.partition("=")
    if not equals or _PLAIN.fullmatch(value):
        return f"#SBATCH {text}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')  # sbatch knows backslashes in any quotes
    return f'#SBATCH {name}="{escaped}"'


def cores_of_rank(config: Config) -> int:
    """What a rank keeps busy: its threads, its reader processes, the loader, and the writer of checkpoints."""
    return (config.launch.threads or 1) + config.data.workers + 2


def where(config: Config) -> Ranks:
    launch = config.launch
    here = launch.nproc or launch.gpus or RANKS_DEFAULT
    return Ranks(launch.nodes * here, 0 if launch.device == "cpu" else launch.gpus or 0, here)
