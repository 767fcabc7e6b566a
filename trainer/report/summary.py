"""The end of a run for a person: a short table, and the loss as a picture."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.trainer.report.goodput import goodput
from stoker.trainer.report.metrics import read
from stoker.trainer.report.progress import duration, rate
from stoker.trainer.runtime.outcome import read_beginning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_STEPS_FROM = 1000  # from this length on, steps are drawn on a log axis

Steps = list[dict[str, Any]]


def summarize(run_dir: Path, config: Config, outcome: str) -> str:
    """Draw `loss.png` and return the table, both from what is in the run directory.

    A picture that cannot be drawn is a line in the table, never an error.
    """
    run = RunDirectory(run_dir)
    steps = read(run.metrics)
    rows = table(steps, run, config)
    if len(steps) > 1:
        try:
            rows.append(
                (
                    "picture",
                    str(draw(steps, run.loss_plot, config.run.name or run.path.name, marks_of(steps, run, config))),
                )
            )
        except Exception as error:
            rows.append(("picture", f"not drawn: {type(error).__name__}: {str(error).partition(chr(10))[0]}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([outcome, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def table(steps: Steps, run: RunDirectory, config: Config) -> list[tuple[str, str]]:
    """Rows about `steps`, as (name, value)."""
    rows = []
    if steps:
        last = steps[-1]
        skipped = sum(step["skipped"] for step in steps)
        empty = sum(step.get("empty", False) for step in steps)
        updates = f"{last['updates']:,} updates" + (f", {skipped:,} skipped" if skipped else "")
        updates += f", {empty:,} of them without labels" if empty else ""
        rows.append(("steps", f"{last['step']:,} of {config.steps:,} ({updates})"))
        rows.append(("tokens", f"{last['tokens']:,}"))
        for name, key in (("loss", "loss"), ("val loss", "val_loss")):
            finite = [step for step in steps if step.get(key) is not None]
            if finite:
                when = "" if finite[-1] is last else f" at step {finite[-1]['step']:,}"
                rows.append((name, f"{finite[-1][key]:.4f} nats per token{when}"))
        speed = statistics.median(step["tokens_per_second"] for step in steps)
        training = duration(sum(step["step_seconds"] for step in steps))
        rows.append(("speed", f"{speed:,.0f} tokens/s (median), {training} in steps"))
    spent = goodput(run, time.time())
    if spent.total:
        rows.append(
            (
                "time",
                f"{duration(spent.total)} in {spent.attempts} attempts"
                if spent.attempts > 1
                else duration(spent.total),
            )
        )
        rows.append(("goodput", str(spent)))
    committed = len(list(run.checkpoints.glob("*/MANIFEST.json")))
    rows.append(("checkpoints", f"{committed} kept"))
    rows.append(("run", str(run.path)))
    return rows


@dataclass(frozen=True)
class Marks:
    """What happened between steps."""

    resumed: list[int]  # steps after which another attempt went on
    rolled_back: list[int]  # steps that were found bad, and left out


def marks_of(steps: Steps, run: RunDirectory, config: Config) -> Marks:
    """Steps that are missing, but for those of `skip_steps`, were rolled back."""
    beginnings = [read_beginning(run, number) for number in run.attempt_numbers()[1:]]
    resumed = [beginning.from_step for beginning in beginnings if beginning is not None and beginning.from_step > 0]
    missing = [
        step
        for before, after in pairwise(steps)
        for step in range(before["step"] + 1, after["step"])
        if not any(first <= step <= last for first, last in config.skip_steps)
    ]
    return Marks(resumed, missing)


def draw(steps: Steps, path: Path, title: str, marks: Marks) -> Path:
    """Draw `picture` as a PNG. Returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window system, no global state

    figure = picture(steps, title, marks)
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def picture(steps: Steps, title: str, marks: Marks) -> Figure:
    """Loss, validation loss and learning rate over steps, with tokens along the top."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    trained = [(step["step"], step["loss"]) for step in steps if step["loss"] is not None]
    validated = [(step["step"], step["val_loss"]) for step in steps if step.get("val_loss") is not None]
    skipped = [step["step"] for step in steps if step["skipped"]]
    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    blue, orange, grey = "#2f6db3", "#d9641e", "#6b7280"

    noisy = len(trained) >= 40
    if trained:
        axes.plot(*zip(*trained, strict=True), color=blue, lw=0.8 if noisy else 1.6, alpha=0.3 if noisy else 1.0)
        line = smooth(trained) if noisy else trained
        axes.plot(*zip(*line, strict=True), color=blue, lw=1.8, label="training" + (", smoothed" if noisy else ""))
    if validated:
        marker = "o-" if len(validated) <= 30 else "-"
        axes.plot(*zip(*validated, strict=True), marker, color=orange, lw=1.4, ms=4, label="validation")
    floor = axes.get_xaxis_transform()
    for name, places, marker in (("skipped", skipped, "|"), ("rolled back", marks.rolled_back, "x")):
        if places:
            axes.plot(places, [0.015] * len(places), marker, color="#b91c1c", ms=8, transform=floor, label=name)
    for place in marks.resumed:
        label = "resumed" if place == marks.resumed[0] else None
        axes.axvline(place + 0.5, color=grey, lw=0.8, ls=":", label=label)

    losses = [loss for _, loss in trained + validated]
    if losses and min(losses) > 0 and max(losses) > 2 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if steps[-1]["step"] >= LOG_STEPS_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.02)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1f2937")
    axes.set_xlabel("step", color=grey)
    axes.set_ylabel("loss (nats per token)", color=grey)
    axes.tick_params(which="both", colors=grey, labelsize=9)
    axes.grid(True, which="major", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#9ca3af")
    if losses or skipped:
        axes.legend(frameon=False, fontsize=9, labelcolor=grey)

    pale = "#9ca3af"
    rates = axes.twinx()
    rates.plot([step["step"] for step in steps], [step["lr"] for step in steps], color=pale, lw=1.0)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate", color=pale)
    rates.yaxis.set_major_formatter(lambda lr, _: rate(lr) if lr else "0")
    axes.set_zorder(rates.get_zorder() + 1)  # the loss stands before it
    axes.patch.set_visible(False)

    numbers, tokens = [step["step"] for step in steps], [step["tokens"] for step in steps]
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(copy.copy(axes.xaxis.get_major_locator()))  # each belongs to one axis
    top.xaxis.set_minor_formatter(NullFormatter())
    top.xaxis.set_major_formatter(lambda step, _: count(float(np.interp(step, numbers, tokens, left=0))))
    top.set_xlabel("tokens", color=grey)
    for side in (rates, top):
        side.tick_params(which="both", colors=grey, labelsize=9)
        for spine in side.spines.values():
            spine.set_visible(False)
    return figure


def count(number: float) -> str:
    """`512`, `1.5k`, `33M`, `1.2B`."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over a window around each step that grows with it, so that an early fall is not smeared out."""
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    line = []
    for i, (step, _) in enumerate(points):
        reach = min(i // 10, len(points) // 50)
        low, high = i - reach, min(i + reach + 1, len(points))
        line.append((step, (sums[high] - sums[low]) / (high - low)))
    return line
