"""A step's arithmetic beside what its devices could do: TFLOP/s and model FLOPs utilisation (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.conf.devices import device_called
from stoker.conf.schema import Config
from stoker.models.family import family_of
from stoker.trainer.parallelize import parameters_of


@dataclass(frozen=True)
class Arithmetic:
    """`flops` are a step's for each device, `peak` the dense operations a second of one in the compute dtype."""

    flops: float
    peak: float

    def metrics(self, seconds: float) -> dict[str, float]:
        """Of a step that took `seconds`: 1e12 operations a second of a device, and their share of the peak."""
        speed = self.flops / max(seconds, 1e-9)
        return {"tflops": speed / 1e12, "mfu": speed / self.peak}


def arithmetic_of(config: Config, device: str, devices: int) -> Arithmetic | None:
    """That of a step of `config`, whose `model.vocab_size` is set, on so many devices that torch calls `device`.

    Operations are those that published utilisations count (`Family.flops_per_token`), of all positions of the rows:
    what is recomputed is not counted. None where the count does not hold (adapters, frozen parameters, objectives other
    than the next token, a batch that grows) and where the peak of the device in the dtype of `precision` is not known.
    """
    known = device_called(device)
    peak = None if known is None else known.peak(config.precision)
    plain = config.objective.name == "next_token" and config.objective.target is None
    if peak is None or not plain or config.batch.ramp or config.adapter.name != "none" or config.model.freeze:
        return None
    return Arithmetic(step_flops(config, parameters_of(config)) / devices, peak * 1e12)


def step_flops(config: Config, parameters: int) -> int:
    """Those of a step of a model with so many `parameters` on all devices, as published utilisations count them."""
    of_token = family_of(config.model).flops_per_token(config.model, config.seq_len, parameters)
    return of_token * config.batch.size * config.seq_len
