"""Shared code of benchmarks over several ranks: ranks on this machine, rows, the clock, Stoker's side of a comparison.

Both sides run in the same processes, in turn: a machine that is shared, or that throttles, then slows both.
Only memory is measured in separate processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import yaml

from stoker import conf
from stoker.conf.parent_death import die_with
from stoker.conf.schema import Config, ModelConfig, from_dict
from stoker.parallel.batch import Batch
from stoker.parallel.devices import backend_of, order_kernels, pick_device, set_exactness
from stoker.parallel.layout import batch_plan, layout_of, threads_per_rank
from stoker.parallel.mesh import Mesh, start_mesh, use_threads
from stoker.parallel.update import StepResult

BATCHES = 4  # different global batches, over and over
SECONDS_TO_WAIT = 3000.0  # for all ranks; a first step may compile for minutes
QUIET = 0.15  # cores: a machine on which other processes need no more is quiet enough
LOOK_SECONDS = 0.5


class Side(Protocol):
    """One of the two that are compared. Built with the initial weights of its config, on a mesh."""

    def step(self, rows: Batch) -> None:
        """A whole optimizer step on this rank's rows. May leave the device busy."""
        ...

    def result(self) -> tuple[float, float]:
        """Mean loss of the global batch of the last step, and the gradient's norm before clipping."""
        ...


class Stoker:
    """`stoker.trainer.parallelize.cut`'s engine, called as the loop calls it: each result is read a step late."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        from stoker.trainer.parallelize import cut

        self.engine = cut(config, mesh, batch_plan(config, mesh.layout))
        self._lr = config.optim.lr
        self._result: StepResult | None = None

    def step(self, rows: Batch) -> None:
        self.engine.forward_backward(rows)
        previous, self._result = self._result, self.engine.update(self._lr)
        if previous is not None:
            previous.read()

    def result(self) -> tuple[float, float]:
        assert self._result is not None
        result = self._result.read()
        return result.loss, result.grad_norm


def model_of(name: str) -> ModelConfig:
    """The model of a group file in conf/model. Read without Hydra, which a machine for benchmarks need not have."""
    path = Path(conf.__file__).parent / "model" / f"{name}.yaml"
    if not path.exists():
        sys.exit(f"no model {name!r}: {', '.join(sorted(p.stem for p in path.parent.glob('*.yaml')))}")
    return from_dict(yaml.safe_load(path.read_text()), ModelConfig, "model.")


def batches(config: Config, mesh: Mesh) -> list[Batch]:
    """This rank's rows of some global batches: random tokens, the same on all layouts."""
    assert config.model.vocab_size is not None
    found = []
    for number in range(BATCHES):
        generator = torch.Generator().manual_seed(number)
        shape = (config.batch.size, config.seq_len + 1)
        ids = torch.randint(config.model.vocab_size, shape, generator=generator)
        positions = torch.arange(config.seq_len).expand(config.batch.size, config.seq_len).contiguous()
        rows = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, torch.zeros_like(positions).int())
        rows = rows[mesh.dp_rank :: mesh.layout.dp]
        found.append(rows.pin() if mesh.device.type == "cuda" else rows)
    return found


@dataclass(frozen=True)
class Turn:
    """A step's share of a turn."""

    seconds: float
    cpu_seconds: float  # of all ranks together, without waiting
    others: float  # cores that other processes kept busy meanwhile


class Watch:
    """Measures time and load from when all ranks are ready until all are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _meet(device)
        self._busy, self._cpu, self._began = busy_seconds(), time.process_time(), time.perf_counter()

    def turn(self, steps: int = 1) -> Turn:
        """What `steps` steps took since."""
        _meet(self._device)
        elapsed = time.perf_counter() - self._began
        cpu = torch.tensor(time.process_time() - self._cpu, dtype=torch.float64, device=self._device)
        dist.all_reduce(cpu)
        others = (busy_seconds() - self._busy - cpu.item()) / elapsed
        return Turn(elapsed / steps, cpu.item() / steps, max(0.0, others))


def turn_of(side: Side, rows: Sequence[Batch], steps: int, device: torch.device) -> Turn:
    watch = Watch(device)
    steps_of(side, rows, steps)
    return watch.turn(steps)


def spent(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds and CPU seconds that this rank needs for `work`, which all ranks begin together."""
    _meet(device)
    cpu, began = time.process_time(), time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, time.process_time() - cpu


def steps_of(side: Side, rows: Sequence[Batch], count: int) -> None:
    for number in range(count):
        side.step(rows[number % len(rows)])


