"""Put a `Trainer` together from a config: model, engine, data, checkpoint, observers, in that order."""

from __future__ import annotations

import dataclasses
import logging
from typing import TextIO

from checkpoint import Checkpoints, resume
from conf.rundir import RunDirectory
from conf.schema import Config
from data import RowStream, open_rows, prepare
from parallel.layout import batch_plan
from parallel.mesh import Mesh
from trainer.cut import cut
from trainer.evaluation import Evaluation
from trainer.loop import Progress, Trainer
from trainer.observers import open_observers
from trainer.process import Phases, Requests

log = logging.getLogger(__name__)


def assemble(
    config: Config,
    mesh: Mesh,
    run: RunDirectory,
    attempt: int,
    requests: Requests,
    phase: Phases,
    screen: TextIO,
) -> Trainer:
    """The trainer of this rank, resumed from the newest valid checkpoint of `run` if there is one.

    `config` is settled (`trainer.start`). Raises ValueError for data or a checkpoint that do not fit it.
    """
    plan = batch_plan(config, mesh.layout)
    phase(0, "prepare_data")
    ...
