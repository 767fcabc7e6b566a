"""A plan as tables for a terminal, and as JSON for programs."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table

from stoker.conf.printable import printable
from stoker.launch.inspect import console_for_tables
from stoker.launch.layout import ranks_in_words
from stoker.launch.plan.make import GIB, HOLES, MALLOC_HOLES, RESERVED, Plan
from stoker.trainer.rehearsal import Category, Peak, Rehearsal

MIB = 2**20
LARGE = 8 * GIB  # from which on memory is shown in GiB


def print_plan(plan: Plan) -> None:
    """Print the model and its layout, the table of memory, and whether it fits."""
    console = console_for_tables()
    for line in head(plan):
        console.print(printable(line), soft_wrap=True, markup=False)
    console.print()
    console.print(memory_table(plan))
    console.print()
    for line in verdict(plan):
        console.print(printable(line), soft_wrap=True, markup=False)


def head(plan: Plan) -> list[str]:
    config, batch = plan.config, plan.batch
    device = plan.machine.device
    where = {"cpu": "CPUs"}.get(plan.machine.kind, device.name if device is not None else "GPUs")
    rows = f"{batch.micro_batches} micro-batches of {batch.micro_rows} x {config.seq_len:,} tokens on each rank"
    recomputed = config.activation_checkpointing
    return [
        f"{config.model.name}: {plan.parameters:,} parameters, {config.precision}, on {plan.layout.world:,} {where}",
        f"layout: {plan.layout}; {rows}; activation checkpointing: {recomputed}",
    ]


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


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what is left; what a snapshot needs besides."""
    device, needed = plan.machine.device, _amount(plan.needed)
    staged = sum(len(each.ranks) * each.rehearsal.staged for each in plan.classes) / plan.layout.world
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
    lines.append(f"a snapshot for a checkpoint: {_amount(staged)} of a rank on average, in the memory of the host")
    if plan.machine.kind == "cuda":
        lines.append("rehearsed without compilation: compiled blocks keep less")
    return lines


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
        "kind": plan.machine.kind,
        "device": device.name if device is not None else None,
        "capacity_bytes": plan.capacity,
        "needed_bytes": plan.needed,
        "fits": plan.fits,
        "classes": [
            {"ranks": list(each.ranks), "stages": each.stages, **_rehearsal(each.rehearsal)} for each in plan.classes
        ],
    }


def _rehearsal(rehearsal: Rehearsal) -> dict[str, Any]:
    names = ("build", "step", "held", "evaluation", "peak")
    return {name: _peak(getattr(rehearsal, name)) for name in names} | {"staged_bytes": rehearsal.staged}


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
