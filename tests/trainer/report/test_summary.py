from __future__ import annotations

import json
import math
import struct

import pytest

from stoker.trainer.report import summary
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.summary import smooth, summarize
from tests.trainer.report.observed import a_config, a_run, record


def write_steps(run, records) -> None:
    metrics = MetricsFile(run.metrics)
    metrics.start(a_config(), None, 200, {})
    for each in records:
        metrics.step(each)
    metrics.finish("completed", 0)


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_summary_shows_the_results_of_the_run(tmp_path):
    run = a_run(tmp_path / "demo")
    speeds = [1000.0, 9000.0, 3000.0]
    records = [
        record(i + 1, tokens_per_second=speed, val_loss=2.5 if i == 1 else None) for i, speed in enumerate(speeds)
    ]
    records.append(record(4, updates=3, loss=math.nan, skipped=True, tokens_per_second=3000.0))
    write_steps(run, records)
    for step, committed in ((2, True), (4, False)):
        directory = run.checkpoints / f"step-{step}"
        directory.mkdir(parents=True)
        if committed:
            (directory / "MANIFEST.json").write_text("{}")
    assert summarize(run.path, a_config(steps=10), "stopped").splitlines() == [
        "stopped",
        "  steps        4 of 10 (3 updates, 1 skipped)",
        "  tokens       4,000",
        "  loss         1.0000 nats per token at step 3",
        "  val loss     2.5000 nats per token at step 2",
        "  speed        3,000 tokens/s (median), 2s in steps",
        "  checkpoints  1 kept",
        f"  run          {run.path}",
        f"  picture      {run.loss_plot}",
    ]
    assert png_size(run.loss_plot) == (1152, 648)


@pytest.mark.parametrize(
    "records",
    [
        [record(i, loss=1.2 + 4 / i, val_loss=1.3 + 4 / i if i % 20 == 0 else None) for i in range(1, 1500)],
        [record(1, loss=math.nan, skipped=True), record(2, loss=math.inf, skipped=True)],
        [record(1, loss=0.0), record(2, loss=-1.0)],
        [record(1001), record(1002)],
    ],
    ids=["long", "all skipped", "not positive", "two steps"],
)
def test_every_run_can_be_drawn(tmp_path, records):
    run = a_run(tmp_path / "demo")
    write_steps(run, records)
    assert f"picture      {run.loss_plot}" in summarize(run.path, a_config(), "completed")
    assert png_size(run.loss_plot) == (1152, 648)


def test_a_run_without_a_step_has_a_summary_and_no_picture(tmp_path):
    run = a_run(tmp_path / "demo")
    assert summarize(run.path, a_config(), "failed") == f"failed\n  checkpoints  0 kept\n  run          {run.path}"


def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path, monkeypatch):
    run = a_run(tmp_path / "demo")
    write_steps(run, [record(1), record(2)])

    def refuse(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(summary, "draw", refuse)
    assert (
        summarize(run.path, a_config(), "completed").splitlines()[-1]
        == "  picture      not drawn: RuntimeError: no fonts"
    )


def test_a_torn_metrics_file_is_summarized(tmp_path):
    run = a_run(tmp_path / "demo")
    write_steps(run, [record(1)])
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"step": 2})[:-1])
    assert "1 of 200" in summarize(run.path, a_config(), "failed")


def test_smoothing_keeps_steps_and_straight_lines():
    line = [(step, 2.0 * step) for step in range(1, 200)]
    smoothed = smooth(line)
    assert [step for step, _ in smoothed] == [step for step, _ in line]
    assert [loss for _, loss in smoothed][:190] == pytest.approx([loss for _, loss in line][:190])
