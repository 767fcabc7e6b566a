"""A plan as tables for a terminal, and as JSON for programs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from stoker.conf.printable import printable
from stoker.launch.inspect import console_for_tables
from stoker.launch.layout import ranks_in_words
from stoker.launch.plan.search import Found, settings
from stoker.models.loss import CHUNK
from stoker.parallel.dtypes import PRECISIONS
from stoker.trainer.plan.make import GIB, HOLES, MALLOC_HOLES, RESERVED, Plan
from stoker.trainer.plan.times import DAY, HOUR, RESTART_SECONDS, STORAGE, rates_of
from stoker.trainer.rehearsal import Category, Peak, Rehearsal, Work
from stoker.trainer.report.predicted import COLUMNS, cells
from stoker.trainer.report.progress import brief, size

MIB = 2**20
RULE_BYTES, RULE_SHARE = 18, 0.8  # masters, two moments, gradients and a copy in 16 bits; of a device's memory
LARGE = 8 * GIB  # from which on memory is shown in GiB


def print_plan(plan: Plan) -> None:
    """Print the model and its layout, the table of memory, and whether it fits."""
    console = console_for_tables()
    for line in head(plan):
        console.print(printable(line), soft_wrap=True, markup=False)
    console.print()
    console.print(memory_table(plan))
    console.print()
    console.print(message_table(plan))
    console.print()
    for line in [*verdict(plan), *time_lines(plan)]:
        console.print(printable(line), soft_wrap=True, markup=False)


def print_measured(attempt: int, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the plan of an attempt beside what its steps measured."""
    console = console_for_tables()
    for line in head(plan):
        console.print(printable(line), soft_wrap=True, markup=False)
    console.print()
    what, *figures = COLUMNS
    title = f"plan of attempt {attempt} against measured"
    columns = [Column(what), *(Column(name, justify="right") for name in figures)]
    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print()
    peak = plan.classes[0].rehearsal.peak
    with_ = "malloc's holes and the program" if plan.machine.kind == "cpu" else "the allocator's holes"
    line = f"counted: {_amount(peak.bytes)} live at the peak of rank {plan.classes[0].ranks[0]}; predicted with {with_}"
    console.print(line, soft_wrap=True, markup=False)


