"""Weights to begin with: `model.init_from` names a directory of Hugging Face's or a run's.

Its shape becomes the run's model; each rank then reads the slices that it holds and nothing else. It is read at a
start that finds no checkpoint; from then on the run's own checkpoints are what it goes on from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.checkpoint import Summary, describe, load, open_checkpoint
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config, ModelConfig, from_dict, kinds, lookup, to_dict
from stoker.conf.values import ConfigError
from stoker.models.hugging_face import shape_of, tensor_name
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER, Chunk, Shard
from stoker.trainer.parallelize import build_on_meta

log = logging.getLogger(__name__)

_FLOATS = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
_NAMED = 5  # tensors that a message names
_OURS_ALONE = ("model.init_from", "model.init_only", "model.loss_chunk")  # of a run: not of its model's shape


def adopt_shape(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with the model's shape taken from `model.init_from`, but for what `overrides` say key by key.

    Raises ConfigError for a directory that is neither kind, or holds a model that ours is not.
    """
    assert config.model.init_from is not None
    folder = Path(config.model.init_from).expanduser()
    try:
        found = _run_shape(folder) if _is_run(folder) else _their_shape(folder, config.seq_len)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.init_from={folder}: {error}") from error
    given = {override.key for override in map(parse, overrides)}
    values = to_dict(config)
    for key, value in found.items():
        if key not in given:
            *path, name = key.split(".")
            node = values
            for part in path:
                node = node[part]
            node[name] = value
    return from_dict(values)


def load_pretrained(config: Config, shards: Sequence[Shard]) -> None:
    """Fill the parameters among `shards` from `model.init_from`.

    Raises ValueError naming tensors that are missing, too many, of another shape, or no floating-point numbers. With
    `model.init_only` the parameters whose name fits none of its patterns stay as they are, and nothing is too many.
    """
    assert config.model.init_from is not None
    folder = Path(config.model.init_from).expanduser()
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    names = [name for name, _ in whole.named_parameters()]
    patterns = config.model.init_only or ["*"]
    wanted = {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}
    if not wanted:
        raise ValueError(f"model.init_only={patterns} fits no parameter, such as {names[0]}")
    mine = [shard for shard in shards if shard.kind == PARAMETER and shard.name in wanted]
    with _open(folder, config.model, names) as source:
        foreign = [] if config.model.init_only else sorted(set(source.shapes) - wanted)
        problems = [f"{name} is missing" for name in sorted(wanted - set(source.shapes))]
        problems += [f"{name} is not in this model" for name in foreign]
        problems += [
            f"{shard.name} has shape {source.shapes[shard.name]}, the model's has {tuple(shard.shape)}"
            for shard in sorted(mine, key=lambda shard: shard.name)
            if source.shapes.get(shard.name, tuple(shard.shape)) != tuple(shard.shape)
        ]
        if problems:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise ValueError(f"model.init_from={folder}: {'; '.join(problems[:_NAMED])}{more}")
        source.fill(mine)
    log.info("initial weights: %d of %d parameters from %s", len(wanted), len(names), folder)


@dataclass(frozen=True)
class _Source:
    """Tensors by our names, and how to fill shards from them."""

    shapes: dict[str, tuple[int, ...]]
    fill: Callable[[Sequence[Shard]], object]


@contextmanager
def _open(folder: Path, model: ModelConfig, names: Sequence[str]) -> Iterator[_Source]:
    if _is_run(folder):
        stored = open_checkpoint(_newest(folder).path)
        shapes = {name: tensor.shape for (kind, name), tensor in stored.tensors.items() if kind == PARAMETER}
        yield _Source(shapes, lambda shards: load(stored, shards))
        return
    with ExitStack() as files:
        yield _their_source(folder, model, names, files)


def _is_run(folder: Path) -> bool:
    return RunDirectory(folder).checkpoints.is_dir()


def _newest(folder: Path) -> Summary:
    sound = [summary for summary in describe(RunDirectory(folder).checkpoints) if summary.problem is None]
    if not sound:
        raise ValueError("this run has no valid checkpoint")
    return sound[-1]


def _run_shape(folder: Path) -> dict[str, Any]:
    _newest(folder)
    stored = read_config(RunDirectory(folder))
    keys = [key for key, kind in kinds().items() if key.startswith("model.") and kind == "fixed"]
    return {key: lookup(stored, key) for key in keys if key not in _OURS_ALONE}


def _their_shape(folder: Path, seq_len: int) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError("no config.json and no checkpoints: neither a Hugging Face model nor a run")
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("config.json holds no object")
    return {f"model.{key}": value for key, value in shape_of(values, seq_len).items()}


def _their_source(folder: Path, model: ModelConfig, names: Sequence[str], files: ExitStack) -> _Source:
    """The safetensors files of `folder`, open until `files` closes. A user's own model has its own names there."""
    from safetensors import SafetensorError, safe_open

    built_in = model.target == ModelConfig().target
    ours = {tensor_name(name) if built_in else name: name for name in names}
    tensors: dict[str, Any] = {}  # slices by our name
    for path in _safetensors(folder):
        try:
            opened = files.enter_context(safe_open(path, "pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.tie_word_embeddings):
                continue  # made anew, and the embedding once more
            part = opened.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise ValueError(f"{path}: {name} is {part.get_dtype()}: quantised weights are not read")
            tensors[ours.get(name, name)] = part

    def fill(shards: Sequence[Shard]) -> None:
        with torch.no_grad():
            for shard in shards:
                if shard.data.numel():
                    shard.data.detach().copy_(_part(tensors[shard.name], shard.chunk))

    return _Source({name: tuple(part.get_shape()) for name, part in tensors.items()}, fill)


def _part(tensor: Any, chunk: Chunk) -> Tensor:
    """Only the bytes of `chunk`, as far as rows go."""
    return tensor[tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))]


def _safetensors(folder: Path) -> list[Path]:
    """The weights of `folder`. Raises ValueError when there are none, or one that its index names is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found = [folder / name for name in named]
    else:
        found = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"model.init_from={folder}: {index.name} names {', '.join(missing[:_NAMED])}, not there")
    if not found:
        raise ValueError(f"model.init_from={folder}: no .safetensors file; weights in pickles are not read")
    return found
