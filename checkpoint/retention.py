"""Which checkpoints stay. Only valid ones count; damaged ones are left for inspection."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stoker.checkpoint.commit import is_valid
from stoker.checkpoint.names import FAILED, CheckpointMismatch, DamagedCheckpoint, committed, one_line, step_of
from stoker.checkpoint.storage import discard
from stoker.checkpoint.stored import read_state

log = logging.getLogger(__name__)

VALIDATION_LOSS = "val_loss"  # key in the state of a checkpoint: a number, or null if it was not measured there


@dataclass(frozen=True)
class Retention:
    """The checkpoints that stay: the newest, those of certain steps, the best. One rule is enough to keep one."""

    keep: int  # newest
    keep_every: int = 0  # those whose step is a multiple of this; 0: none
    keep_best: int = 0  # of the lowest validation loss

    def __post_init__(self) -> None:
        assert self.keep >= 1, "the newest checkpoint must be kept"

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of the valid checkpoints with their validation losses, by step."""
        steps = sorted(losses, reverse=True)
        measured = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        best = {-step for _, step in sorted(measured)[: self.keep_best]}
        regular = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        return {*steps[: self.keep], *regular, *best}


def retain(directory: Path, retention: Retention, spared: Collection[int] = ()) -> None:
    """Removes the valid checkpoints that `retention` does not keep, oldest first. `spared` steps stay for now."""
    valid = {step_of(path) or 0: path for path in committed(directory) if is_valid(path)}
    kept = retention.kept(validation_losses(valid.values()) if retention.keep_best else dict.fromkeys(valid))
    for step in sorted(set(valid) - kept - set(spared)):
        discard(valid[step])


def remove(checkpoint: Path) -> None:
    """Remove a committed checkpoint, without regard to others."""
    discard(checkpoint)


def validation_losses(checkpoints: Iterable[Path]) -> dict[int, float | None]:
    """The validation loss of each, by step; None where it was not measured or cannot be read."""
    return {step_of(checkpoint) or 0: _validation_loss(checkpoint) for checkpoint in checkpoints}


def _validation_loss(checkpoint: Path) -> float | None:
    try:
        loss = read_state(checkpoint).get(VALIDATION_LOSS)
    except (DamagedCheckpoint, CheckpointMismatch, OSError) as error:
        log.warning("the validation loss of %s cannot be read: %s", checkpoint.name, one_line(error))
        return None
    return float(loss) if isinstance(loss, int | float) else None


def clear_failures(directory: Path) -> None:
    """Removes the notes on failed saves. Right after a commit: all ranks reported, so none still waits for a note."""
    for note in directory.glob(f"*{FAILED}"):
        note.unlink(missing_ok=True)
