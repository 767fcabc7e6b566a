from __future__ import annotations

import json
import math
import struct

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stoker.trainer.report import summary
from stoker.trainer.report.metrics import MetricsFile, read
from stoker.trainer.report.summary import History, Marks, marks_of, picture, smooth, summarize
from stoker.trainer.runtime.outcome import Beginning, write_beginning
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


def test_the_picture_marks_attempts_and_rollbacks_and_shows_the_learning_rate_and_tokens(tmp_path):
    run, config = a_run(tmp_path / "demo"), a_config()
    config.skip_steps = [[20, 22]]
    for number, from_step in ((1, 0), (2, 0), (3, 10), (4, 25)):
        run.attempt(number).mkdir(parents=True)
        write_beginning(run, number, Beginning(0.0, from_step, 1, "here"))
    left_out = (20, 21, 22, 30, 33)
    write_steps(run, [record(step, lr=step / 1000) for step in range(1, 41) if step not in left_out])
    steps = read(run.metrics)
    history = History(steps)
    marks = marks_of(history, run, config)
    assert marks == Marks(resumed=[10, 25], rolled_back=[30, 33])
    figure = picture(history, "demo", marks)
    FigureCanvasAgg(figure).draw()
    axes, rate = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "rolled back", "resumed"]
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [10.5, 25.5]
    [line] = [line for line in axes.lines if line.get_label() == "rolled back"]
    assert list(line.get_xdata()) == [30, 33]
    assert list(rate.lines[0].get_ydata()) == [step["lr"] for step in steps]
    [top] = axes.child_axes
    ticks = {tick.get_position()[0]: tick.get_text() for tick in top.get_xticklabels()}
    assert ticks[20.0] == "20k" and ticks[40.0] == "40k"  # a thousand tokens a step


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
