"""The end of a run for a person: a short table, and the loss as a picture."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.units import loss_unit
from stoker.trainer.report.goodput import goodput
from stoker.trainer.report.metrics import steps
from stoker.trainer.report.progress import duration, rate
from stoker.trainer.report.task_results import has_tasks, in_words
from stoker.trainer.runtime.outcome import read_beginning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_STEPS_FROM = 1000  # from this length on, steps are drawn on a log axis
PLACE = (0.12, 0.115, 0.785, 0.745)  # of the axes in the picture: left, bottom, width, height; labels stand around them
MOST_POINTS = 20_000  # of a curve that are kept: several for each column of the picture

T = TypeVar("T")


class Sample(Generic[T]):
    """Of a series of any length every item, every second, every fourth, ...: at most `MOST_POINTS` of them."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._seen, self._stride = 0, 1

    def add(self, item: T) -> None:
        if self._seen % self._stride == 0:
            self.items.append(item)
        self._seen += 1
        if len(self.items) > MOST_POINTS:
            self.items, self._stride = self.items[::2], 2 * self._stride


class History:
    """What the table and the picture need of the steps of a run, in memory that does not grow with them."""

    def __init__(self, steps: Iterable[dict[str, Any]]) -> None:
        self.last: dict[str, Any] | None = None
        self.finite: dict[str, tuple[int, float]] = {}  # the last of each loss: step, value
        self.tasks: dict[str, Any] | None = None  # the last step after which tasks were run
        self.count = self.skipped = self.empty = 0
        self.seconds = 0.0
        self.losses, self.val_losses = Sample[tuple[int, float]](), Sample[tuple[int, float]]()
        self.speeds, self.skips = Sample[float](), Sample[int]()
        self.rates, self.tokens = Sample[tuple[int, float]](), Sample[tuple[int, int]]()
        self.gaps = Sample[tuple[int, int]]()  # first and last step of spans that are not there
        for step in steps:
            self._add(step)

    def _add(self, step: dict[str, Any]) -> None:
        number, skipped = step["step"], step.get("skipped", False)
        if self.last is not None and number > self.last["step"] + 1:
            self.gaps.add((self.last["step"] + 1, number - 1))
        self.last = step
        self.tasks = step if has_tasks(step) else self.tasks
        self.count += 1
        self.rates.add((number, step.get("lr") or 0.0))
        self.tokens.add((number, step.get("tokens") or 0))
        self.skipped += skipped
        self.empty += step.get("empty", False)
        self.seconds += step.get("step_seconds") or 0.0
        for key, sample in (("loss", self.losses), ("val_loss", self.val_losses), ("train_loss", None)):
            value = step.get(key)
            if value is not None:
                self.finite[key] = (number, value)
                if sample is not None:
                    sample.add((number, value))
        if step.get("tokens_per_second") is not None:
            self.speeds.add(step["tokens_per_second"])
        if skipped:
            self.skips.add(number)


def summarize(run_dir: Path, config: Config, outcome: str) -> str:
    """Draw `loss.png` and return the table, both from what is in the run directory.

    A picture that cannot be drawn is a line in the table, never an error.
    """
    run = RunDirectory(run_dir)
    history = History(steps(run.metrics))
    rows = table(history, run, config)
    if history.count > 1:
        try:
            title, marks = config.run.name or run.path.name, marks_of(history, run, config)
            rows.append(("picture", str(draw(history, run.loss_plot, title, marks, loss_unit(config.objective)))))
        except Exception as error:
            rows.append(("picture", f"not drawn: {type(error).__name__}: {str(error).partition(chr(10))[0]}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([outcome, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def table(history: History, run: RunDirectory, config: Config) -> list[tuple[str, str]]:
    """Rows about the steps, as (name, value)."""
    rows = []
    last = history.last
    if last is not None:
        updates = f"{last.get('updates', 0):,} updates" + (f", {history.skipped:,} skipped" if history.skipped else "")
        updates += f", {history.empty:,} of them without labels" if history.empty else ""
        rows.append(("steps", f"{last['step']:,} of {config.steps:,} ({updates})"))
        rows.append(("tokens", f"{last.get('tokens', 0):,}"))
        for name, key in (("loss", "loss"), ("val loss", "val_loss"), ("train loss", "train_loss")):
            if key in history.finite:
                step, value = history.finite[key]
                when = "" if step == last["step"] else f" at step {step:,}"
                rows.append((name, f"{value:.4f} {loss_unit(config.objective)}{when}"))
        if history.tasks is not None:
            rows.append(("tasks", in_words(history.tasks) or ""))
        if history.speeds.items:
            speed, training = statistics.median(history.speeds.items), duration(history.seconds)
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

    resumed: list[int]  # steps after which another attempt continued
    rolled_back: list[int]  # first step of each span that was found bad, and left out


def marks_of(history: History, run: RunDirectory, config: Config) -> Marks:
    """Steps that are missing, except those of `skip_steps`, were rolled back."""
    beginnings = [read_beginning(run, number) for number in run.attempt_numbers()[1:]]
    resumed = [beginning.from_step for beginning in beginnings if beginning is not None and beginning.from_step > 0]
    rolled_back = []
    for missing, end in history.gaps.items:
        for first, last in config.skip_steps:
            if first <= missing <= last:
                missing = last + 1
        if missing <= end:
            rolled_back.append(missing)
    return Marks(resumed, rolled_back)


def draw(history: History, path: Path, title: str, marks: Marks, unit: str) -> Path:
    """Draw `picture` as a PNG. Returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window system, no global state

    figure = picture(history, title, marks, unit)
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def picture(history: History, title: str, marks: Marks, unit: str = "nats per token") -> Figure:
    """Loss, in `unit`, validation loss and learning rate over steps, with tokens along the top."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    trained, validated, skipped = history.losses.items, history.val_losses.items, history.skips.items
    figure = Figure(figsize=(8, 4.5), dpi=144)
    axes = figure.add_axes(PLACE)  # a layout that measures all texts takes longer than the picture
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
    if history.last is not None and history.last["step"] >= LOG_STEPS_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.02)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1f2937")
    axes.set_xlabel("step", color=grey)
    axes.set_ylabel(f"loss ({unit})", color=grey)
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
    rates.plot(*zip(*history.rates.items, strict=True), color=pale, lw=1.0)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate", color=pale)
    rates.yaxis.set_major_formatter(lambda lr, _: rate(lr) if lr else "0")
    axes.set_zorder(rates.get_zorder() + 1)  # the loss stands before it
    axes.patch.set_visible(False)

    numbers, tokens = zip(*history.tokens.items, strict=True)
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(copy.copy(axes.xaxis.get_major_locator()))  # each belongs to one axis
    top.xaxis.set_minor_formatter(NullFormatter())
    top.xaxis.set_major_formatter(lambda step, _: count(float(np.interp(step, numbers, tokens, left=0))))
    top.set_xlabel("tokens", color=grey)
    for beside in (rates, top):
        beside.tick_params(which="both", colors=grey, labelsize=9)
        for spine in beside.spines.values():
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
