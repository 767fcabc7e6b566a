"""The tensors of a model folder of Hugging Face's: those that transformers would read, and no others.

`model.safetensors` counts where it is there, else the files that `model.safetensors.index.json` names. Other
safetensors files of the folder (averages, optimizer states, another precision, a backup) are never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from stoker.models.hugging_face_config import in_one_line, read_json
from stoker.parallel.shards import Chunk

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMED = 5  # files or tensors that a message names
_COMPARED_ROWS = 4096  # of two matrices at a time


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file: its bytes are read on demand."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # by the format's names: F32, BF16, ...
    part: Any  # safetensors' slice

    def read(self, chunk: Chunk) -> Tensor:
        """Only the bytes of `chunk`, as far as rows go, in the file's dtype."""
        ranges = zip(chunk.offsets, chunk.sizes, strict=True)
        return self.part[tuple(slice(start, start + size) for start, size in ranges)]


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of `folder` by the names in its files, readable until the context ends.

    Raises ValueError, naming file and tensor, for a folder without such files, for a file that is missing or damaged,
    and for an index that does not fit its files.
    """
    from safetensors import SafetensorError, safe_open

    paths, index = _files_of(folder)
    found: dict[str, StoredTensor] = {}
    with ExitStack() as files:
        for path in paths:
            try:
                opened = files.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {in_one_line(error)}") from error
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if name in found:
                    raise ValueError(f"{path.name} and {found[name].file.name} both hold {name}")
                part = opened.get_slice(name)
                found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), part)
        if index is not None:
            compare_with_index(INDEX, index, found)
        # Old files hold tables of the rotary embedding, which transformers does not read either.
        yield {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_weights` reads: weights, and their index if there is one. Raises ValueError as it does."""
    paths, index = _files_of(folder)
    return paths if index is None else [*paths, folder / INDEX]


def has_own_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the head differs from the embedding: transformers then unties a model whose config ties them."""
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    return not is_copy(tensors[HEAD], tensors[EMBEDDING])


def is_copy(head: StoredTensor, embedding: StoredTensor) -> bool:
    """Whether two matrices hold the same numbers."""
    if head.shape != embedding.shape or len(head.shape) != 2:
        return False
    rows, width = head.shape
    for start in range(0, rows, _COMPARED_ROWS):
        block = Chunk((start, 0), (min(_COMPARED_ROWS, rows - start), width))
        if not torch.equal(head.read(block).float(), embedding.read(block).float()):
            return False
    return True


def _files_of(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files to read, and the index's file for each tensor where an index is used."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        seen = f"; {', '.join(others[:_NAMED])} are not read" if others else ""
        if not others and (any(folder.glob("*.bin")) or any(folder.glob("*.pth"))):
            seen = "; weights in pickles are not read, `stoker import` makes a folder of them"
        raise ValueError(f"it has neither {SINGLE} nor {INDEX}{seen}")
    index = indexed_files(folder, INDEX, ".safetensors")
    return sorted(set(index.values())), index


def indexed_files(folder: Path, name: str, suffix: str) -> dict[str, Path]:
    """The file of each tensor by the index `name` of `folder`, all of them there. `suffix` is that of their names.

    Raises ValueError, naming the index, for what is no index, for files elsewhere and for files that are missing.
    """
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{name} has no weight_map")
    index: dict[str, Path] = {}
    for tensor, file in weight_map.items():
        path = PurePosixPath(file) if isinstance(file, str) else PurePosixPath("/")
        if path.is_absolute() or ".." in path.parts or path.suffix != suffix:
            raise ValueError(f"{name}: the file of {tensor} is {file!r}: not a {suffix} file of this folder")
        index[tensor] = folder / path
    missing = [path.name for path in sorted(set(index.values())) if not path.is_file()]
    if missing:
        raise ValueError(f"{name} names {', '.join(missing[:_NAMED])}, not there")
    return index


class InFile(Protocol):
    @property
    def file(self) -> Path: ...


def compare_with_index(title: str, index: Mapping[str, Path], found: Mapping[str, InFile]) -> None:
    """Raises ValueError, naming the index by `title`, if the tensors `found` in files are not those that it lists."""
    problems = [f"{name} is not in {path.name}" for name, path in index.items() if name not in found]
    problems += [
        f"{name} is in {found[name].file.name}, not in {path.name}"
        for name, path in index.items()
        if name in found and found[name].file != path
    ]
    problems += [f"{name} of {tensor.file.name} is not listed" for name, tensor in found.items() if name not in index]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{title} does not fit its files: {'; '.join(sorted(problems)[:_NAMED])}{more}")
