"""What `data.planner=lanes` is refused with: entries for the table of `test_refusals`."""

from __future__ import annotations

LANES = ["data.planner=lanes", "data.units=mine:units"]

# entry -> (overrides, world, gpus, what the message says), each at the edge of what is refused
OF_LANES: dict[str, list[tuple[list[str], int, int, str]]] = {
    "lanes over ranks": [
        ([*LANES, "data.lanes=8", "batch.rows=24"], 3, 0, "over 3 data-parallel ranks: launch.nproc=2 or 4 works"),
        ([*LANES, "data.lanes=8", "batch.rows=24", "parallel.tp=2"], 6, 0, "launch.nproc=4 or 8 works"),
    ],
    "rows over lanes": [
        (
            [*LANES, "data.lanes=8", "batch.rows=12"],
            1,
            0,
            "over data.lanes=8: batch.rows=8 or 16 does",
        ),
    ],
    "units of lanes": [
        (["data.planner=lanes"], 1, 0, "data.planner=lanes cannot read data=data in units: data.planner=index works"),
    ],
    "tokenizers of lanes": [([*LANES, "data.tokenizer=bpe"], 1, 0, "train one with `stoker data tokenizer`")],
}

BEYOND_OF_LANES = [
    "data.planner=random",
    "data.lanes=0",
    "data.window=0",
    "data.unit_bytes=100",
    "data.deal_every=0",
    "data.on_damage=ignore",
    "data.skip_limit=-1",
    "data.retries=-1",
    "data.stall_seconds=0",
    "data.block_cache_gib=0",
]
