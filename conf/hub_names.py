"""Names of the Hugging Face hub where a path is expected. Nothing is downloaded at run time: a command does that."""

from __future__ import annotations

import re
from pathlib import Path

_PART = r"[A-Za-z0-9][\w.-]*"


def download_advice(path: Path, what: str) -> str:
    """What to add to the message that `path` is not there, where it may be a name of the hub; "" where it cannot be.

    `what` is `dataset` or `model`. Paths of a config are absolute: what was typed is taken from the working directory.
    """
    try:
        name = path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        name = path.as_posix()
    owned = re.fullmatch(f"{_PART}/{_PART}", name)
    if not owned and not (what == "model" and re.fullmatch(_PART, name)):
        return ""
    kind = "" if what == "model" else " --repo-type dataset"
    return f"; a name of the Hugging Face hub is downloaded by `hf download {name}{kind} --local-dir {name}` first"
