"""`stoker data verify`: whether token files, row tables and sources are whole, and what of them is left out."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from stoker.conf.printable import printable
from stoker.conf.schema import Config, DataConfig
from stoker.conf.values import ConfigError
from stoker.data import open_tokenizer
from stoker.data.cache import META, cache_root, open_folder
from stoker.data.cache import verify as verify_tokens
from stoker.data.opening import open_source
from stoker.data.sources import specs_of
from stoker.data.streaming.opening import open_windows
from stoker.data.streaming.shuffle_windows import ShuffleWindows
from stoker.data.streaming.sources import open_store
from stoker.data.streaming.splits import Losses, whole
from stoker.data.tables import verify_table
from stoker.launch.data_make import composed

_NAMED = 3  # documents left out of a source that are named


def verify(options: argparse.Namespace) -> int:
    """Read every byte of token files and row tables, and compare with the sums they were written with.

    Given settings instead of folders, read every document of the sources that they name.
    """
    if any("=" in word for word in options.paths):
        return _verify_sources(composed(options.paths))
    roots = [Path(path).expanduser() for path in options.paths] or [cache_root(Config().data)]
    folders = [folder for root in roots for folder in _folders(root)]
    if not folders:
        raise ConfigError(f"{', '.join(map(str, roots))}: no token files there")
    problems = 0
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for folder in folders:
            found = _problems(folder, progress)
            problems += len(found)
            state = "damaged" if found else f"whole, every byte read{_left_out(folder)}"
            console.print(f"{folder}: {state}", soft_wrap=True)
            for line in found:
                console.print(f"  {printable(line)}", highlight=False, markup=False, soft_wrap=True)
    return int(problems > 0)


def _verify_sources(config: Config) -> int:
    problems = 0
    console = Console()
    for spec in specs_of(config.data):
        if config.data.mode == "streaming":
            windows = open_windows(spec.config, config.run.seed, open_tokenizer(config.data), spec.epochs)
            damage = _read_through(windows, spec.config, console)
        else:
            opened = [open_source(config, spec, split) for split in ("train", "validation")]
            train, held_out = (f"{len(one.tokens.starts):,}" for one in opened)
            left_out = f"; {opened[0].left_out:,} documents without text left out" if opened[0].left_out else ""
            console.print(f"{spec.name}: {train} documents, {held_out} for validation{left_out}", soft_wrap=True)
            folder = opened[0].folder
            damage = [] if folder is None else verify_tokens(open_folder(folder))
        for line in damage:
            console.print(f"  {printable(line)}", highlight=False, markup=False, soft_wrap=True)
        problems += len(damage)
    return int(problems > 0)


def _read_through(windows: ShuffleWindows, data: DataConfig, console: Console) -> list[str]:
    """Read every document of a streamed source; what is damaged, a line each."""
    splits, store = windows.splits, open_store(data)
    documents = left_out = 0
    damage: list[str] = []
    named: list[str] = []
    for split in range(len(splits)):
        losses = Losses(skipping=True)
        for _, content in whole(partial(splits.read, split, store, losses), losses):
            documents += bool(len(content))
            left_out += not len(content)
        left_out += losses.leftovers
        if losses.first_leftover is not None and len(named) < _NAMED:
            named.append(str(losses.first_leftover))
        damage += [str(loss.damage) for loss in losses.new]
    left = f"; {left_out:,} left out: without text, or what is no document" if left_out else ""
    state = f"{len(damage):,} damaged" if damage else "whole, every split read"
    console.print(f"{windows.name}: {documents:,} documents in {len(splits):,} splits, {state}{left}", soft_wrap=True)
    for line in named:
        console.print(f"  left out, for instance: {printable(line)}", highlight=False, markup=False, soft_wrap=True)
    return damage


def _folders(root: Path) -> list[Path]:
    if (root / META).exists():
        return [root]
    found = [path.parent for path in sorted(root.glob(f"*/{META}"))] if root.is_dir() else []
    return [path for path in found if path.suffix != ".unfinished" and not path.name.startswith("starts-")]


def _left_out(folder: Path) -> str:
    """The documents without text of a folder of tokens."""
    if folder.name.startswith("table-"):
        return ""
    left_out = open_folder(folder).left_out
    if left_out is None:
        return "; an earlier version made it and did not count documents without text"
    return f"; {left_out:,} documents without text left out" if left_out else ""


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
