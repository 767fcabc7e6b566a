"""Tokens per second and model FLOPs utilisation of Stoker's engine, beside a hand-written loop on `fully_shard`.

    python benchmarks/mfu.py --model llama3_1b --seq-len 4096 --rows 16 --micro 4 --compile      # a GPU
    python benchmarks/mfu.py                                                                     # this CPU, seconds

Both sides train the same model from the same weights in the same processes, in turns of some steps, and must compute
the same losses first. The loop (peers.py) has bf16 parameters over fp32 masters, torch's embedding and cross entropy,
fused AdamW, and with --compile it compiles per block as Stoker does, and its loss. Utilisation is that of
`stoker.models.flops` (PaLM, appendix B) over the peak of the device: a published one, dense, where
`conf/devices.yaml` has it, and one measured here with matrix products. Choose --rows and --micro so that the GPU is
full; both sides' parameters and optimizer states are in memory at the same time. Memory is measured in separate runs
of each side (--no-memory leaves them out).
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peers import HandWritten
from ranks import (
    Stoker,
    Turn,
    batches,
    check_equal,
    compared,
    in_turn,
    model_of,
    peak_mib,
    run,
    spent,
    turn_of,
)

from stoker.conf.devices import device_called
from stoker.conf.schema import BatchConfig, Config, OptimConfig, ParallelConfig
from stoker.models.family import build_on_meta
from stoker.models.flops import flops_per_token
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.trainer.runtime.process import keep_freed_memory

MATRICES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048, 4096)}
MATRIX_SECONDS, MATRIX_TRIES = 1.0, 5  # for each size, at most; the best of the tries counts


@dataclass(frozen=True)
class Measured:
    """On all ranks together."""

    ours: list[Turn]
    peer: list[Turn]
    peaks: dict[str, float]  # FLOP/s of matrix products, by dtype
    device: str


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a model of conf/model")
    parser.add_argument("--vocab", type=int, default=50304, help="for models that leave it to the tokenizer")
    parser.add_argument("--ranks", type=int, default=gpus or 1)
    parser.add_argument("--zero", type=int, default=1, choices=[1, 2, 3])
    parser.add_argument("--seq-len", type=int, default=4096 if gpus else 256)
    parser.add_argument("--rows", type=int, default=16 if gpus else 4, help="of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--checkpoint", default="none", choices=["none", "selective", "full"], help="of activations")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=8 if gpus else 5)
    parser.add_argument("--steps", type=int, default=5 if gpus else 1, help="steps of a turn")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the runs for memory out")
    parser.add_argument("--patience", type=float, default=0.0 if gpus else 60.0, help="seconds to wait for quiet CPUs")
    options = parser.parse_args()
    model = model_of(options.model)
    model.vocab_size = model.vocab_size or options.vocab
    config = Config(
        model=model,
        batch=BatchConfig(options.rows, options.micro),
        seq_len=options.seq_len,
        parallel=ParallelConfig(zero=options.zero),
        optim=OptimConfig(lr=1e-4),
        precision=options.precision,
        activation_checkpointing=options.checkpoint,
        compile=options.compile,
    )
    try:
        plan = batch_plan(config, layout_of(config, options.ranks))
    except ValueError as error:
        sys.exit(str(error))
    whole = build_on_meta(model, whole_model(model.num_hidden_layers))
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    flops = flops_per_token(model, config.seq_len, parameters)
    print(f"{model.name}: {parameters:,} parameters, {flops / 1e9:.2f} GFLOP per token in rows of {config.seq_len}")
    batch = f"{plan.micro_batches} micro-batches of {plan.micro_rows} rows on each"
    print(f"ranks: {options.ranks}, ZeRO {options.zero}, {batch}, {config.precision}{', compiled' * config.compile}")
    print(f"activation checkpointing: {options.checkpoint}\n", flush=True)

    measured: Measured = run(_measure, config, options.ranks, options.rounds, options.steps, options.patience)[0]
    peaks = {f"measured {dtype}": peak for dtype, peak in measured.peaks.items()}
    known = device_called(measured.device)
    if known is not None:
        peaks = {"published bf16": known.tflops["bf16"] * 1e12 * options.ranks, **peaks}
    print(f"{options.ranks} x {measured.device}, torch {torch.__version__}")
    print("peak: " + ", ".join(f"{name} {peak / 1e12:,.2f} TFLOP/s" for name, peak in peaks.items()) + "\n")

    chosen = [name for name in peaks if name.endswith(config.precision)]
    print(f"| | tokens/s | {' | '.join(f'MFU of {name}' for name in chosen)} | MiB per rank |")
    print("| --- |" + " --- |" * (len(chosen) + 2))
    tokens = config.batch.size * config.seq_len
    for name, side, turns in (("stoker", Stoker, measured.ours), ("hand-written", HandWritten, measured.peer)):
        speed = tokens / statistics.median(turn.seconds for turn in turns)
        used = " | ".join(f"{speed * flops / peaks[peak]:.1%}" for peak in chosen)
        memory = f"{max(run(_memory, config, options.ranks, side)):,.0f}" if options.memory else "-"
        print(f"| {name} | {speed:,.0f} | {used} | {memory} |", flush=True)
    ratio, cpu_ratio, others = compared(measured.ours, measured.peer)
    print(f"\nratio {ratio}, goal 1.0; of CPU seconds {cpu_ratio}; {options.rounds} rounds of {options.steps} steps")
    print(f"meanwhile other processes kept {others} of {os.cpu_count()} cores busy")


def _measure(config: Config, mesh: Mesh, rounds: int, steps: int, patience: float) -> Measured:
    keep_freed_memory()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    peaks = {config.precision: _matrix_peak(dtype, mesh)}
    ours, peer = Stoker(config, mesh), HandWritten(config, mesh, torch_ends=True)
    rows = batches(config, mesh)
    check_equal(ours, peer, rows[0], config.precision)
    gc.freeze()
    turns = [functools.partial(turn_of, side, rows, steps, mesh.device) for side in (ours, peer)]
    return Measured(*in_turn(turns, rounds, patience, mesh), peaks, _device_name(mesh.device))


def _memory(config: Config, mesh: Mesh, side: type) -> float:
    if side is Stoker:
        keep_freed_memory()
        return peak_mib(Stoker, config, mesh)
    return peak_mib(functools.partial(HandWritten, torch_ends=True), config, mesh)


def _matrix_peak(dtype: torch.dtype, mesh: Mesh) -> float:
    """FLOP/s of the best size of matrix product, on all ranks at once and added up."""
    device = mesh.device
    best = 0.0
    for size in MATRICES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        b = b.t()  # as linear layers have it: on CPUs without units for bf16 the other way is ten times slower
        out = torch.empty_like(a)

        def products(count: int) -> float:
            """Seconds of each."""
            a_b = [(a, b, out)] * count
            return spent(lambda: [torch.mm(a, b, out=out) for a, b, out in a_b], device)[0] / count

        products(1)
        count = torch.tensor(max(1, round(MATRIX_SECONDS / products(1))), device=device)
        dist.broadcast(count, 0)
        tries = min(MATRIX_TRIES, int(count))
        for _ in range(tries):
            best = max(best, 2 * size**3 / products(int(count) // tries))
    total = torch.tensor(best, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0].partition(':')[2].strip() if names else platform.processor()}, its share of {cores} cores"


if __name__ == "__main__":
    main()
