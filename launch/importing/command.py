"""`stoker import SOURCE OUT`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stoker.conf.values import ConfigError
from stoker.launch.importing import hugging_face_bin, litgpt
from stoker.launch.importing.agreement import compare_logits, fitting, moments_fitting
from stoker.launch.importing.deepspeed_folder import is_deepspeed, open_deepspeed
from stoker.launch.importing.distributed_checkpoint import METADATA, open_dcp
from stoker.launch.importing.megatron import is_megatron, open_megatron
from stoker.launch.importing.megatron_dist import is_torch_dist, open_torch_dist
from stoker.launch.importing.source import Moments, Source, SourceTensor, floating, reading_moments
from stoker.launch.tensor_files import Planned, TensorWriter, file_bytes_of, index_json, made_whole, plan_files
from stoker.launch.train import say
from stoker.models import hugging_face_config as theirs
from stoker.models.hugging_face_weights import INDEX, SINGLE
from stoker.parallel.dtypes import DTYPES
from stoker.trainer.base_model import GENERATION, files_of_tokenizer
from stoker.trainer.pretrained_moments import STEP, counts_file, moments_folder

_FORMATS = (
    "pytorch_model.bin, lit_model.pth (litgpt), .metadata (torch DCP), zero_* files (DeepSpeed) or mp_rank_* folders "
    "(Megatron)"
)


def import_checkpoint(options: argparse.Namespace) -> int:
    """Write the folder `options.out`, whole or not at all.

    Raises ValueError, naming the file, for a source that is damaged, holds more than tensors, or is not the model of
    its config; ConfigError for wrong arguments.
    """
    folder = Path(options.source).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no directory: a checkpoint is imported by its folder")
    file_bytes = file_bytes_of(options.shard_size)
    with made_whole(options.out) as unfinished:
        source = _opened(folder, options.config, options.trust, not options.no_optimizer)
        _write_beside(folder, source, unfinished)
        with _naming(folder):
            tensors = fitting(source, unfinished)
        _write_weights(tensors, unfinished, file_bytes)
        with _naming(folder):
            proof = compare_logits(source, unfinished)
        with reading_moments(), _naming(folder):
            moments, left_out = _moments(source)
            if moments is not None:
                _write_moments(moments, unfinished, file_bytes)
    more = "" if moments is None else f", AdamW's moments after {moments.step} updates"
    beside = f"; not imported: {', '.join(left_out)}" if left_out else ""
    say(f"{source.what} in {options.out}: {len(tensors)} tensors, {proof}{more}{beside}")
    return 0


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """ValueErrors inside begin with the source's folder, or with a file of it."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{folder}/"):
            raise
        raise ValueError(f"{folder}: {error}") from error


def _opened(folder: Path, config: str | None, trust: bool, moments: bool) -> Source:
    """The source in `folder`, by the files that are there; with `moments` if it has them and they are wanted."""
    if (folder / litgpt.WEIGHTS).is_file():
        if config is not None:
            raise ConfigError(f"--config: {litgpt.CONFIG} describes a model of litgpt: leave --config out")
        return litgpt.open_litgpt(folder, trust)
    if is_torch_dist(folder):
        return open_torch_dist(folder, config, trust)
    if is_megatron(folder):
        return open_megatron(folder, config, trust)
    if (folder / METADATA).is_file():
        return open_dcp(folder, config, moments)
    if is_deepspeed(folder):
        return open_deepspeed(folder, config, trust, moments)
    if any((folder / name).is_file() for name in (hugging_face_bin.SINGLE, hugging_face_bin.INDEX)):
        return hugging_face_bin.open_bin(folder, config, trust)
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise ConfigError(f"{folder} needs no import: model.init_from={folder} reads its safetensors")
    raise ConfigError(f"{folder} has none of the files that are imported: {_FORMATS}")


def _write_beside(folder: Path, source: Source, out: Path) -> None:
    """Everything but the weights: config.json, and what the source has of a tokenizer and of generation."""
    values: dict[str, Any] = dict(source.config)
    dtype = floating(source.tensors)
    if dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]:
            values[key] = dtype
    (out / theirs.CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    generation = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    for path in [*generation, *files_of_tokenizer(folder)]:
        target = out / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())


def _moments(source: Source) -> tuple[Moments | None, list[str]]:
    """The moments to write, and what else of the source is left out."""
    if source.moments is None:
        return None, list(source.left_out)
    found = moments_fitting(source.config, source.moments)
    if isinstance(found, str):
        return None, [*source.left_out, f"optimizer ({found})"]
    return found, list(source.left_out)


def _write_moments(moments: Moments, out: Path, file_bytes: int) -> None:
    folder = moments_folder(out)
    for key, tensors in moments.tensors.items():
        (folder / key).mkdir(parents=True)
        _write_weights(tensors, folder / key, file_bytes)
    counts_file(folder).write_text(json.dumps({STEP: moments.step}) + "\n", encoding="utf-8")


def _write_weights(tensors: Mapping[str, SourceTensor], folder: Path, file_bytes: int) -> None:
    """One tensor is in memory at a time, or what the source reads for it."""
    planned = {name: Planned(tensor.shape, DTYPES[tensor.dtype]) for name, tensor in tensors.items()}
    files = plan_files(planned, file_bytes)
    with TensorWriter(folder, files) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.load())
    if len(files) > 1:
        count = sum(math.prod(tensor.shape) for tensor in tensors.values())
        (folder / INDEX).write_text(json.dumps(index_json(files, count), indent=2) + "\n", encoding="utf-8")
