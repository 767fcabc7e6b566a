"""The devices of `devices.yaml`: what their makers publish of memory, arithmetic and links."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stoker.conf.schema import from_dict
from stoker.conf.values import ConfigError

TABLE = Path(__file__).with_name("devices.yaml")


@dataclass
class Measured:
    """Rates that ranks of a model reached together on their machines. What is None was not measured."""

    precision: str  # fp32 | bf16 | fp16, of the products
    products_tflops: float  # over the model's own products, 1e12 operations a second
    devices_per_machine: int = 1
    memory_gb_s: float | None = None  # read and written by copies, 1e9 bytes a second
    link_gb_s: float | None = None  # of a ring of one machine's ranks, as the next four
    link_seconds: float | None = None  # to start a message
    network_gb_s: float | None = None  # of a ring of several machines' ranks
    network_seconds: float | None = None
    link_kinds: dict[str, Any] = field(default_factory=dict)  # [GB/s, seconds to start] by kind of message
    network_kinds: dict[str, Any] = field(default_factory=dict)
    passes: float | None = None  # seconds of the model's own passes by those that the rates of their parts add up to
    call_seconds: float | None = None  # of an operation on the host
    from_device_gb_s: float | None = None  # to the memory of the host


@dataclass
class Device:
    """A device. What is None is not known, and nothing is derived from it."""

    memory_gib: float
    source: str = ""
    tflops: dict[str, Any] = field(default_factory=dict)  # dense peaks, 1e12 operations a second, by fp32 | bf16 | fp16
    hbm_gb_s: float | None = None  # 1e9 bytes a second
    link_gb_s: float | None = None  # to devices of the same machine, one direction
    network_gb_s: float | None = None  # to other machines, one direction
    power_w: float | None = None
    name: str = ""
    kind: str = "cuda"  # cpu | cuda
    measured: Measured | None = None  # of `stoker probe`: what ranks reached of the rates above

    def peak(self, precision: str) -> float | None:
        """The dense peak by which a run in this precision is judged; in fp8 that of bf16, as published figures are."""
        return self.tflops.get("bf16" if precision == "fp8" else precision)


def device_called(name: str) -> Device | None:
    """The device of the table whose name `name` contains; None for an unknown one, which is no other's."""
    lowered = name.lower()
    return next((device for key, device in _table().items() if key.lower() in lowered), None)


def device_named(name: str) -> Device:
    """The device of the table, or of a JSON file in the form of its entries.

    Raises ConfigError, naming the known ones, for a device that is not in the table, and for a file in another form.
    """
    if name.endswith(".json"):
        return _of_file(Path(name))
    found = device_called(name)
    if found is None:
        raise ConfigError(
            f"--gpu {name}: no such device is known; known are {', '.join(_table())}. A file of your own, "
            '--gpu machine.json with {"memory_gib": 80}, describes another'
        )
    return found


def _of_file(path: Path) -> Device:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--gpu {path}: {error}") from error
    if isinstance(values, dict):
        values.pop("probe", None)  # what `stoker probe` found besides
    if not isinstance(values, dict) or "memory_gib" not in values:
        raise ConfigError(f'--gpu {path}: expected an object with memory_gib, such as {{"memory_gib": 80}}')
    try:
        return _device(path.stem, values)
    except ConfigError as error:
        raise ConfigError(f"--gpu {path}: {error}") from error


@functools.cache
def _table() -> dict[str, Device]:
    return {name: _device(name, values) for name, values in yaml.safe_load(TABLE.read_text()).items()}


def _device(name: str, values: Mapping[str, Any]) -> Device:
    values = {"name": name, **values}
    measured = values.pop("measured", None)
    device: Device = from_dict(values, Device)
    if measured is not None:
        if not isinstance(measured, dict):
            raise ConfigError(f"measured={measured!r}: expected a section of keys")
        device.measured = from_dict(measured, Measured, "measured.")
    return device
