"""Put a `Trainer` together from a config: model, engine, data, checkpoint, observers, in that order."""

from __future__ import annotations

import itertools
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch

from stoker.checkpoint import Checkpoints, Owner, Remote, resume
from stoker.conf.faults import read_faults
from stoker.conf.schema import Config
from stoker.data import RowSource, Sample, open_samples, open_stream, prepare, read_rows
from stoker.data.taught import open_lessons
from stoker.models.objectives import objective_of
from stoker.models.objectives.teaching import TARGET
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.engine import Engine
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.parallel.mmap_offload import offloaded
from stoker.parallel.model import whole_model
from stoker.parallel.objective import takes_targets
from stoker.parallel.shards import BUFFER, PARAMETER
from stoker.parallel.tensor.nf4 import packed_in
from stoker.trainer.evaluation import Evaluation, Part
from stoker.trainer.facts import Facts, vocabulary_of
from stoker.trainer.frozen_base import FrozenBase, frozen_names
from stoker.trainer.history import SavedOnce, has_saved, nothing_to_resume
from stoker.trainer.loop import Trainer
from stoker.trainer.magnitudes import set_magnitudes
from stoker.trainer.narrow_base import fill_narrow
from stoker.trainer.parallelize import NO_HEAD, build_engine, compiles, part_builder
from stoker.trainer.pretrained import load_pretrained
from stoker.trainer.pretrained_adapter import load_adapter
from stoker.trainer.pretrained_moments import load_moments
from stoker.trainer.report.goodput import Booking
from stoker.trainer.report.messages import StepMessages
from stoker.trainer.report.metrics import read_recent
from stoker.trainer.report.module_ranges import modules_to_mark
from stoker.trainer.report.observers import open_observers
from stoker.trainer.report.profile import Profiler
from stoker.trainer.runtime.faults import Faults
from stoker.trainer.runtime.process import Phase, Phases, Place
from stoker.trainer.runtime.requests import Requests, deadline_of
from stoker.trainer.runtime.shutdown_estimate import ShutdownEstimate
from stoker.trainer.runtime.starts import Start
from stoker.trainer.runtime.timeouts import Timeouts
from stoker.trainer.tasks import TaskEvaluation
from stoker.trainer.utilisation import Arithmetic, arithmetic_of

log = logging.getLogger(__name__)

NO_VALIDATION = (
    "no validation loss: the data keep too few documents for it. data.validation_path=PATH names others, "
    "data.validation_by=position keeps the last tokens in another run, eval.sequences=0 goes without"
)


