"""`stoker plan --png`: the columns of the picture are the spans of the step, to the highest of which it rises."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from stoker.launch.cli import main
from stoker.launch.plan import picture
from stoker.trainer.plan.make import GIB, Plan

SMALL = ["model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=3", "seq_len=64"]


def test_a_picture_is_drawn_of_every_span_of_the_step_by_category(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[Plan] = []
    original = picture.draw

    def seen(plan: Plan, path: Path) -> None:
        drawn.append(plan)
        original(plan, path)

    monkeypatch.setattr(picture, "draw", seen)
    assert main(["plan", *SMALL, "--gpu", "H100", "--gpus", "2", "--png", "memory.png"]) == 0
    assert "picture memory.png" in capsys.readouterr().err
    data = (tmp_path / "memory.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1200, 600)
    [plan] = drawn
    worst = plan.classes[0].rehearsal
    figure = picture.figure_of(plan)
    [axes] = figure.axes
    tops: dict[int, float] = {}
    for column in axes.patches:
        at = round(column.get_x() + 0.5)
        tops[at] = max(tops.get(at, 0.0), column.get_y() + column.get_height())
    assert [tops[at] * GIB for at in sorted(tops)] == pytest.approx([span.peak.bytes for span in worst.spans])
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"fp32 parameters", "memory of H100"}


def test_a_search_has_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--gpu", "H100", "--gpus", "2", "--search", "--png", "memory.png"]) == 2
    assert "a picture is of one layout" in capsys.readouterr().err
