"""Ranges of modules: names, order beside other hooks, and nothing outside of traced steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from stoker.trainer.report.module_ranges import ModuleRanges, modules_to_mark


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"3": Block(), "4": Block()})
        self.norm = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers["4"](self.layers["3"](x)))

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())


def traced(file: Path, ranges: ModuleRanges, model: nn.Module) -> list[dict[str, Any]]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded, ranges:
        model(torch.ones(1, 2))
    recorded.export_chrome_trace(str(file))
    found = [e for e in json.loads(file.read_text())["traceEvents"] if str(e["name"]).startswith("module:")]
    return sorted(found, key=lambda event: event["ts"])


def test_modules_have_their_global_names_and_nothing_is_marked_inside_of_compiled_blocks() -> None:
    stage = Stage()
    assert set(modules_to_mark([stage], opaque=True)) == {"layers", "layers.3", "layers.4", "norm"}
    assert set(modules_to_mark([stage], opaque=False)) == {
        "layers", "layers.3", "layers.3.inner", "layers.4", "layers.4.inner", "norm",
    }  # fmt: skip


def test_each_forward_is_a_range_and_afterwards_no_hook_is_left(tmp_path: Path) -> None:
    stage = Stage()
    found = traced(tmp_path / "t", ModuleRanges(modules_to_mark([stage], opaque=False)), stage)
    assert [event["name"].removeprefix("module:") for event in found] == [
        "layers.3", "layers.3.inner", "layers.4", "layers.4.inner", "norm",
    ]  # fmt: skip
    outer, inner = found[:2]
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.modules())


def test_a_forward_that_raises_ends_its_range(tmp_path: Path) -> None:
    stage = Stage()
    stage.layers["4"].inner.weight.data = torch.ones(3, 3)
    with (
        profile(activities=[ProfilerActivity.CPU]) as recorded,
        ModuleRanges(modules_to_mark([stage], opaque=False)),
        pytest.raises(RuntimeError),
    ):
        stage(torch.ones(1, 2))
    torch.ones(1)
    recorded.export_chrome_trace(str(tmp_path / "t"))
    names = {e["name"] for e in json.loads((tmp_path / "t").read_text())["traceEvents"]}
    assert {"module:layers.4", "module:layers.4.inner"} <= names
