"""`stoker export`: a checkpoint as a directory that Hugging Face's libraries, or torchtitan, load."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch import Tensor

from stoker.checkpoint import DamagedCheckpoint, TensorReader, open_checkpoint, read_tensors
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.export_adapter import merged, write_adapter
from stoker.launch.export_gguf import refuse_without_gguf, write_gguf
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.launch.model_files import export_dtype, model_files
from stoker.launch.tensor_files import Planned, TensorWriter, file_bytes_of, index_json, made_whole, plan_files
from stoker.launch.train import say
from stoker.models.family import Exported, family_of
from stoker.parallel.average import AVERAGE
from stoker.parallel.dtypes import DTYPES, PRECISIONS
from stoker.parallel.shards import BUFFER, PARAMETER
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.trust import DATA, MODEL, trusted_config

AVERAGED = f"optim.{AVERAGE}"  # the kind of tensors of the average of the weights


def export(options: argparse.Namespace) -> int:
    """Write the directory `options.out`, whole or not at all. Raises ValueError for a run that cannot be exported."""
    run = run_at(options.run)
    summary = checkpoints_of(run, options.step)[-1]
    if summary.problem is not None:
        raise ValueError(f"{summary.path}: {summary.problem}; --step takes another checkpoint")
    config = with_vocabulary(trusted_config(run, options.trust, (MODEL, DATA), say), run.tokenizer)
    adapted = config.adapter.name != "none"
    if options.merge and not adapted:
        raise ConfigError(f"--merge: {run.path} has no adapter to merge: leave --merge out")
    if options.ema and (config.optim.ema is None or adapted):
        why = "has an adapter, whose average is not exported" if adapted else "keeps no average (optim.ema)"
        raise ConfigError(f"--ema: {run.path} {why}: leave --ema out")
    kind = AVERAGED if options.ema else PARAMETER
    alone = adapted and not options.merge
    if alone and options.format != "hf":
        raise ConfigError(f"--format {options.format} writes whole models: --merge adds the adapter to its base")
    if options.format == "gguf":
        refuse_without_gguf()
    dtype = options.dtype or ("fp32" if alone else export_dtype(run))
    if config.model.init_from is not None and not run.base_model.is_dir() and not alone:
        say(f"{run.base_model} does not exist: new files are made instead of those of {config.model.init_from}")
    file_bytes = file_bytes_of(options.shard_size)
    try:
        with made_whole(options.out) as unfinished:
            if alone:
                write_adapter(unfinished, summary.path, config, dtype)
            else:
                for name, content in model_files(run, config, dtype).items():
                    (unfinished / name).parent.mkdir(exist_ok=True)
                    (unfinished / name).write_bytes(content)
                if options.format != "hf":
                    _write_converted(unfinished, summary.path, config, dtype, kind, options.format)
                else:
                    _write_weights(unfinished, summary.path, config, dtype, file_bytes, kind)
    except DamagedCheckpoint as error:
        raise ValueError(f"{error}; --step takes another checkpoint") from error
    say(f"step {summary.step} as {dtype} in {Path(options.out).expanduser().absolute()}")
    return 0


def _write_converted(folder: Path, checkpoint: Path, config: Config, dtype: str, kind: str, form: str) -> None:
    """Raises DamagedCheckpoint, and ValueError for a model that torchtitan, or llama.cpp, does not have."""
    with _opened(checkpoint, config, kind) as (shapes, read):
        planned: dict[str, Planned] = {}
        groups: dict[str, Exported] = {}
        for group in family_of(config.model).exported(config.model, shapes):
            for file, shape in group.files.items():
                planned[file], groups[file] = Planned(shape, PRECISIONS[dtype]), group

        def converted(file: str) -> Tensor:
            return groups[file].convert([read(name).to(PRECISIONS[dtype]) for name in groups[file].names])[file]

        if form == "gguf":
            write_gguf(folder, planned, converted, dtype)
            return
        from stoker.launch.export_dcp import write_dcp

        write_dcp(folder, planned, converted)


@contextmanager
def _opened(
    checkpoint: Path, config: Config, kind: str
) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """The shapes of the whole model's parameters, and a function that reads one."""
    with _whole(checkpoint, kind) if config.adapter.name == "none" else merged(checkpoint, config) as opened:
        yield opened


@contextmanager
def _whole(checkpoint: Path, kind: str) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """The shapes of a checkpoint's parameters, and a function that reads one: its `kind`, where it has one."""
    with TensorReader(checkpoint) as reader:
        tensors = reader.stored.tensors

        def read(name: str) -> Tensor:
            return reader.read(name, kind if (kind, name) in tensors else PARAMETER)  # what is frozen has no average

        yield {tensor.name: tensor.shape for tensor in tensors.values() if tensor.kind == PARAMETER}, read


def _write_weights(folder: Path, checkpoint: Path, config: Config, dtype: str, file_bytes: int, kind: str) -> None:
    """The parameters in `dtype` and the persistent buffers in their own, in the form of the model's family.

    What becomes tensors of the folder together is in memory at a time. Raises DamagedCheckpoint.
    """
    stored = open_checkpoint(checkpoint).tensors.values()
    buffers = {tensor.name: Planned(tensor.shape, DTYPES[tensor.dtype]) for tensor in stored if tensor.kind == BUFFER}
    with _opened(checkpoint, config, kind) as (of_parameters, read):
        parameters = {name: Planned(shape, PRECISIONS[dtype]) for name, shape in of_parameters.items()}
        tensors = parameters | buffers
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        family = family_of(config.model)
        groups = {name: group for group in family.exported(config.model, shapes) for name in group.names}
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
            values = ((name, read(name)) for name in parameters)
            for name, value in itertools.chain(values, read_tensors(checkpoint, BUFFER)):
                waiting[name] = value.to(tensors[name].dtype)
                group = groups[name]
                if all(name in waiting for name in group.names):
                    for file, part in group.convert([waiting.pop(name) for name in group.names]).items():
                        progress.advance(task, writer.write(file, part.contiguous()))
    if len(files) > 1:
        count = sum(math.prod(tensor.shape) for tensor in parameters.values())
        index = json.dumps(index_json(files, count), indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
