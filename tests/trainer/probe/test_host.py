"""What the system and nvidia-smi report of a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stoker.trainer.probe.facts import Gpu, Interface
from stoker.trainer.probe.gpu_health import gpus
from stoker.trainer.probe.host import interfaces, this_host, versions

SMI = """#!/bin/sh
case "$1" in
*clocks_event*) {old} echo "GPU-a, Active, Not Active, Not Active, Active"; echo "GPU-b, Not Active, Not Active, Not Active, Not Active";;
*clocks_throttle*) echo "GPU-a, Not Active, Not Active, Active, Not Active";;
*remapped-rows*) echo "GPU-a, Yes, No"; echo "GPU-b, 0, 1";;
*) echo "GPU-a, NVIDIA H100 80GB HBM3, 3"; echo "GPU-b, NVIDIA H100 80GB HBM3, [N/A]";;
esac
"""  # noqa: E501


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_errors_remaps_and_lowered_clocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H100 80GB HBM3"
    smi(tmp_path, monkeypatch, SMI.format(old=""))
    healthy = Gpu(name, "GPU-b", None, False, True, [])
    assert gpus() == [Gpu(name, "GPU-a", 3, True, False, ["heat", "its hardware"]), healthy]
    smi(tmp_path, monkeypatch, SMI.format(old="exit 2;"))
    assert gpus() == [Gpu(name, "GPU-a", 3, True, False, ["its power supply"]), healthy], "an older driver"


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho No devices were found\n"])
def test_an_nvidia_smi_that_does_not_answer_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    smi(tmp_path, monkeypatch, script)
    assert gpus() is None


def test_interfaces_are_those_that_lead_elsewhere(tmp_path: Path) -> None:
    files = {
        "net/lo/operstate": "unknown", "net/docker0/operstate": "up", "net/eth0/operstate": "up",
        "net/eth0/speed": "25000", "net/eth1/operstate": "down", "net/eth1/speed": "-1",
        "ib/mlx5_0/ports/1/state": "4: ACTIVE", "ib/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        "ib/mlx5_1/ports/1/state": "1: DOWN", "ib/mlx5_1/ports/1/rate": "10 Gb/sec (4X SDR)",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert interfaces(tmp_path / "net", tmp_path / "ib") == [
        Interface("eth0", "ethernet", True, 25.0),
        Interface("eth1", "ethernet", False, None),
        Interface("mlx5_0:1", "infiniband", True, 400.0),
        Interface("mlx5_1:1", "infiniband", False, 10.0),
    ]


def test_another_package_before_it_on_the_path_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions()["safetensors"] != "0.0.1"
    info = tmp_path / "safetensors-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert versions()["safetensors"] == "0.0.1"


def test_a_host_has_cores_and_limits() -> None:
    found = this_host()
    assert found.cores == len(os.sched_getaffinity(0)) and found.open_files != 0
