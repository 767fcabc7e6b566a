"""What does not go together with `data.planner=lanes`: entries of `stoker.parallel.refusals`."""

from __future__ import annotations

from collections.abc import Callable

from stoker.parallel.nearest import around, divisors, either, multiples_around
from stoker.parallel.start import Start


def _ranks(start: Start) -> str | None:
    data, dp = start.config.data, start.dp
    if data.planner != "lanes" or not dp or data.lanes < 1 or data.lanes % dp == 0:
        return None
    ranks = either(n * (start.world // dp) for n in around(dp, divisors(data.lanes)))
    return (
        f"data.lanes={data.lanes} does not divide over {dp} data-parallel ranks: launch.nproc={ranks} works, or in "
        f"another run data.lanes={either(multiples_around(data.lanes, dp))}"
    )


def _rows(start: Start) -> str | None:
    data, rows = start.config.data, start.config.batch.rows
    if data.planner != "lanes" or data.lanes < 1 or rows < 1 or rows % data.lanes == 0:
        return None
    return (
        f"batch.rows={rows} does not divide over data.lanes={data.lanes}: "
        f"batch.rows={either(multiples_around(rows, data.lanes))} does"
    )


def _units(start: Start) -> str | None:
    data = start.config.data
    if data.planner != "lanes" or data.units is not None or data.sources:
        return None
    return f"data.planner=lanes cannot read data={data.name} in units: data.planner=index works"


def _tokenizer(start: Start) -> str | None:
    data = start.config.data
    if data.planner != "lanes" or data.tokenizer != "bpe":
        return None
    return (
        "data.tokenizer=bpe with data.planner=lanes: train one with `stoker data tokenizer` and name its folder, "
        "or data.tokenizer=byte works"
    )


# (name, what is refused, why, check)
ENTRIES: tuple[tuple[str, str, str, Callable[[Start], str | None]], ...] = (
    (
        "lanes over ranks",
        "data.lanes that is no multiple of dp under data.planner=lanes",
        "a lane has one owner",
        _ranks,
    ),
    (
        "rows over lanes",
        "batch.rows that is no multiple of data.lanes under data.planner=lanes",
        "lanes keep step",
        _rows,
    ),
    ("units of lanes", "data.planner=lanes with a source that has no units", "lanes read units", _units),
    (
        "tokenizers of lanes",
        "data.planner=lanes with a tokenizer that is trained on the data",
        "nothing is read before it is trained on",
        _tokenizer,
    ),
)
