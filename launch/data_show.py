"""`stoker data plan`, `peek` and `verify`: looking at what a run reads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Column, Table

from checkpoint import DamagedCheckpoint, read_state
from checkpoint.names import committed
from conf.rundir import RunDirectory, read_config
from conf.schema import Config
from data import open_rows, open_tokenizer
from data.cache import META, cache_root, open_folder
from data.cache import verify as verify_tokens
from data.index import IndexPlan
from data.mixed import MixedPlan
from data.opening import NoTokenizer
from data.tables import verify_table
from data.tokenizer import Tokenizer
from launch.data_make import composed
from launch.show import run_at
from launch.train import say


def plan(options: argparse.Namespace) -> int:
    """A table of what a run of this config reads of each source."""
    config = composed(options.overrides)
    rows = open_rows(config, "train")
    plans = rows.plans if isinstance(rows, MixedPlan) else (rows,)
    wanted = config.steps * config.batch.rows
    last = wanted if rows.total_rows is None else min(wanted, rows.total_rows // config.batch.rows * config.batch.rows)
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
    steps = last // config.batch.rows
    print(
        f"{steps:,} steps of {config.batch.rows} rows of {config.seq_len} tokens, packing {config.data.packing}: "
        f"{last:,} rows, {last * config.seq_len:,} tokens with padding"
    )
    if last < wanted:
        print(f"the data end there: steps={config.steps} would need {wanted:,} rows")
    return 0


def peek(options: argparse.Namespace) -> int:
    """The rows of one step of a run, past or to come, as text."""
    run = run_at(options.run)
    config = read_config(run)
    if options.step < 1:
        raise ValueError(f"--step {options.step}: steps count from 1")
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = open_tokenizer(config.data, run.tokenizer)
    except NoTokenizer as error:
        say(f"{error}; showing numbers")
    rows = open_rows(config, "train")
    first = _first_row(run, rows, config, options.step)
    last = first + config.batch.rows
    if first < 0 or (rows.total_rows is not None and last > rows.total_rows):
        raise ValueError(f"step {options.step} has no rows: the data end after {rows.total_rows} rows")
    if any(begin <= options.step <= end for begin, end in config.skip_steps):
        say(f"step {options.step} is passed over by skip_steps={config.skip_steps}: nobody trains on these rows")
    chosen = np.arange(first, min(last, first + options.rows))
    print(f"step {options.step}: rows {first:,} to {last - 1:,} of the run; showing {len(chosen)}")
    for place, row in enumerate(chosen):
        for source, begin, ids, learned in _documents(rows, int(row)):
            text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
            shown = text if len(text) <= options.characters else text[: options.characters] + " ..."
            part = "" if learned is None else f", {learned:,} of them learned"
            print(f"\n[row {place} of the step, {source}, tokens {begin:,} to {begin + len(ids) - 1:,}{part}]")
            print(shown)
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


def _first_row(run: RunDirectory, rows: IndexPlan | MixedPlan, config: Config, step: int) -> int:
    """The row at which `step` of a run begins. `rows` learn the run's past from its checkpoints."""
    states = []
    for checkpoint in committed(run.checkpoints) if run.checkpoints.is_dir() else []:
        try:
            states.append(read_state(checkpoint)["data"])
        except (DamagedCheckpoint, OSError) as error:
            say(f"damaged checkpoint passed over: {error}")
    if not states:
        return (step - 1) * config.batch.rows
    states.sort(key=lambda state: state["step"])
    state = next((state for state in states if state["step"] >= step), states[-1])
    if dict(rows.fingerprint) != dict(state["fingerprint"]):
        raise ValueError(
            f"{run.path} was trained on other data than its config names now: stoker train says what differs"
        )
    rows.resume(state["weights"], state["row"], state["step"])
    return state["row"] - (state["step"] - step + 1) * config.batch.rows


def _documents(rows: IndexPlan | MixedPlan, row: int) -> Iterator[tuple[str, int, np.ndarray, int | None]]:
    """Source, first token in it, ids and number of learned tokens of each piece of a row."""
    numbers = np.array([row], np.int64)
    found = rows.pieces(numbers) if isinstance(rows, MixedPlan) else [(rows, None, rows.pieces(numbers))]
    for one, _, pieces in found:
        for begin, length in zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True):
            span = slice(begin, begin + length)
            learned = one.tokens.learned
            yield one.name, begin, one.tokens.ids[span], None if learned is None else int(learned[span].sum())


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
