"""The default source: the Python standard library's own .py files, found on every machine (12 MB, about 730 files)."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from stoker.conf.schema import DataConfig
from stoker.data.documents import Document, file_documents

_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
# Written at build or installation: two machines with one Python version must have the same texts.
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")


def open_source(config: DataConfig) -> list[Document]:
    """The standard library of the running Python without its tests, sorted by path. Raises ValueError without any."""
    if config.path is not None:
        raise ValueError(f"data=stdlib reads no data.path={config.path}: use data=text data.path={config.path}")
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _FOREIGN_FOLDERS | _TEST_FOLDERS
    documents = file_documents(
        root,
        keep_folder=lambda name: name not in skipped,
        keep_file=lambda name: name.endswith(".py") and not name.startswith(_MACHINE_FILES),
    )
    if not documents:
        raise ValueError(f"this Python has no .py files in {root}: use data=text data.path=FOLDER")
    return documents
