"""`stoker data plan` and `verify`: what a run reads, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Column, Table

from stoker.conf.schema import Config
from stoker.data import open_rows
from stoker.data.cache import META, cache_root, open_folder
from stoker.data.cache import verify as verify_tokens
from stoker.data.indexed import IndexPlan
from stoker.data.mixed import MixedPlan
from stoker.data.tables import verify_table
from stoker.launch.data_make import composed


def plan(options: argparse.Namespace) -> int:
    """A table of what a run of this config reads of each source."""
    config = composed(options.overrides)
    rows = open_rows(config, "train")
    plans = rows.plans if isinstance(rows, MixedPlan) else (rows,)
    wanted = config.steps * config.batch.size
    last = wanted if rows.total_rows is None else min(wanted, rows.total_rows // config.batch.size * config.batch.size)
    counts = rows.counts(last)
    right = [
        Column(name, justify="right") for name in ("documents", "tokens", "rows", "full", "read", "share", "epochs")
    ]
    table = Table(Column("source"), *right, box=None, pad_edge=False, header_style="bold")
    for one in plans:
        read = counts[one.name]["rows"]
        table.add_row(
            one.name,
            f"{len(one.tokens.starts):,}",
            f"{len(one.tokens.ids):,}",
            f"{one.rows_per_epoch:,}",
            f"{_fullness(one):.1%}",
            f"{read:,}",
            f"{read / max(1, last):.2%}",
            f"{read / one.rows_per_epoch:.2f}",
        )
    console = Console()
    console.print(table)
    steps = last // config.batch.size
    print(
        f"{steps:,} steps of {config.batch.size} rows of {config.seq_len} tokens, packing {config.data.packing}: "
        f"{last:,} rows, {last * config.seq_len:,} tokens with padding"
    )
    if last < wanted:
        print(f"the data end there: steps={config.steps} would need {wanted:,} rows")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Read every byte of token files and row tables, and compare with the sums they were written with."""
    roots = [Path(path).expanduser() for path in options.paths] or [cache_root(Config().data)]
    folders = [folder for root in roots for folder in _folders(root)]
    if not folders:
        raise ValueError(f"{', '.join(map(str, roots))}: no token files there")
    problems = 0
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for folder in folders:
            found = _problems(folder, progress)
            problems += len(found)
            console.print(f"{folder}: " + ("damaged" if found else "whole, every byte read"), soft_wrap=True)
            for line in found:
                console.print(f"  {line}", highlight=False, soft_wrap=True)
    return int(problems > 0)


def _fullness(rows: IndexPlan) -> float:
    """Share of the places of the rows that hold a token."""
    if rows.table is None:
        return 1.0
    return float(np.minimum(rows.table.lengths, rows.seq_len).sum() / max(1, len(rows.table) * rows.seq_len))


def _folders(root: Path) -> list[Path]:
    if (root / META).exists():
        return [root]
    found = [path.parent for path in sorted(root.glob(f"*/{META}"))] if root.is_dir() else []
    return [path for path in found if path.suffix != ".unfinished" and not path.name.startswith("starts-")]


def _problems(folder: Path, progress: Progress) -> list[str]:
    if folder.name.startswith("table-"):
        return verify_table(folder)
    try:
        cache = open_folder(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.*") if path.name != META)
        task = progress.add_task(folder.name, total=size)
        return verify_tokens(cache, lambda done: progress.advance(task, done))
    except (ValueError, OSError) as error:
        return [str(error)]
