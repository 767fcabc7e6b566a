"""`stoker plan --png`: the memory of a rank over a step, by category, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.trainer.plan.make import GIB, Plan
from stoker.trainer.rehearsal import Category, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES, DOTS = (10, 5), 120


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG of the class of ranks that needs most. Raises OSError where `path` cannot be written.

    A column is a span of the step: a block of layers on the way forward or backward, or the update; what is drawn is
    the moment of it at which most is live. The line is what a device has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no window system, no global state

    FigureCanvasAgg(figure_of(plan)).print_figure(path, dpi=DOTS, format="png")


def figure_of(plan: Plan) -> Figure:
    """What `draw` writes."""
    from matplotlib.figure import Figure

    worst = plan.classes[0]
    spans = worst.rehearsal.spans
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    below = [0.0] * len(spans)
    for category in Category:  # what stays first, and on it what comes and goes
        sizes = [span.peak.categories.get(category, 0) / GIB for span in spans]
        if any(sizes):
            axes.bar(range(len(spans)), sizes, width=1.0, bottom=below, label=category.value, linewidth=0)
            below = [low + size for low, size in zip(below, sizes, strict=True)]
    if plan.machine.kind == "cuda" and plan.capacity is not None:
        axes.axhline(plan.capacity / GIB, color="black", linestyle="--", label=f"memory of {_device(plan)}")
    axes.set_xticks(*_turns(spans))
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, len(spans) - 0.5)
    axes.set_xlabel("blocks of layers, in the order of the step")
    axes.set_ylabel("GiB")
    axes.set_title(f"{plan.config.model.name}, rank {worst.ranks[0]}: {plan.layout}, a step")
    figure.legend(loc="outside right upper", reverse=True)
    return figure


def _turns(spans: Sequence[Span]) -> tuple[list[int], list[str]]:
    """Where the way through the step changes, and its names from there."""
    ways = [span.mark.way for span in spans]
    turns = [at for at, way in enumerate(ways) if at == 0 or ways[at - 1] != way]
    shown = turns if len(turns) <= 12 else []
    return shown, [ways[at] for at in shown]


def _device(plan: Plan) -> str:
    return plan.machine.device.name if plan.machine.device is not None else "the device"
