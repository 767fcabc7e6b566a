"""What a rank does for `stoker teach`: store what the model predicts for every row of the data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stoker.data import read_rows
from stoker.data.build import SPLITS
from stoker.data.indexed import IndexPlan
from stoker.data.opening import open_keyed_plans
from stoker.data.taught import TaughtRows, write_lessons
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.layout import batch_plan
from stoker.trainer.loop import Trainer
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.runtime.process import Phase

log = logging.getLogger(__name__)

_SAY_SECONDS = 30.0


def teach(trainer: Trainer) -> Outcome:
    """Runs instead of `Trainer.fit`, with the objective of `stoker.models.objectives.teaching`."""
    config, mesh = trainer.config, trainer.mesh
    folder, k = Path(config.objective.args["folder"]), int(config.objective.args["top_k"])
    largest, sources = 0, {}
    for split in SPLITS:
        keyed = open_keyed_plans(config, split)
        sources[split] = [{"name": plan.name, "rows": plan.rows_per_epoch, "key": key.values()} for plan, key in keyed]
        for number, (plan, key) in enumerate(keyed):
            taught = TaughtRows(
                folder, f"{split}-{number}", k, plan.rows_per_epoch, key.seq_len, trainer.facts.vocab_size
            )
            if mesh.rank == 0:
                taught.create()
            mesh.all_gather_text("the files are made")
            if plan.rows_per_epoch:
                largest = max(largest, _teach_source(trainer, plan, taught))
    texts = mesh.all_gather_text(str(largest))
    if mesh.rank == 0:
        size = 1 + max(map(int, texts)) if k else trainer.facts.vocab_size
        write_lessons(folder, k, size, config.model.init_from or "initial weights", sources)
    mesh.all_gather_text("the folder is whole")
    return Outcome.STOPPED


def _teach_source(trainer: Trainer, plan: IndexPlan, taught: TaughtRows) -> int:
    """Returns the largest token that this rank stored."""
    mesh, largest, said = trainer.mesh, 0, time.monotonic()
    for mine, numbers in _turns(trainer, plan.rows_per_epoch):
        trainer.phase(int(numbers[0]), Phase.EVALUATE)
        rows = read_rows(plan, numbers.tolist(), mesh.device.type == "cuda")
        found = trainer.engine.predict(rows)
        if found is not None:
            for row, values, labels in zip(numbers[:mine].tolist(), found.cpu(), rows.labels, strict=False):
                tokens, logs = _stored(values, labels, taught.k)
                largest = max(largest, int(tokens.max(initial=0)))
                taught.write(row, tokens, logs)
        if mesh.rank == 0 and time.monotonic() > said + _SAY_SECONDS:
            said = time.monotonic()
            log.warning("%s: %d of %d rows", taught.name, numbers[0], plan.rows_per_epoch)
    return largest


def _turns(trainer: Trainer, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """This rank's rows, a micro-batch at a time, and how many of them count: all ranks take as many turns."""
    layout, micro = trainer.mesh.layout, batch_plan(trainer.config, trainer.mesh.layout).micro_rows
    for start in range(0, rows, layout.dp * micro):
        numbers = np.arange(start + trainer.mesh.dp_rank * micro, start + (trainer.mesh.dp_rank + 1) * micro)
        yield int((numbers < rows).sum()), numbers.clip(max=rows - 1)


def _stored(values: Tensor, labels: Tensor, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of one row: tokens and log-probabilities as `TaughtRows.write` takes them. Where there is no label: zeros."""
    valid = (labels != IGNORE_INDEX)[None]
    if not k:
        return np.empty((0, len(labels)), np.int32), values.float().where(valid[0], 0.0)[None].numpy()
    tokens, logs = values.T[1:].where(valid, 0.0).split(k)
    return tokens.to(torch.int32).numpy(), logs.float().numpy()
