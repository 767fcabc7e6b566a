"""What does not go together with `data.mode=streaming`, or with `batch.ramp`, with the nearest that works."""

from __future__ import annotations

import math

from stoker.conf.ramp import unit_rows
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
    streams = around(data.streams, [n for n in divisors(max(1, start.config.batch.size)) if n % dp == 0])
    other_run = f", or in another run data.streams={either(streams)}" if streams else ""
    return (
        f"data.streams={data.streams} does not divide over {dp} data-parallel ranks: launch.nproc={ranks} works"
        f"{other_run}"
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


@REFUSALS.entry(
    "batch ramp",
    "batch.ramp with sizes that do not divide over dp, batch.micro_size or data.streams; with data.phases, or with "
    "epochs of streams",
    "every step is made of whole micro-batches, and what follows the number of sequences is known beforehand",
)
def _ramp(start: Start) -> str | None:
    config, dp = start.config, start.dp
    if not config.batch.ramp or not dp or min(size for size, _ in config.batch.ramp) < 1 or config.batch.size < 1:
        return None
    if config.data.phases:
        return "batch.ramp with data.phases: a phase would begin elsewhere: batch.ramp=[] works, or data.phases=[]"
    epochs = [config.data.epochs, *(source.get("max_epochs") for source in config.data.sources.values())]
    if config.data.mode == "streaming" and any(one is not None for one in epochs):
        return "batch.ramp with epochs of data.mode=streaming, whose end is not known before: data.mode=indexed works"
    unit = unit_rows(config)
    streams = config.data.streams if config.data.mode == "streaming" else 1
    least = math.lcm(dp * (config.batch.micro_size or 1), streams)
    if unit % least == 0:
        return None
    sizes = sorted({int(size) for size, _ in config.batch.ramp} | {config.batch.size})
    return (
        f"batch.ramp: the sizes {', '.join(map(str, sizes))} have the divisor {unit} in common, which is no multiple "
        f"of {least} (data-parallel ranks x batch.micro_size, or data.streams): multiples of {least} work, or "
        "batch.ramp=[]"
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
