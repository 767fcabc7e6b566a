"""Where the first tier is: in the run directory, or in a faster place that `checkpoints` in there is a link to.

Readers use the run directory in both cases.
"""

from __future__ import annotations

import os
from pathlib import Path

from stoker.checkpoint.names import DAMAGED, committed
from stoker.checkpoint.storage import discard


def linked_place(checkpoints: Path) -> Path | None:
    """The absolute target of the link `checkpoints`; a relative one counts from its directory. None if not a link."""
    if not checkpoints.is_symlink():
        return None
    return Path(os.path.normpath(checkpoints.parent.resolve() / os.readlink(checkpoints)))


def tier_problem(checkpoints: Path, elsewhere: Path | None, known: bool = False) -> str | None:
    """Why the checkpoints of the run that has `checkpoints` cannot be kept in `elsewhere` (None: in the run directory).

    None when they can. A run's checkpoints are in one place, and a place is one run's: with `known` the checkpoints in
    `elsewhere` are this run's, by their mark or because the run takes them over.
    """
    linked = linked_place(checkpoints)
    if linked is not None and elsewhere is not None and os.path.realpath(linked) == os.path.realpath(elsewhere):
        return None
    if linked is not None:
        wanted = "null" if elsewhere is None else elsewhere
        return (
            f"checkpoint.dir={wanted}, but this run keeps its checkpoints in {linked}: checkpoint.dir={linked}, or "
            f"move them and make {checkpoints} a link to their new place"
        )
    if elsewhere is None:
        return None
    if "://" in str(elsewhere) or ":/" in str(elsewhere):
        return f"checkpoint.dir={elsewhere}: a directory that all ranks share; a URL is for checkpoint.remote"
    if checkpoints.parent == elsewhere or checkpoints == elsewhere or checkpoints in elsewhere.parents:
        return f"checkpoint.dir={elsewhere} is in the run directory: leave it out, or name a directory elsewhere"
    if committed(checkpoints) or (checkpoints / DAMAGED).exists():
        return (
            f"checkpoint.dir={elsewhere}, but {checkpoints} holds the checkpoints of this run: leave it out, or move "
            f"that directory to {elsewhere} and make {checkpoints} a link to it"
        )
    if committed(elsewhere) and not known:
        return (
            f"checkpoint.dir={elsewhere} holds the checkpoints of another run: name another directory, or, if they are "
            f"this run's, make {checkpoints} a link to it"
        )
    return None


def make_tier(checkpoints: Path, elsewhere: Path | None, known: bool = False) -> None:
    """Make a directory behind `checkpoints`. Raises ValueError for a place that `tier_problem` refuses, OSError."""
    problem = tier_problem(checkpoints, elsewhere, known)
    if problem is not None:
        raise ValueError(problem)
    if elsewhere is None:
        checkpoints.mkdir(exist_ok=True)
        return
    elsewhere.mkdir(parents=True, exist_ok=True)
    if not checkpoints.is_symlink():
        discard(checkpoints)  # left by a start that never saved
        checkpoints.symlink_to(elsewhere)
