"""What a save and a restore cost, against torch's distributed checkpoint and against the disk itself.

    python benchmarks/checkpoints.py [--sizes 256 1024] [--ranks 2] [--rounds 5] [--directory DIR] [--only-reads]

Each rank holds float32 tensors of --sizes MiB and computes steps that take a little longer than copying them. Printed,
as medians over the rounds with their range, all in one run of the same processes in turn:

    stall      how long a save keeps training from going on: of Stoker over torch DCP's synchronous save, and over the
               best of DCP's asynchronous modes (a thread, a thread with a staging pool, a process)
    write      bytes per second of a shard file, fsync included, over those of a plain sequential write and fsync:
               through the page cache, and with O_DIRECT, which Stoker's own write has
    restore    bytes per second from a checkpoint on disk to the live tensors, over those of a plain read of as large a
               file into memory that is in use as well; both files are out of the page cache
    save       CPU seconds that a save costs the machine, the kernel's included, while nothing trains
    overhead   share of time that training with a save every 10 steps needs more than without; a step takes
               --step-seconds for each GiB of the rank's state, which is what 2,000 tokens take on a CPU core
"""

from __future__ import annotations

import argparse
import gc
import mmap
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

from stoker.checkpoint import Checkpoints, load, newest, open_checkpoint
from stoker.conf.schema import Config
from stoker.parallel.mesh import Mesh
from stoker.parallel.shards import PARAMETER, Chunk, Shard

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
    parser.add_argument("--step-seconds", type=float, default=3.0, help="per GiB of a rank's state")
    parser.add_argument("--only-reads", action="store_true", help="nothing but `restore`")
    parser.add_argument("--turns", type=int, default=4, help="how often the overhead is measured")
    options = parser.parse_args()
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            arguments = [folder, size, options.rounds]
            if not options.only_reads:
                arguments += [options.step_seconds * size / 1024, options.turns]
            measured = run(measure_reads if options.only_reads else measure, Config(), options.ranks, *arguments)
            print(measured[0], flush=True)


def measure(_: Config, mesh: Mesh, folder: str, size: int, rounds: int, step_seconds: float, pairs: int) -> str:
    warnings.filterwarnings("ignore")
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # DCP starts a process
    bench = Bench(mesh, Path(folder), size)
    stalls: dict[str, list[float]] = {}
    writes, direct_writes, restores, cpu = [], [], [], []
    for number in range(rounds + 1):
        found = {"stoker": bench.stoker_stall()} | bench.dcp_stalls()
        direct, plain = bench.plain_write(direct=True), bench.plain_write()  # the second file is what `reads` reads
        restored, read = bench.reads()
        if number:  # the first round warms up
            for name, seconds in found.items():
                stalls.setdefault(name, []).append(seconds)
            writes.append(plain / bench.stoker_write_seconds)
            direct_writes.append(direct / bench.stoker_write_seconds)
            restores.append(read / restored)
            cpu.append(bench.save_cpu_seconds())
    overhead = bench.overhead(step_seconds, pairs)
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
            f"{size} MiB per rank, {mesh.layout.world} ranks, a copy takes {bench.copy_seconds:.3f} s",
            f"  stall     {_spread(ours, ' s')}; {_spread(against_sync)} of DCP's synchronous save, "
            f"{_spread(against_async)} of its best asynchronous mode ({best})",
            f"  write     {_spread(writes)} of a plain write with fsync, {_spread(direct_writes)} of one with O_DIRECT",
            f"  restore   {_spread(restores)} of a plain read",
            f"  save      {_spread(cpu, ' s')} of CPU time, all ranks: {share:.2f}% of 10 steps on all cores",
            f"  overhead  {_spread([100 * share for share in overhead], '%')}, steps of {step_seconds} s",
        ]
    )


def measure_reads(_: Config, mesh: Mesh, folder: str, size: int, rounds: int) -> str:
    bench = Bench(mesh, Path(folder), size)
    ratios = []
    for _ in range(rounds + 1):
        bench.stoker_stall()
        bench.plain_write()
        restored, read = bench.reads()
        ratios.append(read / restored)
    bench.saves.close()
    return f"{size} MiB per rank, {mesh.layout.world} ranks: restore {_spread(ratios[1:])} of a plain read"


