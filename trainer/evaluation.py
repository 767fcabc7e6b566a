"""Evaluation: the loss on validation rows, in the layout of training."""

from __future__ import annotations

from collections.abc import Callable

from stoker.parallel.batch import Batch
from stoker.parallel.engine import Engine
from stoker.parallel.mesh import Mesh


class Evaluation:
    """The first `count` validation rows, divided over data-parallel ranks. Every rank makes equally many passes."""

    def __init__(self, mesh: Mesh, rows: Batch | None, per_pass: int) -> None:
        """`rows`: this rank's validation rows `[n, seq_len]`, n equal on all ranks; None for no evaluation.

        A collective. Raises ValueError on all ranks if no row of any rank has a label, because there is no loss then.
        """
        if rows is not None and not any(mesh.any([bool(rows.valid_tokens() > 0)])):
            raise ValueError(
                "no token of the validation sequences is a label, so there is no validation loss: more "
                "eval.sequences may have some, and eval.sequences=0 evaluates nothing"
            )
        self._mesh, self._per_pass = mesh, per_pass
        self.rows = rows

    def loss(self, engine: Engine, given_up: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss in nats per valid token over the rows of all ranks. Waits for the device.

        `given_up` is called before each pass and must return the same on all ranks. Once it is true there is no loss.
        """
        assert self.rows is not None
        passes = []
        for start in range(0, len(self.rows), self._per_pass):
            if given_up():
                return None
            passes.append(engine.evaluate(self.rows[start : start + self._per_pass]))
        loss_sum, tokens = self._mesh.all_reduce(sum(passes[1:], start=passes[0])).tolist()
        return loss_sum / tokens
