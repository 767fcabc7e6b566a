"""What the ranks of a trainer predict for batches of rank 0's, as one model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from stoker.parallel.batch import Batch
from stoker.trainer.loop import Trainer
from stoker.trainer.runtime.process import Phase

FIELDS = 4  # of a batch on its way: tokens, labels, positions, documents


class Predictions:
    """All ranks of a trainer, as rank 0 asks them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._mesh, self._batches = trainer, trainer.mesh, 0
        self.rows, self.seq_len = trainer.config.batch.size, trainer.config.seq_len

    def of(self, batch: Batch) -> Tensor:
        """On rank 0: for each label of a batch of `rows` rows its log-probability, the most probable token and that
        one's: fp64 `[rows, seq_len, 3]`."""
        fields = torch.stack([batch.tokens, batch.labels, batch.positions, batch.documents.long()])
        self._send(1)
        dist.broadcast(fields, 0, group=self._mesh.control)
        return self._predict(fields)

    def end(self) -> None:
        """On rank 0: the others need not wait any more."""
        self._send(0)

    def serve(self) -> None:
        """On every other rank: predict what rank 0 sends until it ends."""
        while self._send(0):
            fields = torch.empty(FIELDS, self.rows, self.seq_len, dtype=torch.int64)
            dist.broadcast(fields, 0, group=self._mesh.control)
            self._predict(fields)

    def _send(self, count: int) -> int:
        """Whether another batch comes, from rank 0 to all."""
        message = torch.tensor([count])
        dist.broadcast(message, 0, group=self._mesh.control)
        return int(message)

    def _predict(self, fields: Tensor) -> Tensor:
        self._batches += 1
        self._trainer.phase(self._batches, Phase.EVALUATE)
        mine = slice(self._mesh.dp_rank, None, self._mesh.layout.dp)
        tokens, labels, positions, documents = fields[:, mine]
        found = self._trainer.engine.predict(Batch(tokens, labels, positions, documents.int()))
        whole = torch.zeros(self.rows, self.seq_len, 3, dtype=torch.float64)
        if found is not None:
            whole[mine] = found.cpu()
        dist.all_reduce(whole, group=self._mesh.control)
        return whole