def assemble(
    config: Config,
    mesh: Mesh,
    place: Place,
    start: Start,
    requests: Requests,
    phase: Phases,
    screen: TextIO,
    closing: ExitStack | None = None,
    owner: Owner | None = None,
    log_file: TextIO | None = None,
) -> Trainer:
    """The trainer of this rank in one start of a run, resumed from the newest valid checkpoint if there is one.

    `config` is settled (`stoker.trainer.settle`), and the places of checkpoints are `owner`'s. `screen` and `log_file`
    show, on rank 0, how the run goes. Resources that must be closed when this fails are pushed on `closing`. Raises
    ValueError for data or a checkpoint that do not fit the config, and for a run whose checkpoints are missing.
    """
    closing = closing or ExitStack()
    run, attempt = start.run, start.attempt
    plan = batch_plan(config, mesh.layout)
    phase(0, Phase.OPEN_DATA)
    vocab_size = vocabulary_of(config)
    stream, evaluation = _open_data(config, mesh, place, closing)
    facts = Facts(vocab_size, stream.document_mask)
    refuse_other_pairs(config, stream)
    refuse_other_lessons(config, vocab_size)

    phase(0, Phase.BUILD)
    complete = facts.complete(config)
    if stream.weighted and not takes_targets(part_builder(complete)(whole_model(config.model.num_hidden_layers))):
        raise ValueError(f"the weight of a message {NO_HEAD.format(config.model.target)}")
    engine, initialise = build_engine(complete, mesh, plan)
    observers = open_observers(config, start, screen, log_file) if mesh.rank == 0 else None
    if observers is not None:
        closing.callback(observers.abandon)
    remote = Remote(config.checkpoint.remote) if config.checkpoint.remote else None
    checkpoints = Checkpoints(
        run.checkpoints,
        rank=mesh.rank,
        world=mesh.layout.world,
        attempt=attempt,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        mode=config.checkpoint.mode,
        staging_limit=config.checkpoint.staging_limit,
        remote=remote,
        owner=owner,
    )
    closing.callback(checkpoints.abandon)
    profiler = Profiler(
        config.profile,
        mesh.device,
        run.trace(attempt, mesh.rank),
        run.memory_snapshot(attempt, mesh.rank),
        observers.message if observers is not None else log.info,
        modules_to_mark(engine.modules(), opaque=compiles(config, mesh.device)) if config.profile.steps else {},
        lambda: _held(engine, mesh.device),
        mesh.all_gather_text,
    )
    faults = Faults(read_faults(config.faults), mesh.rank, run, checkpoints, mesh.device)

    frozen = frozen_names(complete)
    base = FrozenBase(frozen, config.model.init_from) if frozen else None

    def begin() -> None:
        narrow = [] if base is None else base.narrow(engine.shards())
        apart = {shard.name for shard in narrow} | {packed.name for packed in packed_in(engine.modules())}
        initialise(apart)
        wide = [shard for shard in engine.shards() if shard.name not in apart]
        if config.model.init_from is not None:
            load_pretrained(complete, wide)
        if config.adapter.name == "dora":
            set_magnitudes(complete, wide)
        if base is not None:
            base.measure(itertools.chain(wide, fill_narrow(complete, narrow, engine.modules())), mesh)
        engine.shards_written()

    if base is not None:  # which no checkpoint holds
        begin()

    def restore() -> dict[str, Any] | None:
        held = engine.shards() if base is None else base.saved(engine.shards())
        return resume(run.checkpoints, held, mesh.all_gather_text, mesh.rank, remote)

    tasks = TaskEvaluation(config, mesh, run) if config.eval.tasks else None
    trainer = Trainer(
        config=config,
        facts=facts,
        mesh=mesh,
        engine=engine,
        rows=stream,
        evaluation=evaluation,
        checkpoints=checkpoints,
        observers=observers,
        requests=requests,
        phase=phase,
        profiler=profiler,
        faults=faults,
        timeouts=Timeouts(config.parallel.timeout_seconds, config.launch.hang_seconds),
        restore=restore,
        base=base,
        tasks=tasks,
        arithmetic=_arithmetic(complete, mesh),
        messages=_messages(config, mesh, run.messages(attempt)),
    )
    phase(0, Phase.RESUME)
    state = restore()
    if state is not None:
        trainer.load_state(state)
        log.info("resumed from step %d", trainer.progress.step)
    else:
        if has_saved(run):
            raise ValueError(nothing_to_resume(run, config.checkpoint.remote))
        if base is None:
            begin()
        if config.adapter.init_from is not None:
            load_adapter(complete, engine.shards())
            engine.shards_written()
        if config.optim.init_from is not None:
            load_moments(complete, engine)
            engine.shards_written()
    checkpoints.go_on_uploading()
    with offloaded(config.parallel):
        checkpoints.prepare(trainer.saved_shards())
    if observers is not None:
        grace = ShutdownEstimate(deadline_of(config.launch.deadline), observers.message)
        grace.recall(read_recent(run.metrics))
        requests.grace = grace.with_margin
        observers.add(grace)
        observers.add(SavedOnce(run))
        resumed = trainer.progress.step if state is not None else None
        where = {"layout": str(mesh.layout), "device": str(mesh.device), "attempt": str(attempt)}
        observers.start(complete, resumed, config.steps, where)
        if not evaluation.parts and config.eval.sequences is None:
            observers.message(NO_VALIDATION)
        trainer.booking = Booking(run.seconds(attempt), phase, trainer.progress.step)
    return trainer


