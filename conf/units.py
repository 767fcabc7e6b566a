"""Units of a run's numbers, for people."""

from __future__ import annotations

from stoker.conf.schema import ObjectiveConfig


def loss_unit(config: ObjectiveConfig) -> str:
    """What a loss is a mean of, for people."""
    if config.target is not None:
        return f"as {config.target} counts"
    if config.name == "next_token":
        return "nats per token"
    counted = {"distill": "token", "kto": "answer", "apo_zero_unpaired": "answer"}
    return f"{config.name}, per {counted.get(config.name, 'pair')}"
