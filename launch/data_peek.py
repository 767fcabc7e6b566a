"""`stoker data peek`: the documents of any step of a run, past or future."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stoker.checkpoint import DamagedCheckpoint, read_state
from stoker.checkpoint.names import committed
from stoker.conf.printable import printable
from stoker.conf.ramp import ramp_of
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data import open_rows, open_tokenizer
from stoker.data.indexed import IndexPlan
from stoker.data.loader import refuse_other_data
from stoker.data.mixed import MixedPlan
from stoker.data.opening import NoTokenizer
from stoker.data.streaming.opening import open_all_streams
from stoker.data.tokenizer import Tokenizer
from stoker.launch.inspect import run_at
from stoker.launch.train import say
from stoker.trainer.trust import DATA, trusted_config

Piece = tuple[int, str, np.ndarray]  # row of the step, where it comes from, ids


def peek(options: argparse.Namespace) -> int:
    """The rows of one step of a run, past or future, as text."""
    run = run_at(options.run)
    config = trusted_config(run, options.trust, (DATA,), say)
    if options.step < 1:
        raise ConfigError(f"--step {options.step}: steps count from 1")
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = open_tokenizer(config.data, run.tokenizer)
    except NoTokenizer as error:
        say(f"{error}; showing numbers")
    if any(begin <= options.step <= end for begin, end in config.skip_steps):
        say(f"step {options.step} is skipped by skip_steps={config.skip_steps}: no step trains on these rows")
    states = _states(run)
    if config.data.mode == "streaming":
        assert tokenizer is not None  # streams cannot be read without
        first, found = _of_streams(config, tokenizer, states, options.step, options.rows)
    else:
        first, found = _of_rows(run, config, states, options.step, options.rows)
    if options.step > config.steps:
        say(
            f"step {options.step} is past the end: the run has steps={config.steps}; with more it would take these rows"
        )
    size = ramp_of(config).size(options.step)
    chosen = min(options.rows, size)
    print(f"step {options.step}: rows {first:,} to {first + size - 1:,} of the run; showing {chosen}")
    for place, where, ids in found:
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
        shown = text if len(text) <= options.characters else text[: options.characters] + " ..."
        print(printable(f"\n[row {place} of the step, {where}]"))
        print(printable(shown))
    return 0


def _past_the_data(step: int, rows: int, config: Config) -> str:
    return f"step {step} has no rows: the data end after {rows} rows, with step {ramp_of(config).steps_of(rows)}"


def _states(run: RunDirectory) -> list[Mapping[str, Any]]:
    """The states of the data in a run's checkpoints, by step."""
    states = []
    for checkpoint in committed(run.checkpoints) if run.checkpoints.is_dir() else []:
        try:
            states.append(read_state(checkpoint)["data"])
        except (DamagedCheckpoint, OSError) as error:
            say(f"damaged checkpoint passed over: {error}")
    return sorted(states, key=lambda state: state["step"])


def _of_rows(
    run: RunDirectory, config: Config, states: list[Mapping[str, Any]], step: int, most: int
) -> tuple[int, Iterator[Piece]]:
    """The first row of a step, and the pieces of its first `most` rows, under data.mode=indexed."""
    rows = open_rows(config, "train")
    first = _first_row(run, rows, config, states, step)
    last = first + ramp_of(config).size(step)
    if first < 0 or (rows.total_rows is not None and last > rows.total_rows):
        raise ConfigError(_past_the_data(step, rows.total_rows or 0, config))

    def pieces() -> Iterator[Piece]:
        for place, row in enumerate(range(first, min(last, first + most))):
            for source, begin, ids, learned in _documents(rows, row):
                part = "" if learned is None else f", {learned:,} of them trained on"
                yield place, f"{source}, tokens {begin:,} to {begin + len(ids) - 1:,}{part}", ids

    return first, pieces()


def _of_streams(
    config: Config, tokenizer: Tokenizer, states: list[Mapping[str, Any]], step: int, most: int
) -> tuple[int, Iterator[Piece]]:
    """The same under data.mode=streaming, read on from the nearest checkpoint before the step."""
    if config.batch.ramp:
        raise ConfigError("data peek reads no streams with batch.ramp: it needs data.mode=indexed, or batch.ramp=[]")
    stream, mixture = open_all_streams(config, tokenizer)
    try:
        for state in states[-1:]:
            refuse_other_data(stream.fingerprint, state, change=True)
        before = [state for state in states if state["step"] < step]
        if before:
            stream.load_state(before[-1])
        if mixture is not None and states:  # the last state has the history of weights
            mixture.resume(states[-1]["weights"], states[-1]["row"], states[-1]["step"])
        stream.pass_over(step)
        first = stream.row
        if stream.exhausted:
            raise ConfigError(_past_the_data(step, first, config))
        names = stream.sources_of_batch()
        tokens = stream.next().tokens[:most].numpy()
    finally:
        stream.close()
    found = []
    for place, row in enumerate(tokens):
        ends = np.flatnonzero(row == tokenizer.end_of_document) + 1
        begin = 0
        for end in sorted({*ends.tolist(), len(row)}):
            found.append((place, f"{names[place]}, tokens {begin} to {end - 1} of the row", row[begin:end]))
            begin = end
    return first, iter(found)


def _first_row(
    run: RunDirectory, rows: IndexPlan | MixedPlan, config: Config, states: list[Mapping[str, Any]], step: int
) -> int:
    """The row at which `step` of a run begins. `rows` get the run's history from its checkpoints."""
    ramp = ramp_of(config)
    if not states:
        return ramp.rows_before(step)
    state = next((state for state in states if state["step"] >= step), states[-1])
    refuse_other_data(rows.fingerprint, state, change=True)
    rows.resume(state["weights"], state["row"], state["step"])
    return state["row"] - ramp.rows_before(state["step"] + 1) + ramp.rows_before(step)


def _documents(rows: IndexPlan | MixedPlan, row: int) -> Iterator[tuple[str, int, np.ndarray, int | None]]:
    """Source, first token in it, ids and number of trained tokens of each piece of a row."""
    numbers = np.array([row], np.int64)
    found = rows.pieces(numbers) if isinstance(rows, MixedPlan) else [(rows, None, rows.pieces(numbers))]
    for one, _, pieces in found:
        for begin, length in zip(pieces.begins.tolist(), pieces.lengths.tolist(), strict=True):
            span = slice(begin, begin + length)
            learned = one.tokens.learned
            yield one.name, begin, one.tokens.ids[span], None if learned is None else int(learned[span].sum())
