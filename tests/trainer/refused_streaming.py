"""What `data.mode=streaming` is refused with: entries for the table of `test_refusals`."""

from __future__ import annotations

STREAMS = ["data.mode=streaming", "data.splits=mine:units"]

# entry -> (overrides, world, gpus, a part of the message), each at the edge of what is refused
OF_STREAMS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "streams over ranks": [
        ([*STREAMS, "data.streams=8", "batch.size=24"], 3, 0, "over 3 data-parallel ranks: launch.nproc=2 or 4 works"),
        ([*STREAMS, "data.streams=8", "batch.size=24", "parallel.tp=2"], 6, 0, "launch.nproc=4 or 8 works"),
    ],
    "rows over streams": [
        (
            [*STREAMS, "data.streams=8", "batch.size=12"],
            1,
            0,
            "over data.streams=8: batch.size=8 or 16 does",
        ),
    ],
    "splits of streams": [
        (["data.mode=streaming"], 1, 0, "data.mode=streaming cannot read data=data in splits: data.mode=indexed works"),
    ],
    "tokenizers of streams": [([*STREAMS, "data.tokenizer=bpe"], 1, 0, "train one with `stoker data tokenizer`")],
}

BEYOND_OF_STREAMS = [
    "data.mode=random",
    "data.streams=0",
    "data.shuffle_window=0",
    "data.split_bytes=100",
    "data.assign_every=0",
    "data.on_damage=ignore",
    "data.max_decompressed_gib=0",
    "data.zstd_window_log=32",
    "data.skip_limit=-1",
    "data.retries=-1",
    "data.stall_seconds=0",
    "data.block_cache_gib=0",
]
