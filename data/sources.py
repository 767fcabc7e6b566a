"""The sources that a config names: one, or several to mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stoker import conf
from stoker.conf.schema import DataConfig
from stoker.data.mixed import Weights
from stoker.data.mixture import whole_weights

# Of DataConfig, that every source may set.
_KEYS = ("target", "splits", "path", "urls", "validation", "validation_path", "validation_by", "args")


@dataclass(frozen=True)
class Spec:
    """One source."""

    name: str
    config: DataConfig  # of this source only
    weight: float | None  # None: its number of tokens
    epochs: int | None  # passes after which it ends; None: no end


def specs_of(config: DataConfig) -> list[Spec]:
    """The sources of `config` in order; without `data.sources` it is one. Raises ValueError for one that is wrong."""
    if not config.sources:
        for key, default in (("weights", {}), ("phases", []), ("temperature", 1.0)):
            if getattr(config, key) != default:
                problem = f"data.{key}={getattr(config, key)}: a single source has no weights"
                raise ValueError(f"{problem}; name several in data.sources={{NAME: {{kind: text, path: ...}}, ...}}")
        return [Spec(config.name, _training(config), None, config.epochs)]
    for key in ("path", "validation_path"):
        if getattr(config, key) is not None:
            problem = f"data.{key}={getattr(config, key)} with data.sources: each of them has its path"
            raise ValueError(f"{problem}, data.sources.NAME.{key}")
    found = [_spec(config, name, keys) for name, keys in config.sources.items()]
    weighted = [spec.name for spec in found if spec.weight is not None]
    if not config.weights and weighted and len(weighted) < len(found):
        missing = ", ".join(spec.name for spec in found if spec.weight is None)
        raise ValueError(f"data.sources: {', '.join(weighted)} have a weight and {missing} have none: give all or none")
    if config.tokenizer == "bpe":
        raise ValueError(
            "data.tokenizer=bpe is trained on one source: train one with `stoker data tokenizer` and name its file"
        )
    return found


def validation_spec(spec: Spec) -> Spec | None:
    """The source of the validation documents of `spec`, where they lie apart; all its documents are for validation."""
    config = spec.config
    if config.validation_path is None:
        return None
    args = {key: None if key == "dataset" else value for key, value in config.args.items()}  # of data=hf: path decides
    apart = dataclasses.replace(
        config, path=config.validation_path, urls=None, validation=1.0, validation_path=None, args=args
    )
    return dataclasses.replace(spec, config=apart, epochs=1)


def held_out_share(config: DataConfig) -> float:
    """Share of the documents of a source that it does not train on."""
    return 0.0 if config.validation_path is not None else config.validation


def _training(config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, validation=held_out_share(config))


def wanted_weights(config: DataConfig, specs: Sequence[Spec], rows: Sequence[int]) -> list[Weights]:
    """The integer weights of `config`, from step 1 and from the first step of each phase.

    `rows` are those of each source in an epoch. Raises ValueError for names that are no source's and for steps that do
    not rise.
    """
    shares: Mapping[str, Any] = config.weights or {
        spec.name: count if spec.weight is None else spec.weight for spec, count in zip(specs, rows, strict=True)
    }
    wanted = [(1, shares, "data.weights")]
    for number, phase in enumerate(config.phases):
        where = f"data.phases[{number}]"
        if set(phase) != {"from_step", "weights"} or not isinstance(phase["weights"], Mapping):
            raise ValueError(f"{where} is {{from_step: STEP, weights: {{NAME: SHARE}}}}, not {phase}")
        step = phase["from_step"]
        if type(step) is not int or step <= wanted[-1][0]:
            raise ValueError(f"{where}: from_step={step} must be a step after {wanted[-1][0]}")
        wanted.append((step, phase["weights"], where))
    return [Weights(step, _whole(found, specs, config.temperature, where)) for step, found, where in wanted]


def _whole(shares: Mapping[str, Any], specs: Sequence[Spec], temperature: float, where: str) -> tuple[int, ...]:
    names = [spec.name for spec in specs]
    for name, share in shares.items():
        if name not in names:
            raise ValueError(f"{where} names {name}, and the sources are {', '.join(names)}")
        if type(share) not in (int, float) or not 0 <= share < float("inf"):
            raise ValueError(f"{where}: the weight of {name} is {share}, not a number from 0 on")
    if not any(shares.values()):
        raise ValueError(f"{where}: no source has a weight above 0")
    return whole_weights([float(shares.get(name, 0)) for name in names], temperature)


def _spec(config: DataConfig, name: str, given: Any) -> Spec:
    where = f"data.sources.{name}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given}: a source is a dictionary such as {{kind: text, path: FOLDER, weight: 2}}")
    keys = dict(given)
    weight, epochs, kind = keys.pop("weight", None), keys.pop("max_epochs", None), keys.pop("kind", None)
    if weight is not None and (type(weight) not in (int, float) or not 0 <= weight < float("inf")):
        raise ValueError(f"{where}.weight={weight}: must be a number from 0 on")
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        raise ValueError(f"{where}.max_epochs={epochs}: must be a whole number above 0")
    unknown = sorted(set(keys) - set(_KEYS))
    if unknown:
        known = ", ".join(("kind", *_KEYS, "weight", "max_epochs"))
        raise ValueError(f"{where} has {', '.join(unknown)}, and a source has {known}")
    own: dict[str, Any] = {
        "args": {},
        **dict.fromkeys(("path", "urls", "splits", "validation_path")),
        **_group(kind, where),
        **keys,
    }
    if "target" not in own:
        raise ValueError(f"{where} needs a kind, such as kind: text, or a target")
    own["args"] = {**_group(kind, where).get("args", {}), **keys.get("args", {})}
    for key in ("path", "validation_path"):
        if own[key] is not None and "://" not in own[key]:
            own[key] = str(Path(own[key]).expanduser())
    alone = _training(dataclasses.replace(config, name=name, sources={}, weights={}, phases=[], **own))
    return Spec(name, alone, None if weight is None else float(weight), epochs or config.epochs)


def _group(kind: str | None, where: str) -> dict[str, Any]:
    """The keys of `data=<kind>` that a source may set."""
    if kind is None:
        return {}
    path = Path(conf.__file__).parent / "data" / f"{kind}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"{where}.kind={kind}: choose from {known}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key in _KEYS}
