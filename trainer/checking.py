"""What a rank does for `stoker check`: train a few steps and keep what is compared.

`gradients/` of the run directory holds the gradient of the first step, `checkpoints/` the parameters after the last,
with every loss and gradient norm in the state. Against transformers `logits/` also holds the batch of the first step
and the logits of its first sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker.checkpoint import Checkpoints, fence
from stoker.models.logits import LogitsRecorder
from stoker.parallel.batch import Batch
from stoker.parallel.shards import PARAMETER, Chunk, Shard
from stoker.trainer.loop import Trainer
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.schedule import learning_rate

GRADIENTS = "gradients"
LOGITS = "logits"  # a directory, and the kind of what is in it
_LOGITS_BYTES = 1 << 30  # of the logits that are kept, beyond those of one sequence


def measure(trainer: Trainer) -> Outcome:
    """Runs instead of `Trainer.fit`. Raises RuntimeError when something could not be written."""
    return _measure(trainer, with_logits=False)


def measure_logits(trainer: Trainer) -> Outcome:
    """`measure` of one step, with its batch and the logits of its first sequences."""
    return _measure(trainer, with_logits=True)


def _measure(trainer: Trainer, with_logits: bool) -> Outcome:
    losses, norms = [], []
    for step in range(1, trainer.config.steps + 1):
        first_row = trainer.rows.row
        rows = trainer.rows.next()
        if with_logits:
            _keep_logits(trainer, replace(rows, weights=None))  # transformers' loss has none
        else:
            trainer.engine.forward_backward(rows, first_row)
        if step == 1:
            _keep(trainer, GRADIENTS, step, trainer.engine.gradient_shards(), {})
        result = trainer.engine.update(learning_rate(trainer.config.schedule, trainer.config.optim, step)).read()
        losses.append(result.loss)
        norms.append(result.grad_norm)
        trainer.progress.step = step
        trainer.progress.updates += not result.skipped
    parameters = [shard for shard in trainer.engine.shards() if shard.kind == PARAMETER]
    mask = trainer.facts.document_mask
    state = {"layout": str(trainer.mesh.layout), "losses": losses, "norms": norms, "document_mask": mask}
    _keep(trainer, "checkpoints", trainer.progress.step, parameters, state)
    return Outcome.COMPLETED


def _keep_logits(trainer: Trainer, rows: Batch) -> None:
    """`forward_backward`, and write the batch and the logits of as many sequences as stay within _LOGITS_BYTES."""
    config, mesh = trainer.config, trainer.mesh
    vocab = trainer.facts.vocab_size
    batch, length = config.batch.size, config.seq_len
    kept = min(batch, max(1, _LOGITS_BYTES // (4 * length * vocab)))
    numbers = range(mesh.dp_rank, batch, mesh.layout.dp)  # of this rank's sequences in the batch
    with LogitsRecorder(sum(number < kept for number in numbers) * length) as recorder:
        trainer.engine.forward_backward(rows)
    shards: list[Shard] = []
    for at, number in enumerate(numbers):
        for name in ("tokens", "labels", "positions", "documents") if mesh.coordinate.pp == 0 else ():
            data = getattr(rows, name)[at : at + 1].contiguous()
            box = Chunk((number, 0), (1, length))
            shards.append(Shard(name, LOGITS, (batch, length), box, data, mesh.coordinate.tp, mesh.layout.tp))
    for start, logits in recorder.parts.items():  # empty on a rank without the head
        for at, number in enumerate(number for number in numbers if number < kept):
            data = logits[at * length : (at + 1) * length][None]
            box = Chunk((number, 0, start), (1, length, logits.shape[1]))
            shards.append(Shard(LOGITS, LOGITS, (kept, length, vocab), box, data))
    _keep(trainer, LOGITS, 1, shards, {})


def _keep(trainer: Trainer, name: str, step: int, shards: Sequence[Shard], state: dict[str, Any]) -> None:
    directory = Path(str(trainer.config.run.dir)) / name
    if trainer.mesh.rank == 0:
        directory.mkdir(exist_ok=True)
        fence(directory, 1)
    trainer.mesh.all_gather_text("the directory exists")
    world = trainer.mesh.layout.world
    saves = Checkpoints(directory, rank=trainer.mesh.rank, world=world, attempt=1, keep=1, mode="sync")
    saves.save(step, shards, state)
    for report in saves.wait():
        if report.error:
            raise RuntimeError(f"{directory}: {report.error}")
