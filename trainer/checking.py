"""What a rank does for `stoker check`: train a few steps and keep what is compared.

Under `gradients/` of the run directory stands the gradient of the first step, under `checkpoints/` the parameters after
the last, with every loss and gradient norm in the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker.checkpoint import Checkpoints, fence
from stoker.parallel.shards import PARAMETER, Shard
from stoker.trainer.loop import Trainer
from stoker.trainer.runtime.outcome import Outcome
from stoker.trainer.schedule import learning_rate

GRADIENTS = "gradients"


def measure(trainer: Trainer) -> Outcome:
    """In the place of `Trainer.fit`. Raises RuntimeError when something could not be written."""
    losses, norms = [], []
    for step in range(1, trainer.config.steps + 1):
        trainer.engine.forward_backward(trainer.rows.next())
        if step == 1:
            _keep(trainer, GRADIENTS, step, trainer.engine.gradient_shards(), {})
        result = trainer.engine.update(learning_rate(trainer.config.schedule, trainer.config.optim, step)).read()
        losses.append(result.loss)
        norms.append(result.grad_norm)
        trainer.progress.step = step
    parameters = [shard for shard in trainer.engine.shards() if shard.kind == PARAMETER]
    state = {"layout": str(trainer.mesh.layout), "losses": losses, "norms": norms}
    _keep(trainer, "checkpoints", trainer.progress.step, parameters, state)
    return Outcome.COMPLETED


def _keep(trainer: Trainer, name: str, step: int, shards: Sequence[Shard], state: dict[str, Any]) -> None:
    directory = Path(str(trainer.config.run.dir)) / name
    if trainer.mesh.rank == 0:
        directory.mkdir(exist_ok=True)
        fence(directory, 1)
    trainer.mesh.all_gather_text("the directory is there")
    world = trainer.mesh.layout.world
    saves = Checkpoints(directory, rank=trainer.mesh.rank, world=world, attempt=1, keep=1, mode="sync")
    saves.save(step, shards, state)
    for report in saves.wait():
        if report.error:
            raise RuntimeError(f"{directory}: {report.error}")
