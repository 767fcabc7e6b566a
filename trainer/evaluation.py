"""Evaluation: the losses on fixed samples of validation and training sequences, in the layout of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stoker.parallel.batch import Batch
from stoker.parallel.engine import Engine
from stoker.parallel.mesh import Mesh
from stoker.parallel.objective import NEXT_TOKEN, Objective, shown

NAMES = {"validation": "val_loss", "train": "train_loss"}  # of the losses by split, in metrics.jsonl
AVERAGED = "ema_val_loss"  # of the average of the weights


@dataclass(frozen=True)
class Part:
    """This rank's rows of a sample, `[n, seq_len]`, n equal on all ranks."""

    source: str
    split: str  # validation | train
    rows: Batch


@dataclass(frozen=True)
class Evaluated:
    """Losses in nats per valid token, or per what the objective counts."""

    val_loss: float
    # Losses of training sequences and of each source of several, and the objective's scalars.
    extra: dict[str, float] = field(default_factory=dict)


class Evaluation:
    """The losses of samples whose rows are divided over data-parallel ranks, which all make equally many passes."""

    def __init__(
        self,
        mesh: Mesh,
        parts: Sequence[Part],
        per_pass: int,
        required: bool = True,
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        """`parts`: none for no evaluation; parts without a label on any rank are left out.

        A collective. If no validation row of any rank has a label, there is no loss: `required` raises ValueError then
        on all ranks, else there is no evaluation.
        """
        self._mesh, self._per_pass, self._objective = mesh, per_pass, objective
        labelled = mesh.any([bool(part.rows.valid_tokens() > 0) for part in parts]) if parts else []
        self.parts = [part for part, held in zip(parts, labelled, strict=True) if held]
        if not any(part.split == "validation" for part in self.parts):
            self.parts = []
        if parts and not self.parts and required:
            raise ValueError(
                "no token of the validation sequences is a label, so there is no validation loss: more "
                "eval.sequences may have some, and eval.sequences=0 evaluates nothing"
            )

    def losses(self, engine: Engine, given_up: Callable[[], bool] = lambda: False) -> Evaluated | None:
        """Mean losses over the rows of all ranks. Waits for the device.

        `given_up` is called before each pass and must return the same on all ranks: once it is true, there are none.
        """
        sums = []
        for rows in self._baselined(engine):
            passes = []
            for start in range(0, len(rows), self._per_pass):
                if given_up():
                    return None
                passes.append(engine.evaluate(rows[start : start + self._per_pass]))
            sums.append(sum(passes[1:], start=passes[0]))
        found = self._mesh.all_reduce(torch.stack(sums)).tolist()
        values: dict[str, float] = {}
        for split, name in NAMES.items():
            own = [(part.source, *each) for part, each in zip(self.parts, found, strict=True) if part.split == split]
            if own:
                count = sum(counted for _, _, counted, *_ in own)
                values[name] = sum(loss for _, loss, *_ in own) / count
                means = {
                    scalar: sum(numbers[place] for numbers in own) / count
                    for place, scalar in enumerate(self._objective.scalars, 3)
                }
                values |= {name.replace("loss", key): value for key, value in shown(self._objective, means).items()}
            if len({part.source for part in self.parts}) > 1:
                values |= {f"{name}.{source}": loss / counted for source, loss, counted, *_ in own}
        return Evaluated(values.pop(NAMES["validation"]), values)

    def _baselined(self, engine: Engine) -> list[Batch]:
        """The rows of each part, with the objective's baseline over all of the split."""
        by_split = {
            split: iter(engine.with_baseline([part.rows for part in self.parts if part.split == split]))
            for split in NAMES
        }
        return [next(by_split[part.split]) for part in self.parts]
