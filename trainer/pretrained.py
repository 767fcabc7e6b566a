"""Weights to begin with: `model.init_from` names a directory of Hugging Face's or a run's.

Its shape becomes the run's model, and what it holds is compared with that model before a rank is started; each rank
then reads only the slices that it holds. It is read at a start that finds no checkpoint; later starts resume from the
run's checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from stoker.checkpoint import Summary, describe, load, open_checkpoint
from stoker.conf.hub_names import download_advice
from stoker.conf.migrations import migrate
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config, DataConfig, ModelConfig, from_dict, kinds, lookup, to_dict
from stoker.conf.values import ConfigError
from stoker.data.tokenizer import ByteTokenizer
from stoker.data.tokenizer_files import load_kept
from stoker.models import hugging_face_config as theirs
from stoker.models.family import BUILT_IN, TRANSFORMERS, Described, OwnFamily, build_on_meta, family_of
from stoker.models.feed_forward import expert_width
from stoker.models.hugging_face import OWN_MODEL
from stoker.models.hugging_face_families import FAMILIES
from stoker.models.hugging_face_weights import open_weights
from stoker.models.peft_folder import CONFIG as ADAPTER_CONFIG
from stoker.models.upcycling import Upcycled, upcycling_problem
from stoker.parallel.dtypes import DTYPE_NAMES, DTYPES
from stoker.parallel.model import Constant, Normal, whole_model
from stoker.parallel.registry import Entry, Registry, whole_registry
from stoker.parallel.shards import BUFFER, PARAMETER, Shard

log = logging.getLogger(__name__)

_KINDS = (PARAMETER, BUFFER)
_NAMED = 5  # tensors that a message names
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # each is in a folder with a tokenizer
# Of a run, not of its model's shape.
_OURS_ALONE = ("model.init_from", "model.init_only", "model.upcycle_noise", "model.loss_chunk")


def adopt_shape(config: Config, overrides: Sequence[str], tell: Callable[[str], None] = log.info) -> Config:
    """`config` with the model's shape and tokenizer from `model.init_from`, except for keys that `overrides` set.

    `tell` takes a line where the model has experts and the directory's has not. Raises ConfigError for a directory that
    is neither kind, that cannot be read, that holds an unsupported model, or whose tensors are not those of the
    resulting model.
    """
    folder = init_folder(config)
    try:
        given = {override.key for override in map(parse, overrides)}
        values = _shape(folder, config, own_target="model.target" in given)
        adopted = _with_values(config, {key: value for key, value in values.items() if key not in given})
        if not values.get("model.num_experts") and _dense(adopted.model) is not None:
            _refuse_upcycling(adopted)
            if "model.family" not in given:  # that of the model without experts
                adopted = _with_values(adopted, {"model.family": None})
            tell(f"model.init_from={folder} has no experts: {_upcycling_in_words(adopted.model)}")
        elif adopted.model.upcycle_noise:
            raise ValueError("this model's experts are no copies of MLPs: model.upcycle_noise=0.0 works")
        if adopted.model.vocab_size is not None:  # else the tokenizer sets it, and the ranks compare
            entries = saved_entries(adopted.model)
            with _source_of(folder, adopted, entries) as source:
                refuse_other_tensors(adopted.model, entries, source.tensors)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.init_from={folder}: {error}") from error
    return adopt_tokenizer(adopted, overrides)


def adopt_tokenizer(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with the tokenizer in `model.init_from`, if `overrides` set none and there is one.

    The weights mean its token ids: texts that are encoded by another tokenizer would train a model that knows nothing.
    """
    given = {override.key for override in map(parse, overrides)}
    if "data.tokenizer" in given or config.data.tokenizer != DataConfig().tokenizer:
        return config
    folder = init_folder(config)
    if is_run(folder):
        kept = RunDirectory(folder).tokenizer
        theirs_to_take = kept.is_dir() and not isinstance(load_kept(kept), ByteTokenizer)
    else:
        kept = folder
        theirs_to_take = any((folder / name).is_file() for name in _TOKENIZERS)
    return _with_values(config, {"data.tokenizer": str(kept)}) if theirs_to_take else config


def imported(config: Config) -> Config:
    """`config` with the whole shape of the model in `model.init_from`, ignoring keys that were set beside it."""
    return _with_values(config, _shape(init_folder(config), config, own_target=True))


def init_folder(config: Config) -> Path:
    assert config.model.init_from is not None
    return Path(config.model.init_from).expanduser()


def weights_folder(config: Config) -> Path:
    """Where weights are read: what the run has kept of them (`adapter.keep_base`), else `model.init_from`."""
    if config.adapter.name != "none" and config.run.dir is not None:
        kept = RunDirectory(Path(config.run.dir)).base_weights
        if kept.is_dir():
            return kept
    return init_folder(config)


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run directory, rather than a model of Hugging Face's."""
    return RunDirectory(folder).checkpoints.is_dir()


def load_pretrained(config: Config, shards: Sequence[Shard]) -> None:
    """Fill the parameters and persistent buffers among `shards` from `model.init_from`.

    Raises ValueError naming tensors that are missing, too many, of another shape, or of a dtype that would lose their
    values. With `model.init_only` the tensors whose name fits none of its patterns stay as they are, and additional
    tensors are no error.
    """
    with open_pretrained(config) as fill:
        fill(shards)


