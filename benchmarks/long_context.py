"""Context parallelism beside what one does without it, on this machine's ranks: tokens per second and memory.

    python benchmarks/long_context.py [--ranks 2] [--seq-len 2048] [--rounds 5] [--steps 1] [--documents 500] ...

The peer has the same ranks, each with whole sequences (cp 1), and `activation_checkpointing=full`. Both sides run in
the same processes, in turn, from the same weights over the same rows, and must compute the same losses and gradient
norms first. The ratio is the median over the rounds, with its range. Memory is the worst rank's growth over the steps
of a separate run of each side: resident on CPUs, allocated on GPUs.

torch's own `context_parallel` is tried on the attention of one layer, and its error shown where it does not run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import Side, Stoker, Turn, batches, check_equal, compared, in_turn, run, steps_of, turn_of

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import Mesh
from stoker.trainer.runtime.process import give_freed_memory_back, keep_freed_memory

SMALL = ModelConfig(
    name="3M",
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=704,
)
NATIVE = "bf16" if torch.cuda.is_available() else "fp32"  # CPUs without units for bf16 emulate it, far slower
COLUMNS = ("ranks", "context", "checkpointing", "tokens/s", "cp 1, full: tokens/s", "ratio (range)", "of CPU seconds")
COLUMNS += ("others' cores", "MiB per rank", "cp 1, full: MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--documents", type=int, help="tokens of a document on average; default: one a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--precision", default=NATIVE, choices=["bf16", "fp32"])
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait, per row, for quiet CPUs")
    options = parser.parse_args()
    documents = f"documents of {options.documents}" if options.documents else "one document a sequence"
    print(f"{SMALL.name}, sequences of {options.seq_len} tokens, {documents}, {options.precision}; ", end="")
    print(f"{options.rounds} rounds of {options.steps} steps, torch {torch.__version__}\n")
    for ranks in options.ranks:
        found = run(_of_torch, _config(1, "", "", options), ranks)[0]
        print(f"torch's context_parallel on {ranks} ranks: {found}", flush=True)
    print()
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    for ranks in options.ranks:
        for context in ("gather", "ulysses"):
            for mode in ("none", "full"):
                print(_row(ranks, context, mode, options), flush=True)


def _config(cp: int, context: str, mode: str, options: argparse.Namespace) -> Config:
    """As many sequences a step as there are ranks at most, in one micro-batch."""
    config = Config(
        model=copy.deepcopy(SMALL),
        batch=BatchConfig(max(options.ranks)),
        seq_len=options.seq_len,
        parallel=ParallelConfig(cp=cp, context=context or "gather", zero=0),
        optim=OptimConfig(lr=1e-4),
        precision=options.precision,
        activation_checkpointing=mode or "none",
    )
    config.data.document_mask = options.documents is not None
    return config


def _row(ranks: int, context: str, mode: str, options: argparse.Namespace) -> str:
    config = _config(ranks, context, mode, options)
    peer = _config(1, "", "full", options)
    config.batch.micro_size = 1  # the same activations: the peer has one whole sequence at a time, this one its share
    peer.batch.micro_size = 1
    ours, theirs = run(_in_turn, peer, ranks, config, options)[0]
    memory = [f"{max(run(_growth, each, ranks, options)):,.0f}" for each in (config, peer)]
    tokens = config.batch.size * config.seq_len
    speeds = [f"{tokens / statistics.median(turn.seconds for turn in side):,.0f}" for side in (ours, theirs)]
    cells = [ranks, context, mode, *speeds, *compared(ours, theirs), *memory]
    return f"| {' | '.join(map(str, cells))} |"


def _in_turn(peer: Config, mesh: Mesh, config: Config, options: argparse.Namespace) -> list[list[Turn]]:
    from stoker.parallel.mesh import mesh_over_default_group

    keep_freed_memory()
    shared = mesh_over_default_group(layout_of(config, mesh.layout.world), mesh.device, 600.0)
    sides: list[tuple[Side, list[Batch]]] = [
        (Stoker(config, shared), _rows(config, shared, options)),
        (Stoker(peer, mesh), _rows(peer, mesh, options)),
    ]
    _check_equal(sides, config.precision)
    gc.freeze()
    turns = [functools.partial(turn_of, side, rows, options.steps, mesh.device) for side, rows in sides]
    return in_turn(turns, options.rounds, options.patience, mesh)


def _rows(config: Config, mesh: Mesh, options: argparse.Namespace) -> list[Batch]:
    found = batches(config, mesh)
    if options.documents is None:
        return found
    begins = torch.zeros(config.batch.size, config.seq_len, dtype=torch.bool)
    begins = torch.rand(begins.shape, generator=torch.Generator().manual_seed(0)) < 1 / options.documents
    begins[:, 0] = True
    places = torch.arange(config.seq_len).expand_as(begins)
    positions = (places - places.where(begins, 0).cummax(1).values)[mesh.dp_rank :: mesh.layout.dp]
    documents = begins.cumsum(1).int()[mesh.dp_rank :: mesh.layout.dp]
    return [replace(rows, positions=positions, documents=documents) for rows in found]


def _check_equal(sides: list[tuple[Side, list[Batch]]], precision: str) -> None:
    """`ranks.check_equal`, where each side has its own rows of the same batch."""
    (ours, our_rows), (peer, peer_rows) = sides

    class Own:
        """The peer, over its own rows whatever it is given."""

        def step(self, rows: Batch) -> None:
            peer.step(peer_rows[0])

        def result(self) -> tuple[float, float]:
            return peer.result()

    check_equal(ours, Own(), our_rows[0], precision)


def _growth(config: Config, mesh: Mesh, options: argparse.Namespace) -> float:
    """By how many MiB this rank's memory grows at most over the steps of one side."""
    give_freed_memory_back()
    side, rows = Stoker(config, mesh), _rows(config, mesh, options)
    gc.collect()
    if mesh.device.type == "cuda":
        base = torch.cuda.memory_allocated(mesh.device)
        steps_of(side, rows, 3)
        torch.cuda.synchronize(mesh.device)
        return (torch.cuda.max_memory_allocated(mesh.device) - base) / 2**20
    base = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from now on
    steps_of(side, rows, 3)
    return (_resident("VmHWM") - base) / 2**10


def _resident(which: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def _of_torch(config: Config, mesh: Mesh) -> str:
    """Whether torch's own runs here: its first line of an error, or that it does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    device_mesh = init_device_mesh(mesh.device.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    q, k, v = (torch.randn(1, 8, 256, 32, device=mesh.device, requires_grad=True) for _ in range(3))
    try:
        with context_parallel(device_mesh, buffers=[q.detach(), k.detach(), v.detach()], buffer_seq_dims=[2] * 3):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    except Exception as error:  # of any kind: it is shown
        return f"does not run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return "runs; it takes no document mask, and is not timed"


if __name__ == "__main__":
    main()
