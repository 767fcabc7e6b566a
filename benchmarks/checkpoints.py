"""What a save and a restore cost, against torch's distributed checkpoint and against the disk itself.

    python benchmarks/checkpoints.py [--sizes 256 1024] [--ranks 2] [--rounds 5] [--directory DIR] [--writer thread]

Each rank holds float32 tensors of --sizes MiB and computes steps that take a little longer than copying them. Printed,
as medians over the rounds with their range, all in one run of the same processes in turn:

    stall      how long a save keeps training from going on: of Stoker over torch DCP's synchronous save, and over the
               best of DCP's asynchronous modes (a thread, a thread with a staging pool, a process)
    write      bytes per second of a shard file, fsync included, over those of a plain sequential write and fsync
    restore    bytes per second from a checkpoint on disk to the live tensors, over those of a plain read of as large a
               file into fresh memory; both files are out of the page cache. Beside it the plain read that uses one
               buffer of 4 MiB again and again: it shows the disk, but no restore can end with its data in 4 MiB
    save       CPU seconds that a save costs the machine, the kernel's included, while nothing trains
    overhead   share of time that training with a save every 10 steps needs more than without; a step takes
               --step-seconds for each GiB of the rank's state, which is what 2,000 tokens take on a CPU core
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import busy_seconds, run
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from checkpoint import Checkpoints, load, newest, open_checkpoint
from conf.schema import Config
from parallel.mesh import Mesh
from parallel.shards import PARAMETER, Rectangle, Shard

MIB = 1 << 20
BLOCK = 4 * MIB
TENSORS = 16
STEPS = 20  # of training, for the overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 1024], help="MiB per rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to write; default: the system's temporary directory")
    parser.add_argument("--writer", default="thread", choices=["thread", "process"])
    parser.add_argument("--step-seconds", type=float, default=3.0, help="per GiB of a rank's state")
    parser.add_argument("--turns", type=int, default=4, help="how often the overhead is measured")
    options = parser.parse_args()
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            arguments = (
                folder,
                size,
                options.rounds,
                options.writer,
                options.step_seconds * size / 1024,
                options.turns,
            )
            print(run(measure, Config(), options.ranks, *arguments)[0], flush=True)


def measure(
    _: Config, mesh: Mesh, folder: str, size: int, rounds: int, writer: str, step_seconds: float, turns: int
) -> str:
    warnings.filterwarnings("ignore")
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # DCP starts a process
    bench = Bench(mesh, Path(folder), size, writer)
    stalls: dict[str, list[float]] = {}
    writes, restores, through, cpu = [], [], [], []
    for number in range(rounds + 1):
        found = {"stoker": bench.stoker_stall(number)} | bench.dcp_stalls()
        pair = bench.plain_write(), bench.stoker_write_seconds
        restored = bench.stoker_restore()
        if number:  # the first round warms up
            for name, seconds in found.items():
                stalls.setdefault(name, []).append(seconds)
            writes.append(pair[0] / pair[1])
            restores.append(bench.plain_read() / restored)
            through.append(bench.plain_read(again=True) / restored)
            cpu.append(bench.save_cpu_seconds(number))
    overhead = bench.overhead(step_seconds, turns)
    bench.saves.close()
    for child in multiprocessing.active_children():  # DCP's process
        child.kill()
    share = 100 * statistics.median(cpu) / (10 * step_seconds * (os.cpu_count() or 1))
    modes = [name for name in stalls if name.startswith("async")]
    best = min(modes, key=lambda name: statistics.median(stalls[name]))
    ours = stalls["stoker"]
    against_sync = [a / b for a, b in zip(ours, stalls["sync"], strict=True)]
    against_async = [a / b for a, b in zip(ours, stalls[best], strict=True)]
    return "\n".join(
        [
            f"{size} MiB per rank, {mesh.layout.world} ranks, writer {writer}, a copy takes {bench.copy_seconds:.3f} s",
            f"  stall     {_spread(ours, ' s')}; {_spread(against_sync)} of DCP's synchronous save, "
            f"{_spread(against_async)} of its best asynchronous mode ({best})",
            f"  write     {_spread(writes)} of a plain write with fsync",
            f"  restore   {_spread(restores)} of a plain read; {_spread(through)} of one through a small buffer",
            f"  save      {_spread(cpu, ' s')} of CPU time, all ranks: {share:.2f}% of 10 steps on all cores",
            f"  overhead  {_spread([100 * share for share in overhead], '%')}, steps of {step_seconds} s",
        ]
    )


class Bench:
    """One rank's tensors, and all that is done with them. Seconds are the longest of all ranks."""

    def __init__(self, mesh: Mesh, folder: Path, size: int, writer: str) -> None:
        self._mesh, self._folder = mesh, folder
        rows, columns = size * MIB // 4 // TENSORS // 1024, 1024
        shape = (rows * mesh.layout.world, columns)
        held = Rectangle((rows * mesh.rank, 0), (rows, columns))
        self.tensors = [torch.randn(rows, columns) for _ in range(TENSORS)]
        self.shards = [Shard(f"w{n}", PARAMETER, shape, held, tensor) for n, tensor in enumerate(self.tensors)]
        self._bytes = size * MIB
        self._group = dist.new_group(backend="gloo")  # DCP's own: one that training uses crashes its asynchronous mode
        self.saves = Checkpoints(
            folder / "stoker", rank=mesh.rank, world=mesh.layout.world, attempt=1, keep=2, writer=writer
        )
        self.saves.prepare(self.shards)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        self.stoker_write_seconds = 0.0
        self.copy_seconds = self._longest(self._copy)
        self._factor = torch.randn(512, 512)
        self._products = 1
        self._products = max(1, round(1.2 * self.copy_seconds / self._longest(self.compute)))

    def compute(self) -> None:
        """What stands for forward and backward: a little longer than a copy of the tensors."""
        for _ in range(self._products):
            torch.mm(self._factor, self._factor)

    def stoker_stall(self, number: int) -> float:
        self._meet()
        self.saves.save(1000 + number, self.shards, {})
        self.compute()
        self.saves.await_staged()
        self.saves.wait()
        (report,) = self.saves.finished()
        assert report.error is None, report.error
        self.stoker_write_seconds = self._max(report.write_seconds)
        return self._max(report.stall_seconds)

    def dcp_stalls(self) -> dict[str, float]:
        """Of the synchronous save, and of the asynchronous ones that need no GPU."""
        found = {"sync": self._longest(lambda: dcp.save(self._state(), checkpoint_id=self._fresh("dcp")))}
        found["async, thread"] = self._dcp_stall(None)
        found["async, thread with a staging pool"] = self._dcp_stall(self._stager)
        found["async, process"] = self._dcp_stall(None, AsyncCheckpointerType.PROCESS)
        return found

    def _dcp_stall(
        self, stager: DefaultStager | None, kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD
    ) -> float:
        target = self._fresh("dcp")
        self._meet()
        began = time.perf_counter()
        response = dcp.async_save(
            self._state(),
            checkpoint_id=target,
            process_group=self._group,
            async_stager=stager,
            async_checkpointer_type=kind,
        )
        stall = time.perf_counter() - began
        self.compute()
        began = time.perf_counter()
        done = response
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.result()
            done = response.upload_completion
        stall += time.perf_counter() - began
        done.result()  # type: ignore[union-attr]
        return self._max(stall)

    def plain_write(self) -> float:
        """The same bytes from ready memory, one file per rank."""
        data = memoryview(self.tensors[0].numpy()).cast("B")
        path = self._folder / f"plain-{self._mesh.rank}"
        path.unlink(missing_ok=True)

        def write() -> None:
            with open(path, "wb", buffering=0) as file:
                for _ in range(TENSORS):
                    for start in range(0, len(data), BLOCK):
                        file.write(data[start : start + BLOCK])
                os.fsync(file.fileno())

        return self._longest(write)

    def plain_read(self, again: bool = False) -> float:
        """The same bytes into fresh memory; `again`: into one small buffer, again and again."""
        path = self._folder / f"plain-{self._mesh.rank}"
        _forget(path)

        def read() -> None:
            memory = torch.empty(BLOCK if again else self._bytes, dtype=torch.uint8).numpy().data
            with open(path, "rb", buffering=0) as file:
                at = 0
                while count := file.readinto(memory[at : at + BLOCK]):
                    at += 0 if again else count

        return self._longest(read)

    def stoker_restore(self) -> float:
        checkpoint = newest(self._folder / "stoker")[0]
        for path in checkpoint.iterdir():
            _forget(path)
        return self._longest(lambda: load(open_checkpoint(checkpoint), self.shards))

    def save_cpu_seconds(self, number: int) -> float:
        self._meet()
        dist.barrier()  # nobody collects garbage any more
        busy = busy_seconds()
        self.saves.save(2000 + number, self.shards, {})
        self.saves.wait()
        dist.barrier()
        spent = busy_seconds() - busy
        assert not any(report.error for report in self.saves.finished())
        return self._max(spent)

    def overhead(self, step_seconds: float, turns: int) -> list[float]:
        """The share by which STEPS steps take longer with a save every 10."""
        self._products = max(1, round(self._products * step_seconds / self._longest(self.compute)))
        found = []
        for number in range(turns):
            without = self._longest(lambda: self._train(None))
            first = 10_000 * (number + 1)
            found.append(self._longest(lambda: self._train(first)) / without - 1)  # noqa: B023
            self.saves.wait()
            assert not any(report.error for report in self.saves.finished())
        return found

    def _train(self, first: int | None) -> None:
        for step in range(STEPS):
            self.compute()
            self.saves.await_staged()
            if first is not None and step % 10 == 0:
                self.saves.save(first + step, self.shards, {})
        self.saves.await_staged()

    def _copy(self) -> None:
        target = torch.empty_like(self.tensors[0])
        for tensor in self.tensors:
            target.copy_(tensor)

    def _state(self) -> dict[str, Tensor]:
        return {f"w{n}.rank{self._mesh.rank}": tensor for n, tensor in enumerate(self.tensors)}

    def _fresh(self, name: str) -> Path:
        path = self._folder / name
        self._meet()
        if self._mesh.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        return path

    def _meet(self) -> None:
        gc.collect()
        dist.barrier()

    def _longest(self, work: Callable[[], object]) -> float:
        self._meet()
        began = time.perf_counter()
        work()
        return self._max(time.perf_counter() - began)

    def _max(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()


def _forget(path: Path) -> None:
    """Drop the file from the page cache: what is read next comes from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