def refuse_other_pairs(config: Config, stream: RowSource) -> None:
    """Raises ValueError where the data are pairs, or rated answers, and the objective takes none, or others."""
    objective = objective_of(config.objective)
    wanted, found = objective.documents_together, stream.documents_together
    rated, takes_rated = stream.weighted and found > 1, getattr(objective, "rated", False)
    if config.objective.target == TARGET or (wanted == found and rated == takes_rated):
        return
    name = config.objective.target or config.objective.name
    if takes_rated:
        raise ValueError(
            f"objective={name} takes answers that are rated one by one, and the data have none: data=chat "
            "data.args.shape=unpaired_preference reads them, and rates the answers of pairs"
        )
    if rated:
        raise ValueError(
            "the data are answers that are rated one by one (data.args.shape=unpaired_preference), which "
            f"objective={name} does not take: objective=kto or apo_zero_unpaired does"
        )
    if found == 1:
        raise ValueError(
            f"objective={name} takes pairs of answers, and the data have none: data=chat data.args.shape=preference "
            "reads them"
        )
    raise ValueError(
        f"the data are pairs of answers (data.args.shape=preference), which objective={name} does not take: "
        "objective=dpo, ipo, simpo or orpo does"
    )


def refuse_other_lessons(config: Config, vocab_size: int) -> None:
    """Raises ValueError where `objective.teacher` holds what the objective does not use, or tokens the model lacks."""
    folder, name = config.objective.teacher, config.objective.name
    if folder is None or config.objective.target is not None:
        return
    lessons = open_lessons(Path(folder))
    if (lessons.k > 0) != (name == "distill"):
        held = f"the {lessons.k} most probable tokens" if lessons.k else "the log-probabilities of labels alone"
        needed = "needs the most probable tokens (`stoker teach`)"
        needed = needed if name == "distill" else "needs those of the labels (`stoker teach --labels`)"
        raise ValueError(f"objective.teacher={folder} holds {held}, and objective={name} {needed}")
    if lessons.k and lessons.vocab_size > vocab_size:
        raise ValueError(
            f"objective.teacher={folder}: {lessons.teacher} predicts token {lessons.vocab_size - 1}, and the model has "
            f"{vocab_size} tokens"
        )


def _arithmetic(config: Config, mesh: Mesh) -> Arithmetic | None:
    if mesh.rank or mesh.device.type != "cuda":
        return None
    return arithmetic_of(config, torch.cuda.get_device_name(mesh.device), mesh.layout.world)


def _messages(config: Config, mesh: Mesh, path: Path) -> StepMessages:
    if not config.log.plan or mesh.rank or compiles(config, mesh.device):  # compiled code would be left for the step
        return StepMessages()
    return StepMessages(path, mesh)


def _held(engine: Engine, device: torch.device) -> dict[str, int]:
    """Bytes on `device` of what an engine holds all the time, by category."""
    found: dict[str, int] = {}
    for shard in engine.shards():
        if shard.data.device.type == device.type:
            parameters = "fp32 parameters" if shard.data.dtype == torch.float32 else "frozen parameters"
            name = {PARAMETER: parameters, BUFFER: "buffers"}.get(shard.kind, "optimizer state")
            found[name] = found.get(name, 0) + shard.data.nbytes
    return found


def _open_data(config: Config, mesh: Mesh, place: Place, closing: ExitStack) -> tuple[RowSource, Evaluation]:
    """The rows this rank trains on and those it evaluates. The first rank of each machine tokenises, if need be."""
    if place.local_rank == 0:
        prepare(config)
    mesh.all_gather_text("the data are prepared")
    stream = open_stream(config, mesh)
    closing.callback(stream.close)
    parts = [Part(sample.source, sample.split, _rows_of(sample, mesh)) for sample in open_samples(config)]
    required = config.eval.sequences is not None
    micro_rows, objective = batch_plan(config, mesh.layout).micro_rows, objective_of(config.objective)
    return stream, Evaluation(mesh, parts, micro_rows, required, objective)


def _rows_of(sample: Sample, mesh: Mesh) -> Batch:
    """This rank's rows of `sample`. Every rank has as many: one that is short of rows reads one again and counts
    nothing of it."""
    dp_rank, dp = mesh.dp_rank, mesh.layout.dp
    mine = sample.numbers[dp_rank::dp].tolist()
    padding = -(-len(sample.numbers) // dp) - len(mine)
    rows = read_rows(sample.plan, mine + sample.numbers[:1].tolist() * padding, mesh.device.type == "cuda")
    rows.labels[len(mine) :] = IGNORE_INDEX
    return rows
