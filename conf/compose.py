"""From overrides to a typed config, through Hydra's compose API."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from stoker.conf.faults import spelled
from stoker.conf.overrides import GROUPS_FOLDER, parse
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config of `overrides`, as typed on a command line (`["model=tiny", "steps=20"]`).

    Works from any directory and inside a program that uses Hydra itself, whose state is left as it was. Raises
    ConfigError, of one line, for the first override that is wrong.
    """
    checked = [parse(override).hydra for override in overrides]

    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store("stoker_schema", Config)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(GROUPS_FOLDER), version_base="1.3"):
            composed = hydra.compose("config", checked)
        config = typing.cast(Config, OmegaConf.to_object(composed))
        config.faults = [spelled(entry) for entry in config.faults]
        return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    finally:
        GlobalHydra.instance().hydra = outer
