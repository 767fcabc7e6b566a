"""`stoker export`: a checkpoint as a directory that Hugging Face's libraries load."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch import Tensor

from stoker.checkpoint import DamagedCheckpoint, open_checkpoint, read_tensors
from stoker.conf.schema import ModelConfig
from stoker.conf.values import ConfigError
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.launch.model_files import export_dtype, model_files
from stoker.launch.tensor_files import Planned, TensorWriter, index_json, plan_files
from stoker.launch.train import say
from stoker.models.family import family_of
from stoker.parallel.dtypes import DTYPES, PRECISIONS
from stoker.parallel.shards import BUFFER, PARAMETER
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.trust import DATA, MODEL, trusted_config

_SIZE = re.compile(r"(\d+)\s*(KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(options: argparse.Namespace) -> int:
    """Write the directory `options.out`, whole or not at all. Raises ValueError for a run that cannot be exported."""
    run = run_at(options.run)
    summary = checkpoints_of(run, options.step)[-1]
    if summary.problem is not None:
        raise ValueError(f"{summary.path}: {summary.problem}; --step takes another checkpoint")
    config = with_vocabulary(trusted_config(run, options.trust, (MODEL, DATA), say), run.tokenizer)
    dtype = options.dtype or export_dtype(run)
    if config.model.init_from is not None and not run.base_model.is_dir():
        say(f"{run.base_model} does not exist: new files are made instead of those of {config.model.init_from}")
    file_bytes = _bytes(options.shard_size)
    out = Path(options.out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory: name another")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    try:
        for name, content in model_files(run, config, dtype).items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_bytes(content)
        _write_weights(unfinished, summary.path, dtype, file_bytes, config.model)
        unfinished.rename(out)  # replaces at most an empty directory
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; --step takes another checkpoint") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"step {summary.step} as {dtype} in {out}")
    return 0


def _write_weights(folder: Path, checkpoint: Path, dtype: str, file_bytes: int, model: ModelConfig) -> None:
    """The parameters in `dtype` and the persistent buffers in their own, in the form of the model's family.

    What becomes tensors of the folder together is in memory at a time. Raises DamagedCheckpoint.
    """
    stored = open_checkpoint(checkpoint).tensors.values()
    theirs = PRECISIONS[dtype]
    parameters = {tensor.name: Planned(tensor.shape, theirs) for tensor in stored if tensor.kind == PARAMETER}
    buffers = {tensor.name: Planned(tensor.shape, DTYPES[tensor.dtype]) for tensor in stored if tensor.kind == BUFFER}
    tensors = parameters | buffers
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    groups = {name: group for group in family_of(model).exported(model, shapes) for name in group.names}
    planned = {
        file: Planned(shape, tensors[group.names[0]].dtype)
        for group in {id(group): group for group in groups.values()}.values()
        for file, shape in group.files.items()
    }
    files = plan_files(planned, file_bytes)
    waiting: dict[str, Tensor] = {}
    console = Console(stderr=True)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        TensorWriter(folder, files) as writer,
    ):
        task = progress.add_task("weights", total=sum(file.data_bytes for file in files))
        for name, value in itertools.chain(read_tensors(checkpoint), read_tensors(checkpoint, BUFFER)):
            waiting[name] = value.to(tensors[name].dtype)
            group = groups[name]
            if all(name in waiting for name in group.names):
                for file, part in group.convert([waiting.pop(name) for name in group.names]).items():
                    progress.advance(task, writer.write(file, part.contiguous()))
    if len(files) > 1:
        count = sum(math.prod(tensor.shape) for tensor in parameters.values())
        index = json.dumps(index_json(files, count), indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _bytes(size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(f"--shard-size={size}: expected a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]
