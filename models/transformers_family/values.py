"""The values of config.json that a run's config describes."""

from __future__ import annotations

from typing import Any

from stoker.conf.schema import ModelConfig


def values_of(config: ModelConfig) -> dict[str, Any]:
    """`model.config` with the changes of `model.args`. Raises ValueError without one."""
    if not isinstance(config.config, dict):
        raise ValueError(
            "model.config is not set: model.config=FOLDER_OR_JSON names a config.json of transformers, or "
            "model.init_from=FOLDER a whole model"
        )
    return {**config.config, **config.args}
