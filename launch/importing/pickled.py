"""Files that hold pickles: the only module of Stoker that reads any.

Tensors are read by torch's own restricted unpickler (`weights_only=True`), which makes tensors and containers and
nothing else; objects of a few known names become records without behaviour. The description of a checkpoint of
torch.distributed.checkpoint is read by `_Described`, which makes such records only. Anything else in a pickle is
refused by name, unless the user trusts the source.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.models.hugging_face_config import in_one_line
from stoker.parallel.dtypes import DTYPE_NAMES
from stoker.parallel.suggestions import shortened

MOST_PICKLE_BYTES = 64 << 20  # of the part of a file that describes its tensors
_UNKNOWN = re.compile(r"(?:GLOBAL|unsupported class|unrecognized function) (\S+)")  # in torch's refusals
_CONTAINERS = ("model", "state_dict", "module")  # of a checkpoint that holds more than a model
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


def tensors_of(path: Path, trust: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file of `torch.save` by name, mapped into memory, and the names of what else it holds.

    Raises ValueError, naming the file, for one that is damaged, that holds no dict of tensors, or, without `trust`,
    whose pickle needs more than tensors.
    """
    refuse_packed(path)
    held = _loaded(path, path, trust, mapped=zipfile.is_zipfile(path))
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds {_kind(held)}, not tensors by name")
    inner = next((key for key in _CONTAINERS if isinstance(held.get(key), dict)), None)
    others: list[str] = []
    if inner is not None:
        others = [str(key) for key in held if key != inner]
        held = held[inner]
    wrong = [f"{str(name)[:80]} is {_kind(value)}" for name, value in held.items() if not _is_named(name, value)]
    if wrong or not held:
        raise ValueError(f"{path} holds no tensors by name: {shortened(wrong, 1) or 'it is empty'}")
    for name, tensor in held.items():
        refuse_strange(path, name, tensor)
    return held, others


def held_in(path: Path, trust: bool, known: re.Pattern[str]) -> Any:
    """What a file of `torch.save` holds, tensors mapped into memory; classes of `known` names are `Record`s.

    Raises ValueError, naming the file, for one that is damaged, or, without `trust`, whose pickle needs more.
    """
    refuse_packed(path)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except OSError:
        raise
    except Exception:  # of many kinds: reading it is refused below
        named = []
    records: list[Any] = [(type(name, (Record,), {}), name) for name in named if known.fullmatch(name)]
    with torch.serialization.safe_globals(records):
        # Trust is for what is no record: the classes of these need not be installed.
        return _loaded(path, path, trust and len(records) < len(named), mapped=zipfile.is_zipfile(path))


def tensor_in(path: Path, name: str, offset: int, length: int) -> Tensor:
    """The tensor that `torch.save` wrote to bytes `offset` to `offset + length` of a file. Raises ValueError with both
    and with `name`."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    place = f"{path}: {name} in bytes {offset} to {offset + length}"
    if len(data) != length:
        raise ValueError(f"{place}: the file ends before that: it is cut short")
    refuse_packed(io.BytesIO(data), place)
    tensor = _loaded(io.BytesIO(data), place, trust=False)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{place}: this is {_kind(tensor)}, not a tensor")
    refuse_strange(place, "the tensor", tensor)
    return tensor


def description(path: Path) -> Any:
    """What `.metadata` of torch.distributed.checkpoint holds, as `Record`s. Raises ValueError naming the file."""
    data = _read_small(path)
    try:
        return _Described(io.BytesIO(data)).load()
    except _Refused as error:
        raise ValueError(f"{path} holds {error}, which describes no tensors: it is never unpickled") from None
    except Exception as error:  # of many kinds: the bytes may be anything
        raise ValueError(f"{path} is damaged: {in_one_line(error)}") from error


class Record:
    """An object of a pickle: the arguments that made it in `made_of`, its state in attributes or in `state`."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            self.__dict__.update(state)
        else:
            self.state = state


class _Refused(ValueError):
    pass


class _Described(pickle.Unpickler):
    """Makes a `Record` for each class that a description may name, and nothing for others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name in _RECORDS.get(module, ()):
            return type(name, (Record,), {})
        raise _Refused(f"{module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to another file")


def refuse_packed(file: Path | io.BytesIO, place: object = None) -> None:
    """Raises ValueError for a zip file whose parts are compressed, or describe more than a model: torch writes none."""
    place = place or file
    if not zipfile.is_zipfile(file):
        return  # the format before torch 1.6, or no file of torch.save: torch judges it
    try:
        with zipfile.ZipFile(file) as held:
            for part in held.infolist():
                if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
                    raise ValueError(
                        f"{place}: its part {part.filename[:80]!r} is compressed: torch.save wrote no such"
                    )
                if part.filename.endswith(".pkl") and part.file_size > MOST_PICKLE_BYTES:
                    raise ValueError(
                        f"{place}: its pickle has {part.file_size:,} bytes; at most {MOST_PICKLE_BYTES:,} are read"
                    )
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{place} is damaged or cut short: {in_one_line(error)}") from error


def refuse_strange(place: object, name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that is not a plain one: quantised, sparse, or repeating its memory."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"{place}: {name} is not a plain tensor but {_kind(tensor)} ({tensor.layout})")
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{place}: {name} is {tensor.dtype}: quantised weights are not read")
    if tensor.device.type != "meta" and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{place}: {name} of shape {tuple(tensor.shape)} repeats numbers: save it by .contiguous()")


def _loaded(file: Path | io.BytesIO, place: object, trust: bool, mapped: bool = False) -> Any:
    load: Callable[..., Any] = torch.load
    try:
        return load(file, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = _UNKNOWN.search(str(error))
        if found is None or trust:
            raise ValueError(f"{place} is damaged, or no file of torch.save: {_cause(error)}") from None
        raise ValueError(
            f"{place} holds more than tensors ({found[1][:200]}), and unpickling that can run any code: --trust "
            "unpickles it"
        ) from None
    except OSError:
        raise
    except Exception as error:  # of many kinds: the bytes may be anything
        raise ValueError(f"{place} is damaged or cut short: {in_one_line(error)}") from error


def _cause(error: Exception) -> str:
    """The part of torch's message that is about the file, without its advice."""
    text = " ".join(str(error).split())
    return (
        text.rpartition("WeightsUnpickler error:")[2].strip().partition(" Check the documentation")[0][:200]
        or text[:200]
    )


def _read_small(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MOST_PICKLE_BYTES + 1)
    if len(data) > MOST_PICKLE_BYTES:
        raise ValueError(f"{path} has more than {MOST_PICKLE_BYTES:,} bytes: it is no description of a checkpoint")
    return data


def _is_named(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _kind(value: Any) -> str:
    return type(value).__name__
