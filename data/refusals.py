"""What does not go together with `data.mode=streaming`, with the nearest that works."""

from __future__ import annotations

from stoker.parallel.start import Refusals, Start
from stoker.parallel.suggestions import around, divisors, either, multiples_around

REFUSALS = Refusals()


@REFUSALS.entry(
    "streams over ranks", "data.streams that is no multiple of dp under data.mode=streaming", "a stream has one owner"
)
def _ranks(start: Start) -> str | None:
    data, dp = start.config.data, start.dp
    if data.mode != "streaming" or not dp or data.streams < 1 or data.streams % dp == 0:
        return None
    ranks = either(n * (start.world // dp) for n in around(dp, divisors(data.streams)))
    return (
        f"data.streams={data.streams} does not divide over {dp} data-parallel ranks: launch.nproc={ranks} works, or in "
        f"another run data.streams={either(multiples_around(data.streams, dp))}"
    )


@REFUSALS.entry(
    "rows over streams",
    "batch.size that is no multiple of data.streams under data.mode=streaming",
    "streams advance together",
)
def _rows(start: Start) -> str | None:
    data, rows = start.config.data, start.config.batch.size
    if data.mode != "streaming" or data.streams < 1 or rows < 1 or rows % data.streams == 0:
        return None
    return (
        f"batch.size={rows} does not divide over data.streams={data.streams}: "
        f"batch.size={either(multiples_around(rows, data.streams))} does"
    )


@REFUSALS.entry("splits of streams", "data.mode=streaming with a source that has no splits", "streams read splits")
def _splits(start: Start) -> str | None:
    data = start.config.data
    if data.mode != "streaming" or data.splits is not None or data.sources:
        return None
    return f"data.mode=streaming cannot read data={data.name} in splits: data.mode=indexed works"


@REFUSALS.entry(
    "tokenizers of streams",
    "data.mode=streaming with a tokenizer that is trained on the data",
    "nothing is read before it is trained on",
)
def _tokenizer(start: Start) -> str | None:
    data = start.config.data
    if data.mode != "streaming" or data.tokenizer != "bpe":
        return None
    return (
        "data.tokenizer=bpe with data.mode=streaming: train one with `stoker data tokenizer` and name its folder, "
        "or data.tokenizer=byte works"
    )
