"""A foreign checkpoint, opened: its tensors under Hugging Face's names, and what its own code computes from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stoker.models import hugging_face_config as theirs
from stoker.parallel.dtypes import DTYPE_NAMES, DTYPES
from stoker.parallel.shards import Chunk, whole
from stoker.parallel.suggestions import shortened


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source: `load` reads it, and `part` a chunk of it where that takes less.

    `dtype` is by the names of safetensors.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]
    part: Callable[[Chunk], Tensor] | None = None

    def read(self, chunk: Chunk) -> Tensor:
        return self.load()[chunk.within(whole(self.shape))] if self.part is None else self.part(chunk)

    def made(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> SourceTensor:
        """The tensor of `shape` that `change` makes of this one."""
        return SourceTensor(self.file, shape, self.dtype, lambda: change(self.load()))


@dataclass(frozen=True)
class Moments:
    """AdamW's state in a source.

    `tensors` has, for each of `stoker.trainer.pretrained_moments.MOMENTS`, tensors by Hugging Face's names of weights.
    `step` counts the updates that made them.
    """

    step: int
    tensors: Mapping[str, Mapping[str, SourceTensor]]


@contextmanager
def reading_moments() -> Iterator[None]:
    """ValueErrors inside end with the advice to import the model alone."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (--no-optimizer leaves AdamW's moments out)") from error


@dataclass(frozen=True)
class Source:
    """A checkpoint to import.

    `config` is a config.json of Hugging Face's, `tensors` has its names. `name_of` gives the source's own name of one.
    `logits(parsed, tokens)` computes logits `[tokens, vocab]` in float32 by the source's own rules from its own
    tensors; `parsed` is transformers' config object. `copies` counts the models in memory that this takes.
    """

    what: str
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    name_of: Callable[[str], str]
    logits: Callable[[Any, Tensor], Tensor]
    copies: int = 0
    left_out: tuple[str, ...] = ()  # what the source holds beside the model
    moments: Moments | None = None


def with_moments(
    source: Source, found: Moments | None, convert: Callable[[Mapping[str, SourceTensor]], Source]
) -> Source:
    """`source` with its moments by Hugging Face's names. `found` has them by the source's own, as `convert` takes them.

    Moments are converted as weights are: values only change their places. They are left out where that fails, such as
    for names that no weight has.
    """
    if found is None:
        return source
    try:
        tensors = {key: convert(held).tensors for key, held in found.tensors.items()}
    except ValueError as error:
        return dataclasses.replace(source, left_out=(*source.left_out, f"optimizer ({error})"))
    return dataclasses.replace(source, moments=Moments(found.step, tensors))


def of_tensor(file: Path, tensor: Tensor) -> SourceTensor:
    """A tensor in memory, or mapped into it."""
    value = tensor.detach()
    return SourceTensor(file, tuple(value.shape), DTYPE_NAMES[value.dtype], lambda: value)


def config_of(folder: Path, given: str | None) -> dict[str, Any]:
    """The values of `given`, a config.json or its folder, else of the config.json in `folder`. Raises ValueError."""
    path = Path(given).expanduser() if given is not None else folder
    path = path / theirs.CONFIG if path.is_dir() else path
    if given is None and not path.is_file():
        raise ValueError(f"{folder} has no {theirs.CONFIG}: --config FILE gives one of Hugging Face's for this model")
    values = theirs.read_json(path)
    theirs.refuse_leading_away(values)
    return values


def without_tables(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Without tables of rotary embeddings, which old files hold and no model reads."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(("rotary_emb.inv_freq", "freqs_cis"))}


def refuse_unknown(what: str, names: Iterable[str]) -> None:
    """Raises ValueError if there are tensors that a format does not have."""
    unknown = sorted(names)
    if unknown:
        raise ValueError(f"{shortened(unknown, 5)}: {what} has no such tensor")


def floating(tensors: Mapping[str, SourceTensor]) -> str | None:
    """The dtype of all floating-point tensors, as config.json names it; None where they differ."""
    kinds = {DTYPES[tensor.dtype] for tensor in tensors.values() if DTYPES[tensor.dtype].is_floating_point}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None
