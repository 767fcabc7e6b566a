"""`stoker export --format dcp`: a checkpoint of torch.distributed.checkpoint with torchtitan's names and layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from stoker.launch.importing.torchtitan import permuted_heads, to_neighbours, torchtitan_name
from stoker.launch.tensor_files import Planned
from stoker.models.hugging_face_config import CONFIG
from stoker.models.hugging_face_weights import EMBEDDING, HEAD


def write_dcp(folder: Path, tensors: Mapping[str, Planned], read: Callable[[str], Tensor]) -> None:
    """Write `tensors`, by Hugging Face's names, to `folder`, which holds their config.json.

    `read` gives one by its name; one is in memory at a time. A tied head is written as a copy, which torchtitan's
    state dict has too. Raises ValueError for a model that torchtitan does not have.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    sources = {name: name for name in tensors}
    if config.get("tie_word_embeddings") and HEAD not in sources:
        sources[HEAD] = EMBEDDING
    heads = {torchtitan_name(name): permuted_heads(config, name) for name in sources}
    named = {torchtitan_name(name): source for name, source in sources.items()}

    def stored(name: str) -> Tensor:
        value, count = read(named[name]), heads[name]
        return (value if count is None else to_neighbours(value, count)).contiguous()

    state = {
        name: torch.empty(tensors[source].shape, dtype=tensors[source].dtype, device="meta")
        for name, source in named.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)  # as one process is what is meant
        writer = dcp.FileSystemWriter(folder)
        dcp.save(state, storage_writer=writer, planner=_ReadWhenWritten(stored), no_dist=True)


class _ReadWhenWritten(DefaultSavePlanner):
    """The state dict has shapes only: values are read when they are written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._read(write_item.index.fqn)
