"""From overrides to the config of a start, in one list of stages. All starts go through it, before a rank is spawned.

    compose    the overrides over the groups and defaults of conf/, with absolute paths
    resume     a run that exists: its stored config with the overrides; otherwise a check that no run is overwritten
    targets    import paths of models, data and optimizers lead to something that can be called
    adopt      shape and tokenizer of the model in `model.init_from`, the shape of the adapter in `adapter.init_from`,
               and a link in the place of `checkpoints`
    budget     `tokens` or `data.epochs` as steps, at the first start
    fit        under a launcher that found another number of machines: the layout that fits them
    validate   limits, refusals of all rooms, places and imported weights
    pin        defaults that later starts must repeat are written out

Each stage takes the result of the one before. The module is here and not in conf/ because a stage may use any room.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from stoker.checkpoint import tier_problem
from stoker.conf import resume as conf_resume
from stoker.conf.compose import compose as compose_groups
from stoker.conf.resume import Change
from stoker.conf.rundir import RunDirectory, first_tier, refuse_links, resolve, run_directory
from stoker.conf.schema import Config, ModelConfig, lookup
from stoker.conf.targets import import_target, target_and_arguments
from stoker.conf.values import ConfigError
from stoker.parallel import layout
from stoker.parallel.start import Ranks
from stoker.trainer import validate as rooms
from stoker.trainer.budget import settle_steps
from stoker.trainer.places import adopted_link, is_known, refuse_foreign_places
from stoker.trainer.stored_run import refuse_replacing_run, report_copies, resumed, stored_config
from stoker.trainer.trust import DATA, MODEL, OPTIM, TRAINING, code_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """How a config is to be settled. The keys whose code the start runs are `uses` (`stoker.trainer.trust`)."""

    overrides: Sequence[str]
    where: Callable[[Config], Ranks | tuple[int, int]]  # on how many ranks and GPUs a config will run
    tell: Callable[[str], None] = log.info  # takes lines for the user
    refitted: Callable[[str], None] | None = None  # takes the changes of `fit`; None: the layout is not changed
    restarted: bool = False  # a launcher repeats a user's command
    uses: Sequence[str] = TRAINING
    check_import: bool = False  # compare a model imported by `model.init_from` with transformers'


@dataclass(frozen=True)
class Draft:
    """A config between two stages."""

    config: Config
    stored: Config | None = None  # of the run that is resumed
    changes: list[Change] = field(default_factory=list)  # of the stored config

    @property
    def run(self) -> RunDirectory:
        return run_directory(self.config)


def settle_config(
    overrides: Sequence[str],
    where: Callable[[Config], Ranks | tuple[int, int]],
    **options: Any,
) -> tuple[Config, list[Change]]:
    """The config of this start, and what differs from the start before. The parameters are those of `Request`.

    Raises ConfigError for everything that can be known to be wrong before a rank is spawned.
    """
    request = Request(overrides, where, **options)
    draft = compose(request)
    for stage in (resume, targets, adopt, budget, fit, validate, pin):
        draft = stage(request, draft)
    return draft.config, draft.changes


def compose(request: Request) -> Draft:
    config = resolve(compose_groups(request.overrides), datetime.now())
    if request.restarted:
        config.run.fresh = False  # it was meant for the first of these starts
    return Draft(config)


def resume(request: Request, draft: Draft) -> Draft:
    config, run = draft.config, draft.run
    refuse_links(run)
    refuse_foreign_places(run, config)
    stored = stored_config(run, config)
    if stored is None:
        if not config.run.fresh:
            refuse_replacing_run(run, config, request.overrides, request.restarted)
        return draft
    config, changes = resumed(run, config, stored, request.overrides, request.tell, request.uses)
    return Draft(config, stored, changes)


def targets(request: Request, draft: Draft) -> Draft:
    """After `resume`, which refuses the code of strangers."""
    config = draft.config
    code = code_of(config, (MODEL, DATA, OPTIM))
    named = {key: path for key, path in code.items() if key.rpartition(".")[2] in ("target", "splits", "map")}
    named |= {f"observers[{at}]": target_and_arguments(entry)[0] for at, entry in enumerate(config.observers)}
    own = (
        ("model.target", config.model.target),
        ("objective.target", config.objective.target),
        ("optim.target", config.optim.target),
    )  # Stoker's own may be misspelt
    for key, path in dict(own, **named).items():
        if not isinstance(path, str) or path == ModelConfig().target:  # that of most runs
            continue
        try:
            found = import_target(path)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        if not callable(found):
            raise ConfigError(f"{key}={path} is {found!r}: expected a function or a class")
    return draft


def adopt(request: Request, draft: Draft) -> Draft:
    config = draft.config
    if draft.stored is None and config.model.init_from is not None:
        from stoker.trainer.pretrained import adopt_shape  # most starts do not need its imports

        config = adopt_shape(config, request.overrides, request.tell)
        if config.data.tokenizer != draft.config.data.tokenizer:
            request.tell(f"data.tokenizer={config.data.tokenizer}: the one of model.init_from")
    elif draft.stored is None and config.model.config is not None:
        from stoker.trainer.pretrained import with_settled

        try:
            config = with_settled(config)
        except ValueError as error:
            raise ConfigError(f"model.config: {error}") from error
    if draft.stored is None and config.adapter.init_from is not None:
        from stoker.trainer.pretrained_adapter import adopt_adapter

        config = adopt_adapter(config, request.overrides, request.tell)
    chosen = config.checkpoint.dir is not None or any(word.startswith("checkpoint.dir=") for word in request.overrides)
    place = None if chosen else adopted_link(draft.run)
    if place is not None:  # a link made by a user counts like the key
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, dir=str(place)))
    return dataclasses.replace(draft, config=config)


def budget(request: Request, draft: Draft) -> Draft:
    config = settle_steps(draft.config, request.overrides, first=draft.stored is None, tell=request.tell)
    return dataclasses.replace(draft, config=config)


def fit(request: Request, draft: Draft) -> Draft:
    if request.refitted is None or not draft.run.attempt_numbers():
        return draft
    world = request.where(draft.config)[0]
    fitted = layout.fit(draft.config, world)
    for key in ("parallel.cp", "parallel.ep", "parallel.dp_replicate", "batch.micro_size"):
        old, new = lookup(draft.config, key), lookup(fitted, key)
        if old != new:
            request.refitted(f"on {world} ranks {key}={old} becomes {new}")
    return dataclasses.replace(draft, config=fitted)


def validate(request: Request, draft: Draft) -> Draft:
    config, run = draft.config, draft.run
    rooms.validate(config, *request.where(config))
    if config.adapter.name != "none" or config.model.freeze:
        from stoker.trainer.pretrained_adapter import refuse_unfitting

        refuse_unfitting(config, request.tell)
    if request.check_import and draft.stored is None and config.model.init_from is not None:
        from stoker.trainer.import_check import compare_import

        result = compare_import(config)
        if result is not None:
            request.tell(f"model.init_from={config.model.init_from}: {result}")
    if draft.stored is None and config.optim.init_from is not None:
        from stoker.trainer.pretrained_moments import refuse_unfitting_moments

        refuse_unfitting_moments(config)
    problem = tier_problem(run.checkpoints, first_tier(config), is_known(config))
    if problem is not None:
        raise ConfigError(problem)
    if draft.stored is not None:
        refuse_foreign_places(run, config)  # those that were stored
    report_copies(run, request.tell)
    return draft


def pin(request: Request, draft: Draft) -> Draft:
    return dataclasses.replace(draft, config=conf_resume.pin(draft.config))
