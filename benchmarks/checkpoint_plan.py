"""What planning and committing a checkpoint cost rank 0 in a large run: seconds and bytes. No tensor has memory.

    python benchmarks/checkpoint_plan.py [--model llama3_70b] [--dp 128] [--tp 8] [--readers]

Simulates every rank of dp_shard x tp under ZeRO 3 with AdamW: its plan, its report on storage, and a shard file that is
a hole of the right size. Rank 0 then commits as it does in a run. The reports are written by a pool of processes first;
they take a gigabyte of temporary space and some minutes, which are not counted. With --readers it also times how a
rank finds its shards, on this layout and on half as many ranks, and a reader of all tensors, which reads every index
and proves the tiling piece by piece.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ranks import model_of

from stoker.checkpoint import commit
from stoker.checkpoint.format import BLOCK_BYTES, ShardIndex, encode_index, encode_state
from stoker.checkpoint.names import MANIFEST, STATE, data_name, index_name
from stoker.checkpoint.plan import plan_file
from stoker.checkpoint.reader import find_pieces
from stoker.checkpoint.stored import open_checkpoint
from stoker.models.family import build_on_meta
from stoker.parallel.model import whole_model
from stoker.parallel.shards import PARAMETER, Chunk, Shard

KINDS = (PARAMETER, "optim.exp_avg", "optim.exp_avg_sq")
ROW_PARALLEL = (".o.weight", ".down.weight")  # cut along dim 1; matrices else along dim 0, vectors not at all


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    config = model_of(model)
    config.vocab_size = config.vocab_size or 128_256
    whole = build_on_meta(config, whole_model(config.num_hidden_layers))
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}


def shards_of(shapes: dict[str, tuple[int, ...]], dp: int, tp: int, rank: int) -> Iterator[Shard]:
    """What a rank holds: its tensor-parallel part of every tensor, cut along dim 0 over dp."""
    dp_rank, tp_rank = divmod(rank, tp)
    for name, shape in shapes.items():
        offset, size = [0] * len(shape), list(shape)
        replica, replicas = 0, 1
        if len(shape) > 1:
            dim = 1 if name.endswith(ROW_PARALLEL) else 0
            low, high = shape[dim] * tp_rank // tp, shape[dim] * (tp_rank + 1) // tp
            offset[dim], size[dim] = low, high - low
        else:
            replica, replicas = tp_rank, tp
        rows = -(-size[0] // dp)  # as fully_shard cuts
        low, high = min(dp_rank * rows, size[0]), min((dp_rank + 1) * rows, size[0])
        if low == high:
            continue
        chunk = Chunk((offset[0] + low, *offset[1:]), (high - low, *size[1:]))
        data = torch.empty(chunk.sizes, device="meta")
        yield from (Shard(name, kind, shape, chunk, data, replica, replicas) for kind in KINDS)


def report(job: tuple[dict[str, tuple[int, ...]], int, int, int, str]) -> float:
    """Write the report of one rank; seconds that its plan took."""
    shapes, dp, tp, rank, folder = job
    shards = list(shards_of(shapes, dp, tp, rank))
    began = time.perf_counter()
    plan = plan_file(shards)
    seconds = time.perf_counter() - began
    blocks = tuple(range(-(-plan.file_bytes // BLOCK_BYTES)))
    index = ShardIndex(rank, 1, 1, plan.file_bytes, BLOCK_BYTES, blocks, plan.pieces)
    (Path(folder) / index_name(rank)).write_bytes(encode_index(index, plan.cover, plan.origins))
    with open(Path(folder) / data_name(rank), "wb") as file:
        os.truncate(file.fileno(), plan.file_bytes)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_70b")
    parser.add_argument("--dp", type=int, default=128)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--readers", action="store_true")
    options = parser.parse_args()
    shapes, world = shapes_of(options.model), options.dp * options.tp
    with tempfile.TemporaryDirectory() as folder:
        partial, final = Path(folder) / "step-00000001.attempt-1.partial", Path(folder) / "step-00000001"
        partial.mkdir()
        jobs = [(shapes, options.dp, options.tp, rank, str(partial)) for rank in range(world)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            plans = pool.map(report, jobs, chunksize=8)
        (partial / STATE).write_bytes(encode_state({}))
        reports = sum((partial / index_name(rank)).stat().st_size for rank in range(world))
        before, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, bytes_read()
        began = time.perf_counter()
        size = commit.commit(partial, final, 1, 1, world, lambda: None)
        seconds, read = time.perf_counter() - began, bytes_read() - read
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        layout = f"{options.model}, dp {options.dp} x tp {options.tp}"
        print(f"{layout}: {size / 1e9:,.0f} GB, reports of {reports / 1e6:.0f} MB")
        print(f"  plan of a rank   {max(plans):.2f} s once per layout (the longest of {world}), kept for all saves")
        print(f"  commit on rank 0 {seconds:.2f} s, {read / 1e6:.1f} MB read, {grown / 1e3:.0f} MB of memory")
        print(f"  manifest         {(final / MANIFEST).stat().st_size / 1e3:.0f} kB")
        if options.readers:
            began = time.perf_counter()
            stored = open_checkpoint(final)
            opened = time.perf_counter() - began
            for dp, tp, ranks in ((options.dp, options.tp, world), (options.dp // 2, options.tp, world // 2)):
                rank = ranks // 3
                shards = [
                    Shard(**{**vars(shard), "data": torch.empty(shard.chunk.sizes, device="meta")})
                    for shard in shards_of(shapes, dp, tp, rank)
                ]
                began = time.perf_counter()
                files = len(find_pieces(stored, shards, (rank + 0.5) / ranks))
                seconds = opened + time.perf_counter() - began
                cost = f"{files} files in {seconds:.1f} s"
                print(f"  a rank of {ranks} (dp {dp} x tp {tp}) finds what it needs in {cost}")
            began = time.perf_counter()
            tensors = len(stored.tensors)
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(f"  a reader of all  proves {tensors} tensors in {seconds:.0f} s with {peak / 1e3:,.0f} MB of memory")


def bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("it reads /proc")
    main()