def _meet(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def in_turn(sides: Sequence[Callable[[], Turn]], rounds: int, patience: float, mesh: Mesh) -> list[list[Turn]]:
    """The turns of each side, one in every round. The first side changes from round to round.

    Rounds during which other processes were busy are repeated, and a busy machine is waited for, for `patience` seconds
    in all; what is measured afterwards counts, however it was.
    """
    found: list[list[Turn]] = [[] for _ in sides]
    patient_until = time.monotonic() + patience

    def agreed(otherwise_busy: Callable[[], float]) -> bool:
        """Whether to continue; rank 0 decides."""
        calm = mesh.rank != 0 or time.monotonic() > patient_until or otherwise_busy() <= QUIET
        return mesh.all_gather_text("calm" if calm else "")[0] == "calm"

    while len(found[0]) < rounds:
        while not agreed(_busy_cores):
            pass
        turns = {which: sides[which]() for which in sorted(range(len(sides)), reverse=len(found[0]) % 2 == 1)}
        worst = max(turn.others for turn in turns.values())
        if agreed(lambda: worst):  # noqa: B023
            for which, turn in turns.items():
                found[which].append(turn)
    return found


def _busy_cores() -> float:
    """How many cores are busy while this process looks on."""
    began, busy = time.monotonic(), busy_seconds()
    time.sleep(LOOK_SECONDS)
    return (busy_seconds() - busy) / (time.monotonic() - began)


def busy_seconds() -> float:
    """CPU seconds of all processes since boot."""
    user, nice, system, _idle, _wait, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def check_equal(ours: Side, peer: Side, rows: Batch, precision: str) -> None:
    """Three steps on the same rows from the same weights must compute the same on both sides, else they are no peers.

    Leaves both warm: what compiles has compiled.
    """
    near = {"loss": 0.01, "gradient norm": 0.05}  # bf16, and AdamW amplifies small differences
    if precision == "fp32":
        near = dict.fromkeys(near, 1e-4)
    for step in range(3):
        results = []
        for side in (ours, peer):
            side.step(rows)
            results.append(side.result())
        for what, a, b in zip(near, *results, strict=True):
            if not abs(a - b) <= near[what] * abs(b):
                raise ValueError(f"step {step + 1}: {what} is {a:.6g} on our side and {b:.6g} on the peer's")


def peak_mib(build: Callable[[Config, Mesh], Side], config: Config, mesh: Mesh) -> float:
    """Most memory of this rank over three steps of one side: allocated on a GPU, else resident."""
    side, rows = build(config, mesh), batches(config, mesh)
    steps_of(side, rows, 3)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
        return torch.cuda.max_memory_allocated(mesh.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def compared(ours: Sequence[Turn], peer: Sequence[Turn]) -> tuple[str, str, str]:
    """How much faster we are by the clock and in CPU seconds, median over the rounds and range; others' cores."""
    pairs = list(zip(ours, peer, strict=True))
    return (
        _with_range([b.seconds / a.seconds for a, b in pairs]),
        _with_range([b.cpu_seconds / a.cpu_seconds for a, b in pairs]),
        f"{statistics.mean(turn.others for pair in pairs for turn in pair):.2f}",
    )


def _with_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def run(function: Callable[..., Any], config: Config, ranks: int, *arguments: Any) -> list[Any]:
    """`function(config, mesh, *arguments)` on `ranks` fresh processes; what each returned. Ends the program on failure.

    `function` is at the top of a module. CPU ranks share the cores as the ranks of a run do.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as trainer.__main__ does, before torch is loaded
    os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(None, ranks))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            work = (theirs, os.path.join(folder, "store"), rank, ranks, function, config, arguments)
            processes.append(context.Process(target=_rank, args=work, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            found: dict[int, Any] = {}
            while len(found) < ranks:
                for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in found]):
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        done, found[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        done, found[rank] = False, "it left no result"
                    if not done:
                        sys.exit(f"rank {rank} failed: {found[rank]}")
            return [found[rank] for rank in range(ranks)]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _rank(
    pipe: Any, store: str, rank: int, ranks: int, function: Callable[..., Any], config: Config, arguments: Sequence[Any]
) -> None:
    die_with(os.getppid())
    try:
        use_threads(None, ranks)
        layout = layout_of(config, ranks)
        file = dist.FileStore(store, ranks)
        file.set_timeout(timedelta(seconds=SECONDS_TO_WAIT))
        set_exactness(config.deterministic)
        device = pick_device(None, rank, ranks, config.launch.backend)
        order_kernels(device)
        mesh = start_mesh(layout, device, file, rank, SECONDS_TO_WAIT, backend_of(config.launch.backend, device))
        message = True, function(config, mesh, *arguments)
        dist.barrier()  # no rank leaves while another needs it
    except BaseException:
        message = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(message))
    os._exit(0)  # gloo's threads now and then hang in the interpreter's teardown
