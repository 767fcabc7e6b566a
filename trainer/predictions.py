"""What the ranks of a trainer predict for batches of rank 0's, as one model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from stoker.parallel.batch import Batch
from stoker.parallel.objective import Objective
from stoker.trainer.loop import Trainer
from stoker.trainer.runtime.process import Phase

FIELDS = 4  # of a batch on its way: tokens, labels, positions, documents


class GivenUpError(Exception):
    """A request to end has come; no rank waits for batches any more."""


class Predictions:
    """All ranks of a trainer, as rank 0 asks them."""

    def __init__(
        self,
        trainer: Trainer,
        rows: int,
        objective: Objective | None = None,
        step: int | None = None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """`rows` of each batch: a multiple of the data-parallel degree. `objective`: in the place of the engine's.

        `step`: of the run; default: batches are counted. `given_up` is called before each batch and must return the
        same on all ranks.
        """
        self._trainer, self._mesh, self._batches = trainer, trainer.mesh, 0
        self._objective, self._step, self._given_up = objective, step, given_up
        self.rows, self.seq_len = rows, trainer.config.seq_len
        self.packed = trainer.facts.document_mask  # several texts may share a row
        self.waiting = False  # rank 0 is within `of`: an error may be the ranks'

    def of(self, batch: Batch) -> Tensor:
        """On rank 0: for each label of a batch of `rows` rows its log-probability, the most probable token and that
        one's: fp64 `[rows, seq_len, 3]`. Raises GivenUpError."""
        self.waiting = True
        fields = torch.stack([batch.tokens, batch.labels, batch.positions, batch.documents.long()])
        self._send(1)
        if self._given_up():
            raise GivenUpError
        dist.broadcast(fields, 0, group=self._mesh.control)
        found = self._predict(fields)
        self.waiting = False
        return found

    def end(self) -> None:
        """On rank 0: the others need not wait any more."""
        self._send(0)

    def serve(self) -> bool:
        """On every other rank: predict what rank 0 sends until it ends. Returns whether all was predicted."""
        while self._send(0):
            if self._given_up():
                return False
            fields = torch.empty(FIELDS, self.rows, self.seq_len, dtype=torch.int64)
            dist.broadcast(fields, 0, group=self._mesh.control)
            self._predict(fields)
        return True

    def _send(self, count: int) -> int:
        """Whether another batch comes, from rank 0 to all."""
        message = torch.tensor([count])
        dist.broadcast(message, 0, group=self._mesh.control)
        return int(message)

    def _predict(self, fields: Tensor) -> Tensor:
        self._batches += 1
        self._trainer.phase(self._batches if self._step is None else self._step, Phase.EVALUATE)
        mine = slice(self._mesh.dp_rank, None, self._mesh.layout.dp)
        tokens, labels, positions, documents = fields[:, mine]
        batch = Batch(tokens, labels, positions, documents.int())
        found = self._trainer.engine.predict(batch, self._objective)
        whole = torch.zeros(self.rows, self.seq_len, 3, dtype=torch.float64)
        if found is not None:
            whole[mine] = found.cpu()
        dist.all_reduce(whole, group=self._mesh.control)
        return whole
