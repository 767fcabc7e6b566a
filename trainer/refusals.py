"""Schedules, evaluations, checkpoints, traces and launches that would have no effect, with what works."""

from __future__ import annotations

import importlib.util

from stoker.conf.faults import read_faults
from stoker.conf.schema import to_dict
from stoker.conf.secrets import PREFIX, secrets_in
from stoker.parallel.start import Refusals, Start
from stoker.trainer.schedule import evaluation_every

REFUSALS = Refusals()


@REFUSALS.entry(
    "credentials",
    "passwords, tokens and keys in addresses, commands and other values",
    "a run keeps and shows its config",
)
def _credentials(start: Start) -> str | None:
    found = [f"{key}={shown}" for key, shown in secrets_in(to_dict(start.config))]
    if not found:
        return None
    return (
        f"{'; '.join(found)}: a credential would stand in config.yaml, checkpoints and logs. Put it where its library "
        f"looks (~/.netrc, AWS_ACCESS_KEY_ID, ...), name a variable in an http(s) address (${PREFIX}NAME), or let the "
        "shell of pipe: and launch.setup read one ($NAME)"
    )


@REFUSALS.entry("warmup", "a warmup, with wsd also the decay, longer than the schedule", "the peak is never reached")
def _warmup(start: Start) -> str | None:
    schedule = start.config.schedule
    total = start.config.steps if schedule.total_steps is None else schedule.total_steps
    decay = round(schedule.decay_fraction * total) if schedule.name == "wsd" else 0
    if schedule.warmup_steps + decay <= max(total, 1):
        return None
    also = f" and a decay of {decay} steps" if decay else ""
    return (
        f"schedule.warmup_steps={schedule.warmup_steps}{also} do not fit into {total} steps: "
        f"schedule.warmup_steps={max(total - decay, 0)} does"
    )


@REFUSALS.entry(
    "moments to begin with",
    "optim.init_from without model.init_from, with model.init_only or an adapter, or with another rule than adamw",
    "moments are AdamW's, of all weights of one model",
)
def _moments(start: Start) -> str | None:
    config = start.config
    if config.optim.init_from is None:
        return None
    where = f"optim.init_from={config.optim.init_from}"
    others = [
        *(["optim.target=null"] if config.optim.target is not None else []),
        *(["optim.name=adamw"] if config.optim.name != "adamw" else []),
        *(["optim.groups=[]"] if any(group.get("name", "adamw") != "adamw" for group in config.optim.groups) else []),
    ]
    if others:
        works = " with ".join(others)
        return f"{where} holds AdamW's moments: {works} goes on with them; optim.init_from=null begins anew"
    if config.model.init_from is None:
        return f"{where} without the weights of these moments: model.init_from={config.optim.init_from} has them"
    if config.model.init_only or config.adapter.name != "none":
        other = "model.init_only" if config.model.init_only else f"adapter={config.adapter.name}"
        return f"{where} with {other}: its moments are of all weights of a model; optim.init_from=null begins anew"
    return None


@REFUSALS.entry(
    "settings of other schedules",
    "schedule.decays or decay_shape without wsd, decays outside its stable part, schedule.cycle_steps with other "
    "schedules than cosine and linear, cycle_growth without cycle_steps",
    "no effect",
)
def _of_other_schedules(start: Start) -> str | None:
    schedule = start.config.schedule
    total = start.config.steps if schedule.total_steps is None else schedule.total_steps
    if schedule.name != "wsd" and (schedule.decays or schedule.decay_shape != "linear"):
        key = "decays" if schedule.decays else "decay_shape"
        return f"schedule.{key} with schedule={schedule.name}: schedule=wsd has decays"
    if schedule.name not in ("cosine", "linear") and schedule.cycle_steps is not None:
        return f"schedule.cycle_steps with schedule={schedule.name}: schedule=cosine has cycles, and schedule=linear"
    if schedule.cycle_steps is None and schedule.cycle_growth != 1.0:
        return (
            f"schedule.cycle_growth={schedule.cycle_growth} without schedule.cycle_steps: "
            f"schedule.cycle_growth=1 works, or schedule.cycle_steps={max(1, total // 2)}, the first cycle's"
        )
    last = round(total * (1 - schedule.decay_fraction))
    if schedule.decays and not schedule.warmup_steps < schedule.decays[0][0] <= schedule.decays[-1][1] <= last:
        return (
            f"schedule.decays: {schedule.decays} are not after the warmup and by step {last}, where the final decay "
            "begins: schedule.decays=[] works"
        )
    return None


