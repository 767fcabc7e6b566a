"""Code that a stored config names: import paths, shell, programs. It runs only for the user who started the run.

A run directory or a checkpoint may come from another user. Code that its config would execute is refused by every
command, by key and value, unless this user has started the run before (a record beside the user's caches, of the run's
id and a digest of all these keys), sets `run.trust=true` or `--trust`, or gives the key on the command line. Stoker's
models, sources, objectives and optimizers are not foreign code; `data.args.map` has none of Stoker's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stoker.conf.identity import read_identity
from stoker.conf.overrides import parse
from stoker.conf.reasons import reason
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.schema import Config
from stoker.conf.secrets import names_a_secret
from stoker.conf.targets import target_and_arguments
from stoker.conf.user import cache_folder
from stoker.conf.values import ConfigError
from stoker.data.remote.shards import addresses, scheme

log = logging.getLogger(__name__)

Code = dict[str, Any]  # dotted key -> value

MODEL, DATA, OBJECTIVE, OPTIM, ENGINE, SLURM = "model.", "data.", "objective.", "optim.", "parallel.", "launch."
EARLY_STOPPING = "stoker.trainer.report.early_stopping:EarlyStopping"  # Stoker's own observer
EVALUATION = "eval."
REPORTING = ("observers", "alerts.")
TRAINING = (MODEL, DATA, OBJECTIVE, OPTIM, ENGINE, EVALUATION, *REPORTING)  # what ranks use
_LARGEST_SHOWN = 120  # characters of a value


def code_of(config: Config, uses: Sequence[str] = ("",)) -> Code:
    """What `config` would import or execute that is not Stoker's, of the keys that begin with one of `uses`.

    An address that names a secret of the environment is of the same kind: it would be sent to a stranger's host.
    """
    found: Code = {}
    model, data, optim, launch = config.model, config.data, config.optim, config.launch
    found |= _target("model.target", model.target, "stoker.models.", {"model.args": model.args})
    found |= _data("data", vars(data))
    for name, source in data.sources.items():
        if isinstance(source, Mapping):
            found |= _data(f"data.sources.{name}", source)
    objective = config.objective
    found |= _target("objective.target", objective.target, "stoker.models.", {"objective.args": objective.args})
    found |= _target("optim.target", optim.target, "stoker.parallel.", {"optim.args": optim.args})
    if config.parallel.deepspeed:
        found["parallel.deepspeed"] = config.parallel.deepspeed  # it may name modules to import
    for key in ("setup", "sbatch_args", "srun_args", "image"):
        if value := getattr(launch, key):
            found[f"launch.{key}"] = value
    if any(target_and_arguments(entry)[0] != EARLY_STOPPING for entry in config.observers):
        found["observers"] = config.observers
    if config.eval.tasks and config.eval.include:
        found["eval.include"] = config.eval.include  # its task files may name functions
    if config.alerts.command:
        found["alerts.command"] = config.alerts.command
    return {key: value for key, value in found.items() if key.startswith(tuple(uses))}


def refuse_foreign_code(
    config: Config,
    where: Path | str,
    run: str | None,
    *,
    trust: bool,
    uses: Sequence[str],
    overrides: Iterable[str] = (),
    tell: Callable[[str], None] = log.info,
) -> None:
    """Raises ConfigError naming what `config`, stored in `where` by the run of the id `run`, would execute.

    What is executed is printed in one line. `overrides`: keys of the command line are trusted.
    """
    code = code_of(config, uses)
    if not code:
        return
    given = {override.key for override in map(parse, overrides)}
    foreign = {key: value for key, value in code.items() if not _is_given(key, given)}
    if foreign and not trust and not (run is not None and _record(run, code_of(config)).exists()):
        listed = "".join(f"\n  {key}={shown(value)}" for key, value in foreign.items())
        raise ConfigError(
            f"{where} names code to run, and this user has not started this run. If you trust it, set run.trust=true "
            f"(--trust), or give the keys on the command line:{listed}"
        )
    tell("runs code of its config: " + ", ".join(f"{key}={shown(value)}" for key, value in code.items()))


def trusted_config(
    run: RunDirectory, trust: bool, uses: Sequence[str], tell: Callable[[str], None] = log.info
) -> Config:
    """The stored config of a run for a command that uses these keys. Raises ConfigError as `refuse_foreign_code`."""
    config = read_config(run)
    refuse_foreign_code(config, run.config, _id_of(run), trust=trust, uses=uses, tell=tell)
    return config


def remember(run: str, config: Config) -> None:
    """Record that this user has started the run of this id with this config; a failure is only logged."""
    if code := code_of(config):
        _write(_record(run, code))


def remember_script(run: str, script: str) -> None:
    """Record that this user has written this batch script of the run."""
    _write(_script_record(run, script))


def is_remembered_script(run: RunDirectory, script: str) -> bool:
    """Whether this user has submitted this very script of the run."""
    identity = _id_of(run)
    return identity is not None and _script_record(identity, script).exists()


def _id_of(run: RunDirectory) -> str | None:
    identity = read_identity(run)
    return None if identity is None else identity.run


def _target(key: str, target: Any, ours: str, arguments: Code) -> Code:
    """An import path that is not Stoker's, with its arguments."""
    if not target or (isinstance(target, str) and target.startswith(ours)):
        return {}
    return {key: target} | {name: value for name, value in arguments.items() if value}


def _data(prefix: str, keys: Mapping[str, Any]) -> Code:
    """The same for a source of data."""
    args = keys.get("args") or {}
    found = _target(f"{prefix}.target", keys.get("target"), "stoker.data.", {f"{prefix}.args": args})
    found |= _target(f"{prefix}.splits", keys.get("splits"), "stoker.data.", {f"{prefix}.args": args})
    if isinstance(args, Mapping) and args.get("map") and f"{prefix}.args" not in found:
        found[f"{prefix}.args.map"] = args["map"]
    for key in ("path", "urls"):
        if _has_pipe(keys.get(key)) or names_a_secret(keys.get(key)):
            found[f"{prefix}.{key}"] = keys[key]
    return found


def _has_pipe(urls: Any) -> bool:
    with suppress(ValueError):
        return any(scheme(address) == "pipe" for address in addresses(urls))
    return "pipe" in str(urls)  # what cannot be expanded is refused later, with its reason


def _is_given(key: str, given: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:end]) in given for end in range(1, len(parts) + 1))


def shown(value: Any) -> str:
    """A value on one line, without control characters, cut off where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= _LARGEST_SHOWN else f"{text[:_LARGEST_SHOWN]}..."


def _record(run: str, code: Code) -> Path:
    return _place(run, json.dumps(code, sort_keys=True, default=str))


def _script_record(run: str, script: str) -> Path:
    return _place(run, f"script\n{script}")


def _place(run: str, text: str) -> Path:
    return cache_folder() / "started" / f"{run}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _write(record: Path) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(record, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        log.warning("the next start of this run needs run.trust=true: %s", reason(error))
