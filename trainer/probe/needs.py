"""What a run asks of storage a second, at most: as if nothing but its matrix products took time."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.conf.schema import Config
from stoker.trainer.parallelize import parameters_of
from stoker.trainer.utilisation import step_flops

STATE_BYTES = {"adamw": 12, "sgd": 8}  # of a parameter in a checkpoint: fp32 values and the optimizer's state
TOKEN_BYTES = 4  # in token files
TEXT_BYTES = 5  # of a token in text that is read on the fly


@dataclass(frozen=True)
class Needs:
    """Bytes a second over all ranks."""

    step_seconds: float  # at least
    data: float  # read
    checkpoints: float  # written, so that a save ends before the next begins


def needs_of(config: Config, rate: float) -> Needs:
    """Of `config`, with `model.vocab_size` set, whose ranks together do `rate` operations a second."""
    parameters = parameters_of(config)
    seconds = step_flops(config, parameters) / rate
    token = TEXT_BYTES if config.data.mode == "streaming" else TOKEN_BYTES
    data = config.batch.size * config.seq_len * token / seconds
    every = config.checkpoint.every * seconds if config.checkpoint.every else float("inf")
    minutes = 60 * config.checkpoint.minutes if config.checkpoint.minutes else float("inf")
    interval = min(every, minutes)
    saved = parameters * STATE_BYTES.get(config.optim.name, 12)
    return Needs(seconds, data, saved / interval)