@REFUSALS.entry(
    "evaluation", "eval.every with eval.sequences=0, or eval.sequences with data.validation=0", "it evaluates nothing"
)
def _evaluation(start: Start) -> str | None:
    every, rows = start.config.eval.every or 0, start.config.eval.sequences
    if every > 0 and rows == 0:
        size = start.config.batch.size
        return f"eval.every={every} with eval.sequences=0 evaluates nothing: set eval.sequences={size}"
    data = start.config.data
    if rows and data.validation == 0 and data.validation_path is None and not data.sources:
        return (
            f"eval.sequences={rows} with data.validation=0: no document is kept for validation; data.validation=0.02 "
            "keeps some, data.validation_path=PATH names others"
        )
    return None


@REFUSALS.entry(
    "tasks",
    "eval.tasks without lm-eval, or with parallel.cp above 1; eval.tasks_every, include, fewshot or limit without them",
    "there is nothing to run them with, ranks would share a text, or there is nothing to run",
)
def _tasks(start: Start) -> str | None:
    wanted, cp = start.config.eval, start.config.parallel.cp
    if not wanted.tasks:
        for key in ("tasks_every", "include", "fewshot", "limit"):
            if (value := getattr(wanted, key)) is not None:
                return f"eval.{key}={value} without eval.tasks: eval.tasks=[NAME] runs some, eval.{key}=null none"
        return None
    if cp > 1:
        return f"eval.tasks={wanted.tasks} with parallel.cp={cp}: ranks would share a text; parallel.cp=1 works"
    if importlib.util.find_spec("lm_eval") is None:
        return f"eval.tasks={wanted.tasks} needs lm-eval, which is not installed: pip install 'stoker[eval]'"
    return None


@REFUSALS.entry(
    "best checkpoints",
    "checkpoint.keep_best when not every checkpoint has a validation loss of the same step",
    "there is nothing to compare",
)
def _best_checkpoints(start: Start) -> str | None:
    wanted, every = start.config.checkpoint, evaluation_every(start.config)
    if wanted.keep_best < 1 or wanted.every < 1:
        return None
    if every > 0 and wanted.every % every == 0:
        return None
    asked = f"eval.every={every}" if start.config.eval.every is not None else f"an evaluation every {every} steps"
    return (
        f"checkpoint.keep_best={wanted.keep_best} with checkpoint.every={wanted.every} and {asked}: "
        f"eval.every={wanted.every} measures every checkpoint (with eval.sequences above 0)"
    )


@REFUSALS.entry("traced steps", "profile.steps that begin after the last step", "nothing would be traced")
def _traced_steps(start: Start) -> str | None:
    traced, steps = start.config.profile.steps, start.config.steps
    if not traced or len(traced) != 2 or steps < 1 or traced[0] <= steps or traced[1] < traced[0]:
        return None
    first = max(1, steps - (traced[1] - traced[0]))
    return f"profile.steps={traced} with steps={steps}: no such step is taken; profile.steps=[{first},{steps}] works"


@REFUSALS.entry(
    "faults", "entries of faults that are none, or that no step and rank of the run meets", "nothing would break"
)
def _faults(start: Start) -> str | None:
    try:
        faults = read_faults(start.config.faults)
    except ValueError as error:
        return f"faults: {error}"
    for fault in faults:
        if fault.rank >= start.world:
            return f"faults: {fault.name} is for rank {fault.rank} of {start.world}: rank 0 to {start.world - 1} work"
        if fault.at > start.config.steps:
            return f"faults: {fault.name} is for step {fault.at} of {start.config.steps}: steps={fault.at} has it"
    return None


@REFUSALS.entry(
    "several machines", "launch.nodes above 1 with launch=local", "`stoker train` starts ranks on one machine"
)
def _several_machines(start: Start) -> str | None:
    nodes = start.config.launch.nodes
    if start.config.launch.name != "local" or nodes == 1:
        return None
    return f"launch.nodes={nodes} with launch=local, which is this machine: `stoker submit launch=slurm` has several"


@REFUSALS.entry(
    "containers",
    "launch=kubernetes or skypilot without launch.image, and without a place that outlives a pod",
    "pods have nothing to run, or their checkpoints are lost with them",
)
def _containers(start: Start) -> str | None:
    launch = start.config.launch
    if launch.name not in ("kubernetes", "skypilot"):
        return None
    if launch.image is None:
        return f"launch={launch.name} needs launch.image=IMAGE, a container image with Stoker (docs/containers.md)"
    if launch.nodes > 1 and launch.volume is None:
        return (
            f"launch.nodes={launch.nodes} with launch={launch.name} needs launch.volume=VOLUME, a volume that all pods "
            "mount: they share the run directory"
        )
    if launch.volume is None and start.config.checkpoint.remote is None:
        return (
            f"launch={launch.name} needs launch.volume=VOLUME or checkpoint.remote=URL: the run directory and its "
            "checkpoints are lost with a pod"
        )
    return None