class Bench:
    """One rank's tensors, and all that is done with them. Seconds are the longest of all ranks."""

    def __init__(self, mesh: Mesh, folder: Path, size: int) -> None:
        self._mesh, self._folder = mesh, folder
        rows, columns = size * MIB // 4 // TENSORS // 1024, 1024
        shape = (rows * mesh.layout.world, columns)
        held = Chunk((rows * mesh.rank, 0), (rows, columns))
        self.tensors = [torch.randn(rows, columns) for _ in range(TENSORS)]
        self.shards = [Shard(f"w{n}", PARAMETER, shape, held, tensor) for n, tensor in enumerate(self.tensors)]
        self._bytes = size * MIB
        self._group = dist.new_group(backend="gloo")  # DCP's own: one that training uses crashes its asynchronous mode
        self.saves = Checkpoints(folder / "stoker", rank=mesh.rank, world=mesh.layout.world, attempt=1, keep=2)
        self.saves.prepare(self.shards)
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        self._step = 0
        self._read_into = torch.zeros(self._bytes, dtype=torch.uint8).fill_(1).numpy().data
        self.stoker_write_seconds = 0.0
        self.copy_seconds = self._longest(self._copy)
        self._factor = torch.randn(512, 512)
        self._products = 1
        self._products = max(1, round(1.2 * self.copy_seconds / self._longest(self.compute)))

    def compute(self) -> None:
        """A stand-in for forward and backward: a little longer than a copy of the tensors."""
        for _ in range(self._products):
            torch.mm(self._factor, self._factor)

    def stoker_stall(self) -> float:
        self._meet()
        self._save()
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

    def plain_write(self, direct: bool = False) -> float:
        """The same bytes from ready memory, one file per rank; `direct`: past the page cache, from aligned memory."""
        data = memoryview(self.tensors[0].numpy()).cast("B")
        if direct:
            aligned = mmap.mmap(-1, len(data))
            aligned.write(data)
            data = memoryview(aligned)
        path = self._folder / f"plain-{self._mesh.rank}"
        path.unlink(missing_ok=True)

        def write() -> None:
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | (os.O_DIRECT if direct else 0))
            for _ in range(TENSORS):
                for start in range(0, len(data), BLOCK):
                    written = os.write(descriptor, data[start : start + BLOCK])
                    assert written == min(BLOCK, len(data) - start)
            os.fsync(descriptor)
            os.close(descriptor)

        return self._longest(write)

    def reads(self) -> tuple[float, float]:
        """A restore, and a plain read of as large a file into memory in use.

        Each is first once and second once: the first has the page cache's memory that was given back just now.
        """
        checkpoint, plain = newest(self._folder / "stoker")[0], self._folder / f"plain-{self._mesh.rank}"

        def restore() -> None:
            load(open_checkpoint(checkpoint), self.shards, (self._mesh.rank + 0.5) / self._mesh.layout.world)

        def read() -> None:
            with open(plain, "rb", buffering=0) as file:
                at = 0
                while count := file.readinto(self._read_into[at : at + BLOCK]):
                    at += count

        seconds = {restore: 0.0, read: 0.0}
        for order in ((restore, read), (read, restore)):
            for path in (plain, *checkpoint.iterdir()):
                _forget(path)
            for work in order:
                seconds[work] += self._longest(work)
        return seconds[restore], seconds[read]

    def save_cpu_seconds(self) -> float:
        self._meet()
        dist.barrier()  # no rank collects garbage any more
        busy = busy_seconds()
        self._save()
        self.saves.wait()
        dist.barrier()
        spent = busy_seconds() - busy
        assert not any(report.error for report in self.saves.finished())
        return self._max(spent)

    def overhead(self, step_seconds: float, turns: int) -> list[float]:
        """The share by which STEPS steps take longer with a save every 10."""
        self._products = max(1, round(self._products * step_seconds / self._longest(self.compute)))
        found = []
        for _ in range(turns):
            without = self._longest(lambda: self._train(saving=False))
            found.append(self._longest(lambda: self._train(saving=True)) / without - 1)
            self.saves.wait()
            assert not any(report.error for report in self.saves.finished())
        return found

    def _train(self, saving: bool) -> None:
        for step in range(STEPS):
            self.compute()
            self.saves.await_staged()
            if saving and step % 10 == 0:
                self._save()
        self.saves.await_staged()

    def _save(self) -> None:
        self._step += 1
        self.saves.save(self._step, self.shards, {})

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
    """Drop the file from the page cache: the next read comes from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
