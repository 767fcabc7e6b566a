"""Units of a run's numbers, for people."""

from __future__ import annotations

from stoker.conf.schema import ObjectiveConfig


def loss_unit(config: ObjectiveConfig) -> str:
    """What a loss is a mean of, for people."""
    if config.target is not None:
        return f"as {config.target} counts"
    return "nats per token" if config.name == "next_token" else f"{config.name}, per pair"