@contextmanager
def open_pretrained(config: Config) -> Iterator[Callable[[Sequence[Shard]], None]]:
    """A function that does what `load_pretrained` does, any number of times, while its files are open."""
    folder = weights_folder(config)
    entries = saved_entries(config.model)
    try:
        with _source_of(folder, config, entries) as source:
            refuse_other_tensors(config.model, entries, source.tensors)
            wanted = _wanted(config.model, list(entries))
            log.info("initial weights: %d of %d tensors from %s", len(wanted), len(entries), folder)
            yield lambda shards: source.fill([s for s in shards if s.kind in _KINDS and s.name in wanted])
    except (OSError, ValueError) as error:
        raise ValueError(f"model.init_from={folder}: {error}") from error


def _with_values(config: Config, found: dict[str, Any]) -> Config:
    values = to_dict(config)
    for key, value in found.items():
        *path, name = key.split(".")
        node = values
        for part in path:
            node = node[part]
        node[name] = value
    return from_dict(values)


def saved_entries(model: ModelConfig) -> dict[str, Entry]:
    """What the whole model saves, parameters and persistent buffers, by name."""
    whole = build_on_meta(model, whole_model(model.num_hidden_layers))
    return {entry.name: entry for entry in whole_registry(whole).entries.values() if entry.saved}


def _wanted(model: ModelConfig, names: Sequence[str]) -> set[str]:
    patterns = model.init_only or ["*"]
    wanted = {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}
    if not wanted:
        raise ValueError(f"model.init_only={patterns} fits no parameter, such as {names[0]}")
    return wanted