def print_messages(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the messages that were predicted of rank 0 beside those that it counted in a step."""
    columns = [Column(f"messages of rank 0, step {step}"), Column("over")]
    names = ("predicted", "counted", "bytes predicted", "bytes counted")
    columns += [Column(name, justify="right") for name in names]
    table = Table(*columns, Column(""), box=None, pad_edge=False)
    for row in rows:
        numbers = [f"{number:,}" for number in (*row["count"], *row["bytes"])]
        table.add_row(row["kind"], row["group"], *numbers, "equal" if row["equal"] else "differ")
    console = console_for_tables()
    console.print()
    console.print(table)


def print_search(found: Found, given: Sequence[str], best: str | None) -> None:
    """Print the ranked layouts, and the line that starts the best."""
    console = console_for_tables()
    counts = f"{found.layouts:,} layouts are not refused, {found.likely:,} of them could fit by a guess"
    print_line = functools.partial(console.print, soft_wrap=True, markup=False)
    print_line(f"{counts}; {found.rehearsed} rehearsed in the order of their guessed step, {len(found.ranked)} fit")
    if best is None:
        print_line("none of them fits: more devices, or larger ones, or a smaller batch.micro_size or seq_len")
        return
    console.print()
    right = [Column(name, justify="right") for name in ("step", "tokens/s", "MFU", "of a device")]
    table = Table(*right, "settings", box=None, pad_edge=False)
    for plan in found.ranked:
        assert plan.times is not None
        figures = f"{plan.times.tokens_per_second:,.0f}", f"{plan.times.mfu:.0%}", _amount(plan.needed)
        table.add_row(brief(plan.times.step.total), *figures, " ".join(settings(plan.config, given)))
    console.print(table)
    console.print()
    device = found.ranked[0].machine.device
    rates = rates_of(device, found.ranked[0].config.precision) if device is not None else None
    if rates is not None:
        print_line(printable(f"assumed: {rates.assumed}"))
    print_line(printable(best))


def head(plan: Plan) -> list[str]:
    config, batch = plan.config, plan.batch
    device = plan.machine.device
    where = {"cpu": "CPUs"}.get(plan.machine.kind, device.name if device is not None else "GPUs")
    several = "es" if batch.micro_batches > 1 else ""
    rows = f"{batch.micro_batches} micro-batch{several} of {batch.micro_rows} x {config.seq_len:,} tokens on each rank"
    recomputed, chunk = config.activation_checkpointing, config.model.loss_chunk
    at_a_time = "" if chunk is None else f"; loss: {chunk:,} tokens at a time"
    return [
        f"{config.model.name}: {plan.parameters:,} parameters, {config.precision}, on {plan.layout.world:,} {where}",
        f"layout: {plan.layout}; {rows}; activation checkpointing: {recomputed}{at_a_time}",
        *([f"batch.ramp: {_ramp(plan)}"] if plan.sizes else []),
    ]


def _ramp(plan: Plan) -> str:
    """The sizes of steps; all else that is shown is of the largest."""
    listed = []
    for each in plan.sizes:
        of = f"{each.micro_batches} micro-batch{'es' if each.micro_batches > 1 else ''}"
        takes = "" if each.step_seconds is None else f", {brief(each.step_seconds)} each"
        listed.append(f"{each.rows:,} sequences from step {each.first:,} ({of}{takes})")
    return ", ".join(listed) + "; below, those of the largest"


def memory_table(plan: Plan) -> Table:
    """A line for each class of ranks, a column for each category that any of them has at its peak."""
    most = plan.classes[0].rehearsal.peak.bytes
    unit, name = (GIB, "GiB") if most >= LARGE else (MIB, "MiB")
    found = [
        category for category in Category if any(category in each.rehearsal.peak.categories for each in plan.classes)
    ]
    shown = [category for category in found if category != Category.OTHER]
    columns = [Column("ranks"), *([Column("stage")] if plan.layout.pp > 1 else [])]
    columns += [Column(category.value, justify="right") for category in shown]
    columns += [Column("at the peak", justify="right"), Column("while")]
    columns += [Column("building", justify="right"), Column("between steps", justify="right")]
    table = Table(*columns, title=f"memory of a rank, {name}", title_justify="left", box=None, pad_edge=False)
    for number, each in enumerate(plan.classes):
        peak = each.rehearsal.peak
        worst = "*" if number == 0 and len(plan.classes) > 1 else ""
        cells = [ranks_in_words(each.ranks) + worst, *([each.stages] if plan.layout.pp > 1 else [])]
        cells += [_number(peak.categories.get(category, 0) / unit) for category in shown]
        cells += [_number(peak.bytes / unit), peak.phase]
        cells += [_number(each.rehearsal.build.bytes / unit), _number(each.rehearsal.held.bytes / unit)]
        table.add_row(*cells)
    return table


def message_table(plan: Plan) -> Table:
    """The messages of a step of each class of ranks."""
    columns = [Column("ranks"), Column("messages of a step"), Column("over"), Column("of ranks", justify="right")]
    columns += [Column("number", justify="right"), Column("bytes together", justify="right")]
    table = Table(*columns, box=None, pad_edge=False)
    for each in plan.classes:
        work = each.rehearsal.passes.plus(each.rehearsal.update)
        for (kind, name), traffic in sorted(work.messages.items()):
            ranks = f"{len(each.rehearsal.groups[name]):,}"
            cells = [ranks_in_words(each.ranks), kind, name, ranks, f"{traffic.count:,}", size(traffic.bytes)]
            table.add_row(*cells)
    return table


def time_lines(plan: Plan) -> list[str]:
    """Operations, the time of a step by part, of a run, its cost, and how often to save."""
    flops, times = f"{plan.flops / 1e12:,.2f} TFLOP a step on all ranks", plan.times
    lines = [f"{flops}, attention as if it were not causal"]
    if times is None:
        if plan.machine.kind == "cuda":
            lines.append("no times: the device's rates are not known")
        return lines
    step = times.step
    parts = {part.replace("_", " "): seconds for part, seconds in vars(step).items() if seconds >= 5e-5}
    listed = ", ".join(f"{part} {brief(seconds)}" for part, seconds in parts.items())
    lines.append(f"estimated step of {brief(step.total)}: {listed}")
    lines.append(
        f"{times.tokens_per_second:,.0f} tokens/s, {times.tokens_per_second * DAY:.3g} a day, MFU {times.mfu:.0%}; "
        f"{times.tokens:.3g} tokens take {times.seconds / DAY:,.2f} days"
    )
    device = plan.machine.device
    rates = rates_of(device, plan.config.precision) if device is not None else None
    if rates is not None:
        lines.append(f"assumed: {rates.assumed}")
    if plan.failures is not None:
        found = plan.failures
        lines.append(
            f"with a failure every {found.mtbf / HOUR:g} hours: goodput {found.goodput:.1%}, saving every "
            f"{found.interval / 60:,.1f} minutes (checkpoint.minutes={max(found.interval / 60, 0.1):.1f}), assumed "
            f"{STORAGE / 1e9:g} GB/s a rank to storage and {RESTART_SECONDS / 60:g} minutes for a restart"
        )
    if plan.cost is not None:
        lines.append(f"cost at {plan.price:g} a device and hour: {plan.cost:,.0f}")
    return lines


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what is left; what a snapshot needs besides."""
    device, needed = plan.machine.device, _amount(plan.needed)
    lines = []
    if plan.machine.kind == "cpu":
        what = f"{needed} for all ranks, with the programs and {MALLOC_HOLES - 1:.0%} for malloc's holes"
        whose = "available here"
    else:
        what = f"{needed}, with {HOLES - 1:.0%} for the allocator's holes and {_amount(RESERVED)} for CUDA and NCCL"
        whose = f"of one {device.name}" if device is not None else ""
    if plan.capacity is None:
        lines.append(f"{what}; --gpu NAME says whether it fits")
    else:
        left = plan.capacity - plan.needed
        fits = f"fits, {_amount(left)} to spare" if left >= 0 else f"does not fit, {_amount(-left)} too much"
        lines.append(f"{what}, of {_amount(plan.capacity)} {whose}: {fits}")
    lines.append(f"a snapshot for a checkpoint: {_amount(plan.staged)} of a rank on average, in the memory of the host")
    lines.append(_rule_of_thumb(plan))
    if plan.machine.kind == "cuda":
        lines.append("rehearsed without compilation: compiled blocks keep less")
    return lines


def _rule_of_thumb(plan: Plan) -> str:
    """18 bytes a parameter, and the compute dtype's of a frozen one, over 80% of a device's memory, beside what was
    counted."""
    stored = PRECISIONS[plan.config.precision].itemsize
    states, device = RULE_BYTES * plan.trained + stored * plan.frozen, plan.machine.device
    each = f"{RULE_BYTES} bytes a parameter" + (f" that is trained, {stored} a frozen one" if plan.frozen else "")
    text = f"rule of thumb: {each}, {size(states)} of states"
    if device is not None:
        text += f", {math.ceil(states / (RULE_SHARE * device.memory_gib * 1e9)):,} devices"
    text += f"; counted: {size(plan.states)} on all ranks between steps"
    return text + " (replicas count each, gradients and copies only where they stay), and activations besides"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, bytes as numbers."""
    device, batch = plan.machine.device, plan.batch
    return {
        "model": plan.config.model.name,
        "parameters": plan.parameters,
        "layout": str(plan.layout),
        "ranks": plan.layout.world,
        "micro_batches": batch.micro_batches,
        "micro_rows": batch.micro_rows,
        "seq_len": plan.config.seq_len,
        "loss_chunk": CHUNK if plan.config.model.loss_chunk is None else plan.config.model.loss_chunk,
        "kind": plan.machine.kind,
        "device": device.name if device is not None else None,
        "capacity_bytes": plan.capacity,
        "needed_bytes": plan.needed,
        "fits": plan.fits,
        "states_bytes": plan.states,
        "flops": plan.flops,
        "times": _times(plan),
        "failures": None if plan.failures is None else dataclasses.asdict(plan.failures),
        "cost": plan.cost,
        "sizes": [dataclasses.asdict(each) for each in plan.sizes],
        "classes": [
            {"ranks": list(each.ranks), "stages": each.stages, **_rehearsal(each.rehearsal)} for each in plan.classes
        ],
    }


def ranked_as_json(plan: Plan) -> dict[str, Any]:
    """A layout that a search rehearsed: of a pipeline only its first and last ranks."""
    return {"layout": str(plan.layout), "needed_bytes": plan.needed, "fits": plan.fits, "times": _times(plan)}


def _rehearsal(rehearsal: Rehearsal) -> dict[str, Any]:
    names = ("build", "step", "held", "evaluation", "peak")
    return {name: _peak(getattr(rehearsal, name)) for name in names} | {
        "staged_bytes": rehearsal.staged,
        "passes": _work(rehearsal.passes),
        "update": _work(rehearsal.update),
    }


def _times(plan: Plan) -> dict[str, Any] | None:
    """Seconds, but for shares and tokens."""
    if plan.times is None:
        return None
    found = dataclasses.asdict(plan.times)
    return found | {"step": found["step"] | {"total": plan.times.step.total}}


def _work(work: Work) -> dict[str, Any]:
    messages = [
        {"kind": kind, "group": name, "count": traffic.count, "bytes": traffic.bytes}
        for (kind, name), traffic in sorted(work.messages.items())
    ]
    return {"flops": work.flops, "moved_bytes": work.moved, "messages": messages}


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        "bytes": peak.bytes,
        "phase": peak.phase,
        "categories": {category.value: size for category, size in peak.categories.items()},
    }


def _amount(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if abs(size) >= GIB else f"{size / MIB:,.0f} MiB"


def _number(value: float) -> str:
    return f"{value:,.2f}" if 0 < value < 10 else f"{value:,.1f}"
