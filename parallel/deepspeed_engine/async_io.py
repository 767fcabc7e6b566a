"""DeepSpeed's asynchronous IO: an extension over libaio, compiled at first use. That takes minutes and prints nothing.

python -m stoker.parallel.deepspeed_engine.async_io    # compiles it beforehand
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)

PACKAGES = "libaio-dev (Debian, Ubuntu), libaio-devel (Fedora, RHEL) or libaio (conda-forge)"
READY = "ready"
PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"


def missing_for_async_io() -> str | None:
    """The missing requirement of the build on this machine, with the package to install; None if nothing is missing."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}): install g++"
    flags = [*os.environ.get("CFLAGS", "").split(), *os.environ.get("LDFLAGS", "").split()]
    command = [compiler, "-x", "c++", "-", *flags, "-o", os.devnull, "-laio"]
    tried = subprocess.run(command, input=PROGRAM, text=True, capture_output=True, check=False)
    return f"no libaio: install {PACKAGES}" if tried.returncode else None


def folder() -> Path:
    """Where it is compiled: a folder for each environment, because what it was compiled against is part of it."""
    found = importlib.util.find_spec("deepspeed")
    where = f"{found.origin if found else None} {importlib.metadata.version('torch')} {sys.version}"
    key = hashlib.sha256(where.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "stoker" / "extensions")
    return root if root.name == key else root / key


def is_built() -> bool:
    """Whether it has been compiled to the end."""
    return (folder() / READY).exists()


def load_async_io(announce: bool) -> None:
    """Load the extension; compile it first if this environment has none. `announce`: log a line before and after."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    place, announce = folder(), announce and not is_built()
    place.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(place)  # for DeepSpeed, which loads it again
    if announce:
        log.warning("building DeepSpeed's async IO, once for this environment: some minutes")
    began = time.monotonic()
    with open(place / "flock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it when a process is killed
        for left_behind in place.glob("**/lock"):  # a killed build leaves torch's lock, on which torch would wait
            left_behind.unlink(missing_ok=True)
        AsyncIOBuilder().load(verbose=False)
        (place / READY).touch()
    if announce:
        log.warning("DeepSpeed's async IO was built in %.0f s", time.monotonic() - began)


def main() -> int:
    missing = missing_for_async_io()
    if missing is not None:
        print(f"stoker: DeepSpeed's async IO cannot be built here, {missing}", file=sys.stderr)
        return 1
    logging.basicConfig(format="stoker: %(message)s")
    load_async_io(announce=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
