"""`stoker export`: a checkpoint as a directory that Hugging Face's libraries load."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from stoker.checkpoint import DamagedCheckpoint, open_checkpoint, read_tensors
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config, ModelConfig
from stoker.data import open_tokenizer
from stoker.data.hugging_face import tokenizer_files
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.launch.tensor_files import TensorWriter, index_json, plan_files
from stoker.models.hugging_face import config_json, tensor_name
from stoker.parallel.dtypes import DTYPE_NAMES, PRECISIONS
from stoker.parallel.shards import PARAMETER
from stoker.trainer.assemble import with_vocabulary

_SIZE = re.compile(r"(\d+)\s*(KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(options: argparse.Namespace) -> int:
    """Write the directory `options.out`, whole or not at all. Raises ValueError for what cannot be exported so."""
    run = run_at(options.run)
    summary = checkpoints_of(run, options.step)[-1]
    if summary.problem is not None:
        raise ValueError(f"{summary.path}: {summary.problem}; --step takes another checkpoint")
    config = with_vocabulary(read_config(run), run.tokenizer)
    if config.model.target != ModelConfig().target:
        raise ValueError(f"model.target={config.model.target} is a model of your own: Hugging Face has no class for it")
    file_bytes = _bytes(options.shard_size)
    out = Path(options.out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: name another")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    try:
        _write_words(unfinished, run, config, options.dtype)
        _write_weights(unfinished, summary.path, options.dtype, file_bytes)
        unfinished.rename(out)  # onto nothing, or onto an empty directory
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; --step takes another checkpoint") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"stoker: step {summary.step} as {options.dtype} in {out}", file=sys.stderr)
    return 0


def _write_words(folder: Path, run: RunDirectory, config: Config, dtype: str) -> None:
    """All that is not weights."""
    tokenizer = open_tokenizer(config.data, run.tokenizer)
    scaling = config.model.rope_scaling
    extended = round(scaling.original_context * scaling.factor) if scaling.factor != 1 else 0
    context = max(config.seq_len, extended)
    _write_json(folder / "config.json", config_json(config.model, dtype, context, tokenizer.end_of_document))
    _write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.end_of_document, "do_sample": True})
    for name, text in tokenizer_files(tokenizer, context).items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_weights(folder: Path, checkpoint: Path, dtype: str, file_bytes: int) -> None:
    """The parameters, one in memory at a time. Raises DamagedCheckpoint."""
    stored = open_checkpoint(checkpoint).tensors.values()
    shapes = {tensor_name(tensor.name): tensor.shape for tensor in stored if tensor.kind == PARAMETER}
    theirs = PRECISIONS[dtype]
    files = plan_files(shapes, DTYPE_NAMES[theirs], theirs.itemsize, file_bytes)
    console = Console(stderr=True)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        TensorWriter(folder, files) as writer,
    ):
        task = progress.add_task("weights", total=sum(file.data_bytes for file in files))
        for name, value in read_tensors(checkpoint):
            progress.advance(task, writer.write(tensor_name(name), value.to(theirs)))
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", index_json(files))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _bytes(size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"--shard-size={size}: expected a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]
