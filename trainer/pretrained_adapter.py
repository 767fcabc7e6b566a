"""An adapter to begin with: `adapter.init_from` names a folder in peft's format.

Its shape becomes the run's adapter before a rank is started; each rank then reads the slices that it holds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from stoker.conf.overrides import parse
from stoker.conf.schema import Config, lookup
from stoker.conf.values import ConfigError
from stoker.models import peft_folder
from stoker.models.adapters import Names, plan_of
from stoker.models.family import build_on_meta
from stoker.models.peft_folder import open_adapter, tensor_names
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER, Shard
from stoker.parallel.suggestions import shortened
from stoker.trainer.parallelize import part_builder
from stoker.trainer.pretrained import init_folder, is_run

log = logging.getLogger(__name__)

DROPOUT = "adapter.dropout"
_NAMED = 5  # tensors that a message names


def adopt_adapter(config: Config, overrides: Sequence[str], tell: Callable[[str], None]) -> Config:
    """`config` with the adapter's shape from `adapter.init_from`. `tell` takes a line of what is left out.

    Raises ConfigError for a folder that cannot be read, and for an adapter that is not one of this model.
    """
    folder = _folder(config)
    given = {override.key for override in map(parse, overrides)}
    asked = {f"adapter.{key}": value for key, value in vars(config.adapter).items() if f"adapter.{key}" in given}
    try:
        if not folder.is_dir():
            raise ValueError("there is no such directory")
        if not (folder / peft_folder.CONFIG).is_file():
            raise ValueError(f"it has no {peft_folder.CONFIG}: it is no adapter in peft's format")
        section = peft_folder.adopted(folder, *_base(config))
        if DROPOUT in given:  # it is no part of the adapter's shape
            section["dropout"] = config.adapter.dropout
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **section))
        for key, value in asked.items():
            if lookup(config, key) != value:
                raise ValueError(f"{key}={value}, and the adapter has {lookup(config, key)}: leave {key} out")
        if config.adapter.dropout and DROPOUT not in given:
            tell(f"adapter.init_from={folder}: {DROPOUT}={config.adapter.dropout}, as it was trained before")
        _refuse_other_tensors(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"adapter.init_from={folder}: {error}") from error
    return config


def refuse_unfitting(config: Config, tell: Callable[[str], None]) -> None:
    """Raises ConfigError for an adapter, or names in `model.freeze`, that do not fit the model.

    `tell` takes a line of the layers that all-linear leaves out.
    """
    try:
        if config.adapter.keep_base and config.model.init_from is not None and is_run(init_folder(config)):
            raise ValueError(
                f"adapter.keep_base=true with model.init_from={config.model.init_from}, a run: it keeps the files of a "
                "model's folder, which `stoker export` makes of a run; adapter.keep_base=false works too"
            )
        plan = plan_of(_base(config)[0], _with_size(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plan is not None and plan.left_out:
        tell(f"adapter.target_modules=[all-linear]: no adapter beside {shortened(plan.left_out)}, which take none")


def load_adapter(config: Config, shards: Sequence[Shard]) -> None:
    """Fill what the run trains, among `shards`, from `adapter.init_from`. Raises ValueError naming a tensor."""
    folder = _folder(config)
    try:
        _refuse_other_tensors(config)
        theirs = _names(config)
        with open_adapter(folder) as tensors, torch.no_grad():
            for shard in shards:
                if shard.kind == PARAMETER and shard.name in theirs and shard.data.numel():
                    shard.data.detach().copy_(tensors[theirs[shard.name]].read(shard.chunk))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter.init_from={folder}: {error}") from error
    log.info("initial adapter: %d tensors from %s", len(theirs), folder)


def _refuse_other_tensors(config: Config) -> None:
    theirs = _names(config)
    adapted = part_builder(_with_size(config))(whole_model(config.model.num_hidden_layers))
    shapes = {theirs[name]: tuple(p.shape) for name, p in adapted.named_parameters() if name in theirs}
    problems = []
    with open_adapter(_folder(config)) as tensors:
        for name, shape in shapes.items():
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif tensors[name].shape != shape and (config.model.vocab_size or "lora_" in name):
                problems.append(f"{name} has shape {tensors[name].shape}, the model's has {shape}")
            elif tensors[name].dtype not in DTYPES or not DTYPES[tensors[name].dtype].is_floating_point:
                problems.append(f"{name} is {tensors[name].dtype}: quantised weights are not read")
        problems += [f"{name} is not in this adapter" for name in tensors if name not in shapes]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{peft_folder.WEIGHTS}: {'; '.join(problems[:_NAMED])}{more}")


def _names(config: Config) -> dict[str, str]:
    """peft's names of what the run trains, by ours."""
    whole, names = _base(config)
    plan = plan_of(whole, config)
    assert plan is not None
    return tensor_names(plan, names)


def _base(config: Config) -> tuple[nn.Module, Names]:
    config = _with_size(config)
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    return whole, Names(whole, config)


def _with_size(config: Config) -> Config:
    """`config` with some vocabulary where its tokenizer will set it: names and ranks do not depend on it."""
    if config.model.vocab_size is not None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2))


def _folder(config: Config) -> Path:
    assert config.adapter.init_from is not None
    return Path(config.adapter.init_from).expanduser()
