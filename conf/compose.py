"""From overrides to a typed config, through Hydra's compose API."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker.conf.faults import spelled
from stoker.conf.overrides import GROUPS_FOLDER, Override, parse, quoted
from stoker.conf.reasons import reason
from stoker.conf.records import parse_json
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config of `overrides`, as typed on a command line (`["model=tiny", "steps=20"]`).

    Works from any directory and inside a program that uses Hydra itself, whose state is left as it was. Raises
    ConfigError, of one line, for the first override that is wrong.
    """
    parsed = [parse(override) for override in overrides]
    checked = [override.hydra for override in parsed]
    if folders := _folders(parsed):
        checked.append(f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in folders)}]")

    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    if "stoker_schema.yaml" not in store.repo:  # once: it takes a quarter of a composition
        store.store("stoker_schema", Config)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(GROUPS_FOLDER), version_base="1.3"):
            composed = hydra.compose("config", checked)
        config = typing.cast(Config, OmegaConf.to_object(composed))
        config.faults = [spelled(entry) for entry in config.faults]
        config.model.config = _read_values(config.model.config)
        return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    finally:
        GlobalHydra.instance().hydra = outer


def _read_values(given: Any) -> Any:
    """The values of the file or folder that `model.config` names; a run keeps them, and does not need it again."""
    if not isinstance(given, str):
        return given
    path = Path(given).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config={given}: {path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"model.config={given}: {path} holds no JSON object")
    return values


def _folders(overrides: Sequence[Override]) -> list[Path]:
    """The folders of groups that choices of the user's own come from. Raises ConfigError where one hides another's."""
    own = [(Path(override.value), override.folder) for override in overrides if override.folder is not None]
    folders = list(dict.fromkeys(folder for _, folder in own))
    for file, chosen in own:
        for folder in folders[: folders.index(chosen)]:
            hiding = folder / file.relative_to(chosen)
            if hiding.exists():
                raise ConfigError(f"{file} has the name of {hiding}: rename one of the two")
    return folders
