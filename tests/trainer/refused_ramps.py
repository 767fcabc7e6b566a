"""What `batch.ramp` is refused with: entries for the table of `test_refusals`."""

from __future__ import annotations

INTERLEAVED = ["parallel.pp=2", "parallel.stages_per_rank=2", "parallel.schedule=interleaved"]

# entry -> (overrides, world, gpus, a part of the message), each at the edge of what is refused
OF_RAMPS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "full pipeline": [
        (
            ["parallel.pp=4", "batch.ramp=[[8,1e6]]", "batch.micro_size=4"],
            4,
            0,
            "2 micro-batches of the steps of 8 sequences (batch.ramp) do not fill 4 pipeline stages: "
            "batch.micro_size=2 does",
        ),
        (
            ["parallel.pp=4", "batch.ramp=[[2,1e6],[6,2e6]]", "batch.micro_size=2"],
            4,
            0,
            "batch.ramp=[[4,1e+06],[6,2e+06]] with batch.size=32 and batch.micro_size=1 does",
        ),
    ],
    "interleaved rounds": [
        (
            [*INTERLEAVED, "batch.ramp=[[20,1e6]]", "batch.size=40", "batch.micro_size=4"],
            2,
            0,
            "5 micro-batches of the steps of 20 sequences (batch.ramp) do not split into rounds over parallel.pp=2: "
            "batch.micro_size=2 or 5 does",
        ),
        (
            [*INTERLEAVED, "batch.ramp=[[5,1e6]]", "batch.size=8", "batch.micro_size=1"],
            2,
            0,
            "batch.ramp=[] with batch.micro_size=1 does",
        ),
    ],
    "batch ramp": [
        (["batch.ramp=[[6,1e6]]"], 4, 0, "have the divisor 2 in common, which is no multiple of 4"),
        (
            ["batch.ramp=[[8,1e6]]", "data.phases=[{from_step: 5, weights: {a: 1}}]"],
            1,
            0,
            "batch.ramp=[] works, or data.phases=[]",
        ),
    ],
}
