"""`stoker data plan`: what a run reads, and what it leaves out."""

from __future__ import annotations

import argparse

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from stoker.conf.printable import printable
from stoker.conf.ramp import ramp_of
from stoker.data import open_rows
from stoker.data.indexed import IndexPlan
from stoker.data.mixed import MixedPlan
from stoker.data.opening import open_source
from stoker.data.sources import specs_of
from stoker.launch.data_make import composed
from stoker.launch.inspect import console_for_tables
from stoker.trainer.budget import settle_steps


def plan(options: argparse.Namespace) -> int:
    """A table of what a run of this config reads of each source. Raises ValueError for data.mode=streaming."""
    config = composed(options.overrides)
    if config.data.mode == "streaming":
        raise ValueError(
            "data plan counts documents and rows, which data.mode=streaming does not know before it has read them: "
            "stoker data verify with the same keys reads all data and counts the documents"
        )
    config = settle_steps(config, options.overrides, first=True)
    rows = open_rows(config, "train")
    plans = rows.plans if isinstance(rows, MixedPlan) else (rows,)
    ramp = ramp_of(config)
    steps = config.steps if rows.total_rows is None else min(config.steps, ramp.steps_of(rows.total_rows))
    last = ramp.rows_before(steps + 1)
    counts = rows.counts(last)
    names = ("documents", "validation", "left out", "tokens", "rows", "full", "read", "share", "epochs")
    right = [Column(name, justify="right") for name in names]
    table = Table(Column("source"), *right, box=None, pad_edge=False, header_style="bold")
    held_out = {spec.name: len(open_source(config, spec, "validation").tokens.starts) for spec in specs_of(config.data)}
    for one in plans:
        read = counts[one.name]["rows"]
        table.add_row(
            Text(printable(one.name)),
            f"{len(one.tokens.starts):,}",
            f"{held_out[one.name]:,}",
            "unknown" if one.left_out is None else f"{one.left_out:,}",
            f"{len(one.tokens.ids):,}",
            f"{one.rows_per_epoch:,}",
            f"{_fullness(one):.1%}",
            f"{read:,}",
            f"{read / max(1, last):.2%}",
            f"{read / one.rows_per_epoch:.2f}",
        )
    console_for_tables().print(table)
    sizes = f"{ramp.size(1)} to {config.batch.size}" if config.batch.ramp else config.batch.size
    print(
        f"{steps:,} steps of {sizes} rows of {config.seq_len} tokens, packing {config.data.packing}: "
        f"{last:,} rows, {last * config.seq_len:,} tokens with padding"
    )
    for one in plans:
        if one.left_out:
            print(printable(f"{one.name}: {one.left_out:,} documents without text are left out"))
        if one.tokens_in_no_row:
            lost = f"the last {one.tokens_in_no_row:,} tokens of an epoch fill no row and are left out"
            print(printable(f"{one.name}: {lost}"))
    wanted = ramp.rows_before(config.steps + 1)
    if last < wanted:
        print(f"the data end there: steps={config.steps} would need {wanted:,} rows")
    return 0


def _fullness(rows: IndexPlan) -> float:
    """Share of the places of the rows that hold a token."""
    if rows.table is None:
        return 1.0
    return float(np.minimum(rows.table.lengths, rows.seq_len).sum() / max(1, len(rows.table) * rows.seq_len))