def refuse_other_tensors(model: ModelConfig, entries: dict[str, Entry], stored: Mapping[str, Described]) -> None:
    wanted = _wanted(model, list(entries))
    problems = [_dtype_problem(entries[name], stored[name].dtype) for name in sorted(wanted & set(stored))]
    problems = [problem for problem in problems if problem]
    problems += [f"{name} is missing" for name in sorted(wanted - set(stored))]
    problems += [] if model.init_only else [f"{name} is not in this model" for name in sorted(set(stored) - wanted)]
    problems += [
        f"{name} has shape {stored[name].shape}, the model's has {entries[name].shape}"
        for name in sorted(wanted & set(stored))
        if stored[name].shape != entries[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{'; '.join(problems[:_NAMED])}{more}")


def _dtype_problem(entry: Entry, stored: str) -> str:
    """Floating-point numbers are converted to the model's; integers and flags (of buffers) are taken as they are."""
    dtype = DTYPES.get(stored)
    if dtype == entry.dtype or (entry.dtype.is_floating_point and dtype is not None and dtype.is_floating_point):
        return ""
    if entry.buffer:
        return f"{entry.name} is {stored}, the model's buffer is {DTYPE_NAMES.get(entry.dtype, entry.dtype)}"
    return f"{entry.name} is {stored}: quantised weights are not read"


@dataclass(frozen=True)
class Source:
    """Tensors by our names, and how to fill shards from them."""

    tensors: Mapping[str, Described]
    fill: Callable[[Sequence[Shard]], None]


@contextmanager
def _source_of(folder: Path, config: Config, entries: Mapping[str, Entry]) -> Iterator[Source]:
    """The tensors of `config`'s model, whose experts are made of MLPs where `folder` holds a model without experts."""
    model, dense = config.model, _dense(config.model)
    if dense is not None:
        with open_source(folder, dense, list(saved_entries(dense))) as source:
            if Upcycled.begins_dense(model, source.tensors):
                _refuse_upcycling(config)
                made = Upcycled(model, config.run.seed, _initial(entries), source.tensors, source.fill)
                yield Source(made.tensors(), made.fill)
                return
    with open_source(folder, model, list(entries)) as source:
        yield source


def _dense(model: ModelConfig) -> ModelConfig | None:
    """The model whose MLPs the experts of `model` can begin as, unless `model.init_only` leaves experts out."""
    expert = f"layers.{model.first_dense_layers}.mlp.experts.gate_up_proj"
    taken = any(fnmatch(expert, pattern) for pattern in model.init_only or ["*"])
    return family_of(model).without_experts(model) if taken else None


def _initial(entries: Mapping[str, Entry]) -> Callable[[str], Normal | Constant]:
    return Registry(entries.values()).initial


def _refuse_upcycling(config: Config) -> None:
    """Raises ValueError where experts cannot begin as MLPs."""
    found = upcycling_problem(config.model)
    if found is None and config.adapter.name != "none":
        found = (
            f"with adapter={config.adapter.name} no folder would hold the base: adapter=none trains the experts, and "
            "`stoker export` makes a folder of them"
        )
    if found is not None:
        raise ValueError(f"this model has no experts, and model.num_experts={config.model.num_experts}: {found}")


def _upcycling_in_words(model: ModelConfig) -> str:
    parts = model.intermediate_size // expert_width(model)
    part = "the MLP" if parts == 1 else f"one of {parts} parts of the MLP"
    noise = f", with noise of {model.upcycle_noise} of initial values" if model.upcycle_noise else ""
    return f"each of {model.num_experts} experts of a layer begins as {part} of that layer{noise}"


@contextmanager
def open_source(folder: Path, model: ModelConfig, names: Sequence[str]) -> Iterator[Source]:
    """The tensors in the files of `folder`, of Hugging Face's or of a run, by the global `names` of `model`."""
    if is_run(folder):
        stored = open_checkpoint(_newest(folder).path)
        held = {name: tensor for (kind, name), tensor in stored.tensors.items() if kind in _KINDS}

        def read(shards: Sequence[Shard]) -> None:
            load(stored, shards)

        yield Source(held, read)
        return
    with open_weights(folder) as found:
        tensors = family_of(model).stored(model, found, names)

        def fill(shards: Sequence[Shard]) -> None:
            with torch.no_grad():
                for shard in shards:
                    if shard.data.numel():
                        shard.data.detach().copy_(tensors[shard.name].read(shard.chunk))

        yield Source(tensors, fill)


def _newest(folder: Path) -> Summary:
    sound = [summary for summary in describe(RunDirectory(folder).checkpoints) if summary.problem is None]
    if not sound:
        raise ValueError("this run has no valid checkpoint")
    return sound[-1]


def _shape(folder: Path, config: Config, own_target: bool) -> dict[str, Any]:
    """The model of `folder` as values of a config by dotted key."""
    if is_run(folder):
        _newest(folder)
        stored = read_config(RunDirectory(folder))
        if stored.adapter.name != "none":
            raise ValueError(
                "this run trained an adapter, and its checkpoints do not hold its base: `stoker export --merge` makes "
                "a model folder of both; for another adapter like it, set model.init_from to its base, and "
                "adapter.init_from to what `stoker export` makes"
            )
        return _model_values(stored, config, own_target)
    if not folder.is_dir():
        raise ValueError(f"there is no such directory{download_advice(folder, 'model')}")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            "this folder holds an adapter: set adapter.init_from to it, and model.init_from to the folder of its base"
        )
    if not (folder / theirs.CONFIG).is_file():
        raise ValueError(f"no {theirs.CONFIG} and no checkpoints: neither a Hugging Face model nor a run")
    values = theirs.read_json(folder / theirs.CONFIG)
    if values.get("model_type") == OWN_MODEL:  # a user's own model, exported
        if not isinstance(values.get("model"), dict):
            raise ValueError(f"{theirs.CONFIG} has no model section")
        return _model_values(from_dict(migrate({"model": values["model"]})), config, own_target)
    found = _imported_shape(folder, config, values)
    return {f"model.{key}": value for key, value in found.items()}


def _imported_shape(folder: Path, config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModelConfig for the model of a folder of Hugging Face's, by the family that will train it.

    That of `model.target` if it is not the default; else the decoder where it computes the model, and transformers'
    own modules where it does not, or with model.native=false. Raises ValueError where neither can.
    """
    decoder, model = ModelConfig().target, config.model
    family = family_of(model)
    if isinstance(family, OwnFamily):  # a function may read the keys of the decoder
        return family_of(ModelConfig()).shape(folder, config.seq_len)
    if model.native is True and model.target == TRANSFORMERS:
        raise ValueError("model.native=true asks for Stoker's modules, and model=transformers for transformers'")
    if model.target not in BUILT_IN.values() or model.target == TRANSFORMERS:
        return family.shape(folder, config.seq_len)
    reason = "model.native=false"
    if model.native is not False:
        try:
            return family_of(ModelConfig(target=decoder)).shape(folder, config.seq_len)
        except ValueError as error:
            if model.native is True:
                raise
            reason = str(error)
    try:
        found = family_of(ModelConfig(target=TRANSFORMERS)).shape(folder, config.seq_len)
    except ValueError as error:
        raise ValueError(reason if values.get("model_type") in FAMILIES and model.native is None else error) from error
    log.info("%s: trained in transformers' own modules: %s", folder, reason)
    return found


def with_settled(config: Config) -> Config:
    """`config` with the keys of its model that others determine, where they are not set."""
    settled = family_of(config.model).settled(config.model)
    default = ModelConfig()
    missing = {k: v for k, v in settled.items() if lookup(config.model, k) == lookup(default, k)}
    return _with_values(config, {f"model.{key}": value for key, value in missing.items()})


def _model_values(stored: Config, config: Config, own_target: bool) -> dict[str, Any]:
    """The fixed keys of another run's model. The code that builds it is taken from a stored file only with consent.

    `own_target`: the command line sets `model.target`. Raises ValueError where it does not and `config` differs.
    """
    keys = [key for key, kind in kinds().items() if key.startswith("model.") and kind == "fixed"]
    if stored.model.target != config.model.target:
        if config.run.trust:
            keys.append("model.target")
        elif not own_target:
            raise ValueError(
                f"its model is built by {stored.model.target}: model.target={stored.model.target} builds it here too"
            )
    return {key: lookup(stored, key) for key in keys if key not in _OURS_ALONE}
