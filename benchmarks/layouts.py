"""Tokens per second of layouts on this machine's ranks, each beside a named peer.

    python benchmarks/layouts.py [--ranks 2 4] [--layouts tp2 pp2 zero0 zero1 zero2 zero3] [--rounds 7] [--steps 2] ...

- tp: the same decoder on torch's DTensors, `parallelize_module` with sequence and loss parallelism (peers.py).
- zero: the same decoder in a minimal `fully_shard` loop with the same flags; zero0 in torch's `replicate`.
- pp: the ideal of its schedule, (micro-batches + stages - 1) x what a micro-batch takes in the slowest stage + the
  update. Every rank measures forward and backward of its own stage with all others busy and nothing sent.

Ranks left over are data parallel. Both sides of a row run in the same processes, in turns of some steps, from the same
weights, and must compute the same losses and gradient norms first. The ratio is the median over the rounds, with its
range; CPU seconds are those of all ranks together, without waiting. Memory is the worst rank's, of a separate run of
each side: resident on CPUs, allocated on GPUs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import os
import statistics
from typing import Any

import torch
import torch.distributed as dist
from peers import HandWritten
from ranks import (
    Side,
    Stoker,
    Turn,
    Watch,
    batches,
    check_equal,
    compared,
    in_turn,
    model_of,
    peak_mib,
    run,
    spent,
    steps_of,
    turn_of,
)

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.trainer.runtime.process import keep_freed_memory

GOALS = {"tp": 1.0, "zero": 0.97, "pp": 0.9}
PEERS = {"tp": "DTensor `parallelize_module`", "zero": "`fully_shard` loop", "pp": "ideal with its bubble"}
SMALL = ModelConfig(
    name="13M",
    vocab_size=4096,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=1024,
)
COLUMNS = ("ranks", "layout", "tokens/s", "peer", "its tokens/s", "ratio (range)", "goal", "of CPU seconds")
COLUMNS += ("others' cores", "MiB per rank", "the peer's MiB")
STAGE_REPEATS = 4  # micro-batches of one stage that are timed together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--layouts", nargs="*", default=["tp2", "pp2", "zero0", "zero1", "zero2", "zero3"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--model", help="a model of conf/model; default: 13 million parameters for CPUs")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true")
    patience = 0.0 if torch.cuda.is_available() else 60.0
    parser.add_argument("--patience", type=float, default=patience, help="seconds to wait, per row, for quiet CPUs")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the runs for memory out")
    options = parser.parse_args()
    model = model_of(options.model) if options.model else SMALL
    model.vocab_size = model.vocab_size or 50304
    print(_machine(max(options.ranks)))
    print(f"{model.name}, {options.rows} rows of {options.seq_len} tokens, micro-batches of {options.micro}", end="")
    print(f", {options.precision}{', compiled' * options.compile}; {options.rounds} rounds of {options.steps} steps\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    for ranks in options.ranks:
        for layout in options.layouts:
            config = Config(
                model=copy.deepcopy(model),
                batch=BatchConfig(options.rows, options.micro),
                seq_len=options.seq_len,
                parallel=_parallel(layout),
                optim=OptimConfig(lr=1e-4),
                precision=options.precision,
                compile=options.compile,
            )
            print(_row(layout, config, ranks, options), flush=True)


def _parallel(layout: str) -> ParallelConfig:
    axis, size = layout.rstrip("0123456789"), int(layout.lstrip("abcdefghijklmnopqrstuvwxyz"))
    return ParallelConfig(**{axis: size})


def _row(layout: str, config: Config, ranks: int, options: argparse.Namespace) -> str:
    kind = layout.rstrip("0123456789")
    measure = _ideal_in_turn if kind == "pp" else _peer_in_turn
    ours, peer = run(measure, config, ranks, options.rounds, options.steps, options.patience)[0]
    memory = [
        f"{max(run(_memory, config, ranks, side)):,.0f}" if options.memory and (kind != "pp" or side is Stoker) else "-"
        for side in (Stoker, HandWritten)
    ]
    tokens = config.batch.size * config.seq_len
    speeds = [f"{tokens / statistics.median(turn.seconds for turn in side):,.0f}" for side in (ours, peer)]
    ratio, cpu_ratio, others = compared(ours, peer)
    goal = GOALS[kind]
    dp = ranks // (config.parallel.tp * config.parallel.pp)
    name = f"{kind} {layout[len(kind) :]}" if kind != "zero" else f"ZeRO {config.parallel.zero}"
    name += f" x {dp} data parallel" * (kind != "zero" and dp > 1)
    peer_name = "torch's `replicate` loop" if layout == "zero0" else PEERS[kind]
    cells = [ranks, name, speeds[0], peer_name, speeds[1], ratio, goal, cpu_ratio, others, *memory]
    return f"| {' | '.join(map(str, cells))} |"


def _peer_in_turn(config: Config, mesh: Mesh, rounds: int, steps: int, patience: float) -> list[list[Turn]]:
    keep_freed_memory()
    ours, peer = Stoker(config, mesh), HandWritten(config, mesh)
    rows = batches(config, mesh)
    check_equal(ours, peer, rows[0], config.precision)
    gc.freeze()
    turns = [functools.partial(turn_of, side, rows, steps, mesh.device) for side in (ours, peer)]
    return in_turn(turns, rounds, patience, mesh)


def _ideal_in_turn(config: Config, mesh: Mesh, rounds: int, steps: int, patience: float) -> list[list[Turn]]:
    keep_freed_memory()
    ours, rows = Stoker(config, mesh), batches(config, mesh)
    steps_of(ours, rows, 2)
    gc.freeze()
    measured = functools.partial(turn_of, ours, rows, steps, mesh.device)
    return in_turn([measured, functools.partial(_ideal_step, config, mesh, ours, rows[0])], rounds, patience, mesh)


def _ideal_step(config: Config, mesh: Mesh, ours: Stoker, rows: Batch) -> Turn:
    """A step that loses time only in its bubble."""
    watch = Watch(mesh.device)
    (stage,) = ours.engine._passes._stages  # type: ignore[attr-defined]
    plan, device = batch_plan(config, mesh.layout), mesh.device
    micro = rows[: plan.micro_rows].to(device)
    shape, dtype = (plan.micro_rows * config.seq_len, config.model.hidden_size), PRECISIONS[config.precision]
    received = torch.randn(shape, device=device).to(dtype)
    gradient = torch.full(shape, 1e-6, device=device, dtype=dtype)
    first, last = mesh.coordinate.pp == 0, mesh.coordinate.pp == mesh.layout.pp - 1

    def alone() -> None:
        for _ in range(STAGE_REPEATS):
            stage.weights.on_backward_start(is_last=False)
            x = micro.tokens if first else received.detach().requires_grad_()
            output = stage.model(x, micro.positions, None, micro.labels)
            (output * 1e-6).backward() if last else output.backward(gradient)

    stage_seconds = torch.tensor(spent(alone, device), dtype=torch.float64, device=device) / STAGE_REPEATS
    ours.engine.forward_backward(rows)  # adds to the gradients of these micro-batches, which are not used
    update = lambda: ours.engine.update(config.optim.lr)  # noqa: E731
    update_seconds = torch.tensor(spent(update, device), dtype=torch.float64, device=device)
    cpu_seconds = plan.micro_batches * stage_seconds[1] + update_seconds[1]
    dist.all_reduce(cpu_seconds)
    slowest = torch.stack([stage_seconds[0], update_seconds[0]])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds = (plan.micro_batches + mesh.layout.pp - 1) * slowest[0] + slowest[1]
    return Turn(seconds.item(), cpu_seconds.item(), watch.turn().others)


def _memory(config: Config, mesh: Mesh, build: Any) -> float:
    if build is Stoker:
        keep_freed_memory()
    side: type[Side] = build
    return peak_mib(side, config, mesh)


def _machine(most_ranks: int) -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores, torch {torch.__version__}, gloo; ranks have cores / ranks threads, at least 1"
    if most_ranks > cores:
        text += f". {most_ranks} ranks on {cores} cores are oversubscribed: they share cores and wait for each other"
    return text


if __name__ == "__main__":
    main()
