"""Adapters in peft's format: `adapter_config.json` and `adapter_model.safetensors`, by Hugging Face's names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from stoker.conf.schema import Config
from stoker.models.adapters import AdapterPlan, Names
from stoker.models.hugging_face_config import in_one_line, read_json
from stoker.models.hugging_face_weights import StoredTensor
from stoker.parallel.suggestions import shortened
from stoker.parallel.tensor.low_rank import MAGNITUDE, SLOT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_MATRICES = {f".{SLOT}.A": ".lora_A.weight", f".{SLOT}.B": ".lora_B.weight"}
_MAGNITUDE = ".lora_magnitude_vector"
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "lora_dropout")
# Keys of adapter_config.json whose meaning is taken from the names and shapes of the tensors,
_FROM_TENSORS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "modules_to_save",
    "ensure_weight_tying",
)
# or that say nothing about the adapter's function.
_IGNORED = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "runtime_config",
    "megatron_core",
    "megatron_config",
    "qalora_group_size",
    "task_type",
)
# Initial values that leave the base as it is.
_PLAIN = (True, False, None, "gaussian", "orthogonal", "eva")


def tensor_names(plan: AdapterPlan, names: Names) -> dict[str, str]:
    """peft's names of everything that `plan` trains, by our global names."""
    found = {}
    for module in plan.ranks:
        kinds = _MATRICES | ({f".{MAGNITUDE}": _MAGNITUDE} if plan.magnitudes else {})
        for ours, theirs in kinds.items():
            found[f"{module}{ours}"] = f"{PREFIX}{names.of(module)[1]}{theirs}"
    return found | {name: f"{PREFIX}{names.of(name)[1]}" for name in names.parameters if name in plan.trained}


def config_json(config: Config, plan: AdapterPlan, names: Names) -> dict[str, Any]:
    """adapter_config.json of a run's adapter."""
    adapter = config.adapter
    known = [names.of(module)[1] for module in names.modules]
    theirs = {names.of(module)[1]: rank for module, rank in plan.ranks.items()}
    other = {rank: [name for name, own in theirs.items() if own == rank] for rank in sorted(set(theirs.values()))}
    saved = [names.of(module)[1] for module in plan.saved_whole]
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": config.model.init_from,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {
            end: rank for rank, of in other.items() if rank != adapter.rank for end in shared_ends(of, known)
        },
        "target_modules": shared_ends(theirs, known),
        "task_type": "CAUSAL_LM",
        "use_dora": plan.magnitudes,
        "use_rslora": adapter.rslora,
    }


def shared_ends(chosen: Iterable[str], known: Collection[str]) -> list[str]:
    """`chosen` modules by the ends of their names, each of which fits no other of the `known` ones; else by names."""
    chosen = set(chosen)
    by_end: dict[str, set[str]] = {}
    for name in known:
        by_end.setdefault(name.rpartition(".")[2], set()).add(name)
    ends = {name.rpartition(".")[2] for name in chosen}
    return sorted(word for end in ends for word in ([end] if by_end[end] <= chosen else sorted(by_end[end] & chosen)))


def adopted(folder: Path, whole: nn.Module, names: Names) -> dict[str, Any]:
    """The adapter in `folder` as values of the config's adapter section. `whole` is the model without an adapter.

    Raises ValueError, naming the file and what is in it, for another kind of adapter and for one of another model.
    """
    values = read_json(folder / CONFIG)
    refuse_unsupported(values)
    theirs = {names.of(name)[1]: name for name, _ in whole.named_modules() if name}
    parameters = {names.of(name)[1]: name for name in names.parameters}
    ranks: dict[str, int] = {}
    saved: dict[str, None] = {}
    unknown: list[str] = []
    with open_adapter(folder) as tensors:
        for name, tensor in tensors.items():
            inner = name.removeprefix(PREFIX)
            module, matrix, _ = inner.partition(".lora_")
            if matrix and module in theirs and inner.endswith((*_MATRICES.values(), _MAGNITUDE)):
                if inner.endswith(".lora_A.weight"):
                    ranks[module] = tensor.shape[0]
            elif inner in parameters:
                saved[inner.rpartition(".")[0]] = None
            else:
                unknown.append(name)
    if unknown:
        raise ValueError(f"{WEIGHTS}: {shortened(unknown, 5)}: the model has no such module or parameter")
    if not ranks:
        raise ValueError(f"{WEIGHTS} holds no lora_A: it adapts no layer")
    rank = int(values.get("r", 8))
    known = list(theirs)
    others = sorted({own for own in ranks.values() if own != rank})
    return {
        "name": "dora" if values.get("use_dora") else "lora",
        "rank": rank,
        "alpha": float(values.get("lora_alpha", 8)),
        "rslora": bool(values.get("use_rslora", False)),
        "target_modules": shared_ends(ranks, known),
        "layers_to_transform": [],
        "rank_pattern": {
            end: own for own in others for end in shared_ends([m for m in ranks if ranks[m] == own], known)
        },
        "modules_to_save": list(saved),
        "dropout": float(values.get("lora_dropout") or 0.0),
    }


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Raises ValueError for an adapter_config.json of an adapter that computes something else than ours."""
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG}: peft_type is {values.get('peft_type')!r}: only LORA is read")
    if values.get("init_lora_weights", True) not in _PLAIN:
        raise ValueError(
            f"{CONFIG}: init_lora_weights={values['init_lora_weights']!r} changes the base: convert it by peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    known = (*_READ, *_FROM_TENSORS, *_IGNORED)
    others = {key: value for key, value in values.items() if key not in known and value and value != "none"}
    if others:
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(others.items()))
        raise ValueError(f"{CONFIG}: {shown}: adapters with this are not read; merge it into its base by peft")


@contextmanager
def open_adapter(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of an adapter by the names in its file, readable until the context ends. Raises ValueError."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (
            "; adapter_model.bin is a pickle, which is not read" if (folder / "adapter_model.bin").exists() else ""
        )
        raise ValueError(f"there is no {WEIGHTS}{pickled}")
    try:
        with safe_open(path, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            yield {n: StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), part) for n, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {in_one_line(error)}") from error


def refuse_tied(plan: AdapterPlan, names: Names, tied: Sequence[str]) -> None:
    """Raises ValueError where `plan` trains one of the `tied` parameters, which peft would untie."""
    both = [name for name in tied if name in plan.trained]
    if both:
        raise ValueError(
            f"{both[0]} is trained whole and is both the embedding and the head, which peft would train apart: "
            "--merge writes a whole model instead"
        )
