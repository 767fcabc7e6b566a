"""`stoker export` of an adapter run: the adapter as a folder of peft's, or merged into its base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from stoker.checkpoint import TensorReader, read_state
from stoker.conf.schema import Config
from stoker.launch.tensor_files import Planned, TensorFile, TensorWriter
from stoker.models.adapters import Names, plan_of, scale_of
from stoker.models.family import build_on_meta
from stoker.models.peft_folder import CONFIG, WEIGHTS, config_json, refuse_tied, tensor_names
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER
from stoker.parallel.tensor.low_rank import MAGNITUDE, SLOT
from stoker.trainer.base_reader import open_base
from stoker.trainer.frozen_base import STATE


def write_adapter(folder: Path, checkpoint: Path, config: Config, dtype: str) -> None:
    """Write the adapter of `checkpoint` to `folder`, in peft's format. `config.model.vocab_size` is set.

    Raises DamagedCheckpoint, and ValueError for an adapter that peft cannot hold.
    """
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    names, plan = Names(whole, config), plan_of(whole, config)
    assert plan is not None
    refuse_tied(plan, names, sorted(set(names.parameters) - {name for name, _ in whole.named_parameters()}))
    (folder / CONFIG).write_text(json.dumps(config_json(config, plan, names), indent=2, sort_keys=True) + "\n")
    theirs, data = tensor_names(plan, names), PRECISIONS[dtype]
    with TensorReader(checkpoint) as reader:
        shapes = {name: tensor.shape for (kind, name), tensor in reader.stored.tensors.items() if kind == PARAMETER}
        file = TensorFile(WEIGHTS, {theirs[name]: Planned(shape, data) for name, shape in shapes.items()})
        with TensorWriter(folder, [file]) as writer:
            for name in shapes:
                writer.write(theirs[name], reader.read(name).to(data))


@contextmanager
def merged(checkpoint: Path, config: Config) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """The shapes of the base's parameters, and a function from a name to float32 values with the adapter added.

    W + scale * B @ A in float32, with DoRA its rows at their trained lengths; the caller rounds once.
    `config.model.vocab_size` is set.
    """
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    plan = plan_of(whole, config)
    assert plan is not None
    with TensorReader(checkpoint) as reader, open_base(config, read_state(checkpoint).get(STATE, {})) as base:

        def read(name: str) -> Tensor:
            value = reader.read(name) if name in plan.trained else base(name)
            module, _, kind = name.rpartition(".")
            if kind == "weight" and (rank := plan.ranks.get(module)) is not None:
                a, b = (reader.read(f"{module}.{SLOT}.{matrix}") for matrix in "AB")
                value = value.addmm_(b, a, alpha=scale_of(config.adapter, rank))
                if plan.magnitudes:
                    value *= (reader.read(f"{module}.{MAGNITUDE}") / torch.linalg.vector_norm(value, dim=1))[:, None]
            return value

        yield {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}, read
