"""`stoker plan`: what a start would need, found by rehearsing it, before anything is spawned or paid for.

`make`      which ranks need the same, and what each class of them needs
`times`     from counts and a device's published rates to the time of a step and of a run
`search`    every layout of so many devices, and `guess`, which of them are worth a rehearsal
`show`      tables for a terminal, and JSON; `picture`, the memory over a step as a PNG

The config is settled as `stoker train` settles it, so that what one refuses the other refuses too, in the same words.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from stoker.conf.devices import Device, device_called, device_named
from stoker.conf.rundir import read_config
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.inspect import run_at
from stoker.launch.plan.show import as_json, print_measured, print_messages, print_plan, print_search, ranked_as_json
from stoker.launch.train import gpus as gpus_here
from stoker.launch.train import ranks_for, refusing, say
from stoker.launch.train import where as where_here
from stoker.parallel.start import Ranks
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.plan.make import Asked, Machine, make_plan, predicted_of
from stoker.trainer.report.messages import beside as messages_beside
from stoker.trainer.report.messages import read_counted
from stoker.trainer.report.metrics import steps
from stoker.trainer.report.predicted import Measured, beside, keep, newest_attempt
from stoker.trainer.settle import settle_config


def plan(
    overrides: Sequence[str],
    gpu: str | None,
    gpus: int | None,
    asked: Asked,
    form: str,
    searching: bool = False,
    png: str | None = None,
) -> int:
    """Print the plan in `form` (text or json), and draw it into the file `png`; status 1 for one that does not fit.

    When `searching`, layouts are ranked, with settings in `overrides` as they are; status 1 if none fits.

    `gpu` names a device of `stoker.conf.devices`, or a JSON file; by default it is this machine's. `gpus` is the number
    of ranks, by default those that a start would have. Raises ConfigError for a start that is refused.
    """
    device = None if gpu is None else device_named(gpu)
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one rank has to train")
    if searching and png is not None:
        raise ConfigError(f"--png {png} with --search: a picture is of one layout; leave one of them out")
    for option, value in vars(asked).items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{option} {value:g}: a number above 0 works")

    def where(config: Config) -> Ranks:
        return _where(config, device, gpus)

    config, _ = settle_config(overrides, where, tell=say)
    with refusing():
        complete = with_vocabulary(config)
        if searching:
            return _search(complete, where(config), _machine(config, device), overrides, form)
        made = make_plan(complete, where(config).world, _machine(config, device), asked)
    if form == "json":
        print(json.dumps(as_json(made), allow_nan=False))
    else:
        print_plan(made)
    if png is not None:
        from stoker.launch.plan.picture import draw  # matplotlib takes a second

        draw(made, Path(png))
        say(f"picture {png}")
    return 0 if made.fits is not False else 1


def _search(config: Config, ranks: Ranks, machine: Machine, overrides: Sequence[str], form: str) -> int:
    from stoker.launch.plan.search import search, settings

    given = [word.partition("=")[0].lstrip("+") for word in overrides]
    found = search(config, ranks, machine, given)
    words = [word for word in overrides if not word.startswith("run.dir=")]
    best = ["stoker", "train", *words, *settings(found.ranked[0].config, given)] if found.ranked else None
    if form == "json":
        plans = [{"settings": settings(plan.config, given), **ranked_as_json(plan)} for plan in found.ranked]
        counts = {"layouts": found.layouts, "likely": found.likely, "rehearsed": found.rehearsed}
        print(json.dumps(counts | {"best": best, "ranked": plans}, allow_nan=False))
    else:
        print_search(found, given, None if best is None else shlex.join(best))
    return 0 if found.ranked else 1


def plan_run(path: str, gpu: str | None, form: str) -> int:
    """Plan the newest attempt of a run as it is stored, keep that in the run, and print it beside what was measured.

    Raises ConfigError where `path` is no run directory, or holds no attempt that has begun.
    """
    device = None if gpu is None else device_named(gpu)
    run = run_at(path)
    attempt, beginning = newest_attempt(run)
    with refusing():
        config = with_vocabulary(read_config(run), run.tokenizer)
        made = make_plan(config, beginning.ranks, _machine(config, device), Asked())
    predicted = predicted_of(made)
    keep(run, attempt, predicted)
    measured = Measured(beginning.from_step)
    for step in steps(run.metrics):
        measured.add(step)
    rows = beside(predicted, measured)
    counted = read_counted(run, attempt)
    same = counted is not None and counted.rows == made.batch.rank_rows  # with batch.ramp steps differ
    messages = messages_beside(predicted.messages or [], counted) if counted is not None and same else None
    if form == "json":
        print(
            json.dumps({"attempt": attempt, "rows": rows, "messages": messages, "plan": as_json(made)}, allow_nan=False)
        )
    else:
        print_measured(attempt, made, rows)
        if counted is not None and messages is not None:
            print_messages(counted.step, messages)
    return 0


def _where(config: Config, device: Device | None, gpus: int | None) -> Ranks:
    """The ranks that are planned: those of the command line, else those that this start would have."""
    if gpus is None and device is None and config.launch.name == "local":
        return where_here(config)
    if config.launch.name == "local":
        world = gpus or ranks_for(config)
        here = world
    else:
        from stoker.launch.slurm.submit import where as where_there  # a job's ranks are not those of this machine

        world, _, each, _ = where_there(config)
        world = gpus or world
        here = min(world, each or world)
    planned = device is not None and device.kind == "cuda"
    on_gpus = config.launch.device != "cpu" and (planned or config.launch.gpus or gpus_here(config))
    return Ranks(world, here if on_gpus else 0, here)


def _machine(config: Config, device: Device | None) -> Machine:
    """What the ranks compute on."""
    if config.launch.device == "cpu":
        if device is not None and device.kind != "cpu":
            raise ConfigError(f"launch.device=cpu with --gpu {device.name}: leave one of them out")
        return Machine("cpu", device)
    if device is not None:
        return Machine(device.kind, device)
    if not gpus_here(config):
        return Machine("cuda" if config.launch.gpus else "cpu", None)
    import torch

    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    return Machine("cuda", device_called(name) or Device(memory_gib=memory, name=name))
