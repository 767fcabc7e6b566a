"""Seconds from the command line to the end of step 1, next to those of a bare `torchrun`.

    python benchmarks/startup.py [--repeats 5] [--ranks 2] [overrides ...]

The peer is `torchrun --standalone` of a script that only imports torch and builds a gloo process group; it is finished
when its last rank is. `stoker train` trains the tiny model on token files that are ready, on one row per rank, so that
the start is measured and not the arithmetic of a step; it is finished when the loss of step 1 is in
metrics.jsonl. Each repeat starts both, in alternating order.

The table shows where Stoker's time goes, from outside: its first line on stderr, the kernel's record of when the ranks
were started, their progress stamps, and the time of the last write to metrics.jsonl. Its rows are of rank 0 and each is
a median, so they need not add up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from ranks import busy_seconds

from stoker.conf.compose import compose
from stoker.data import prepare
from stoker.trainer.runtime.process import Phase, read_stamps

PEER = """
import sys, time
from pathlib import Path
import torch
torch.distributed.init_process_group("gloo")
Path(sys.argv[1], str(torch.distributed.get_rank())).write_text(str(time.time()))
torch.distributed.destroy_process_group()
"""
POLL_SECONDS = 0.002
PHASES = {
    "command": "launcher: imports, config, refusals, data",
    "run directory": "launcher: elastic agent",
    "process": "rank: imports, config, rendezvous, attempt",
    Phase.START: "rank: process group",
    Phase.OPEN_DATA: "rank: data",
    Phase.BUILD: "rank: model, optimizer, initial weights",
    Phase.RESUME: "rank: look for a checkpoint, observers",
    Phase.DATA: "rank: first rows",
    Phase.FORWARD_BACKWARD: "rank: forward and backward",
    Phase.AWAIT_STAGED: "rank: await staged",
    Phase.UPDATE: "rank: update, metrics",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    overrides = ["model=tiny", "data.validation=0", f"batch.size={options.ranks}", *options.overrides]
    prepare(compose(overrides))
    seconds: dict[str, list[float]] = {"stoker": [], "torchrun": []}
    phases: dict[str, list[float]] = {}
    began, busy, own = time.monotonic(), busy_seconds(), _own_seconds()
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
            for which in ("stoker", "torchrun") if repeat % 2 else ("torchrun", "stoker"):
                if which == "stoker":
                    moments = ours(Path(folder), options.ranks, overrides)
                    seconds[which].append(moments["end"] - moments["command"])
                    for (phase, begin), end in zip(moments.items(), [*moments.values()][1:], strict=False):
                        phases.setdefault(phase, []).append(end - begin)
                else:
                    seconds[which].append(peer(Path(folder), options.ranks))
    for which, values in seconds.items():
        print(f"{which:<8} {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    differences = [a - b for a, b in zip(seconds["stoker"], seconds["torchrun"], strict=True)]
    print(f"more     {statistics.median(differences):6.2f} s  ({min(differences):.2f} to {max(differences):.2f})")
    others = (busy_seconds() - busy - (_own_seconds() - own)) / (time.monotonic() - began)
    print(f"meanwhile other processes kept {max(0.0, others):.2f} of {os.cpu_count()} cores busy\n")
    for phase, text in PHASES.items():
        spent = statistics.median(phases.get(phase, [0.0]))
        if spent >= 0.005:
            print(f"{spent:6.2f} s  {text}")


def _own_seconds() -> float:
    """CPU seconds of this process and of all that it has waited for."""
    return sum(os.times()[:4])


def peer(folder: Path, ranks: int) -> float:
    """Seconds until every rank of the bare script has the process group."""
    script, out = folder / "peer.py", folder / "peer"
    script.write_text(PEER)
    out.mkdir()
    began = time.time()
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script), str(out)]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    arrived = [float(file.read_text()) for file in out.iterdir()]
    if len(arrived) != ranks:
        sys.exit(f"torchrun failed:\n{ended.stderr}")
    return max(arrived) - began


def ours(folder: Path, ranks: int, overrides: list[str]) -> dict[str, float]:
    """When each phase of `stoker train` began, in order, and its end."""
    run = folder / "run"
    began = time.time()
    words = [f"run.dir={run}", "steps=1", f"launch.nproc={ranks}", *overrides]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "stoker.launch.cli", "train", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    moments = {"command": began}
    stamps: dict[str, float] = {}
    follower = threading.Thread(target=_follow_stamps, args=(process, run / "attempts/1", stamps))
    follower.start()
    output = ""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("stoker: run directory"):
            moments["run directory"] = time.time()
        output += line
    follower.join()
    if process.wait() != 0:
        sys.exit(f"stoker train failed:\n{output}")
    return moments | stamps | {"end": (run / "metrics.jsonl").stat().st_mtime}


def _follow_stamps(process: subprocess.Popen[str], attempt: Path, moments: dict[str, float]) -> None:
    """Note each phase that rank 0 enters up to the end of step 1, and when its process was made."""
    while process.poll() is None and "update" not in moments:
        time.sleep(POLL_SECONDS)
        stamps = read_stamps(attempt)
        if 0 in stamps:
            moments.setdefault("process", _started(stamps[0].pid))
            moments.setdefault(stamps[0].phase, stamps[0].time)


def _started(pid: int) -> float:
    """When the kernel started a process, to a hundredth of a second."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
