"""The table of devices: names as torch has them, and no figures of another device."""

from __future__ import annotations

import pytest
import yaml

from stoker.conf.devices import TABLE, device_called


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_by_what_torch_calls_it(name: str, known: str) -> None:
    found = device_called(name)
    assert found is not None and found.name == known


def test_an_unknown_device_is_no_other() -> None:
    assert device_called("NVIDIA GeForce RTX 4090") is None
    assert device_called("Intel(R) Xeon(R) Processor") is None


def test_every_figure_has_a_source_and_every_name_can_be_reached() -> None:
    for name, values in yaml.safe_load(TABLE.read_text()).items():
        found = device_called(name)
        assert found is not None and found.name == name, "a shorter name stands before it"
        assert values["source"] and values["memory_gib"] > 0 and values["tflops"]["bf16"] > 0
