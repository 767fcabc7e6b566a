"""`python -m tests.gpu --seconds 360 [--device cpu] [--only NAME ...] [--json FILE]`"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.report import Result, Status, as_json, table, verdict

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = {"cuda": 1, "cpu": 2}  # steps: their figures say nothing on a CPU
MARK = "STOKER_GPU_STEP"  # in the environment of a step and of all that it starts: its folder


@dataclass(frozen=True)
class Step:
    name: str
    where: str  # MODULE:FUNCTION, called with the device's kind; returns numbers, with a "summary"
    seconds: float  # at most, where it is alone
    absent: str | None = None  # why there is nothing to prove


STEPS = (
    Step("card", "tests.gpu.steps:card", 40),
    Step("one rank", "tests.gpu.steps:one_rank", 90),
    Step("ranks on one card", "tests.gpu.steps:ranks_on_one_card", 120),
    Step("killed run", "tests.gpu.commands:killed_run", 150),
    Step("check against a CPU", "tests.gpu.commands:check", 120),
    Step("host syncs", "tests.gpu.steps:host_syncs", 60),
    Step("compile", "tests.gpu.steps:compiled", 90),
    Step("attention and loss", "tests.gpu.kernels:attention_and_loss", 90),
    Step("utilisation", "tests.gpu.commands:utilisation", 150),
    Step("kernels", "tests.gpu.steps:kernels", 60),
    Step("offload and staging", "tests.gpu.steps:offload_and_staging", 60),
    Step("hang", "tests.gpu.commands:hang", 90),
    Step("float8", "tests.gpu.steps:products_in_float8", 60),
)


def main(words: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=360.0, help="for all steps together (default 360)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps: " + ", ".join(s.name for s in steps))
    parser.add_argument("--json", type=Path, help="where the results are written, beside the table on the screen")
    options = parser.parse_args(words)
    unknown = set(options.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: {', '.join(step.name for step in steps)}")
    deadline = time.monotonic() + options.seconds
    chosen = [step for step in steps if options.only is None or step.name in options.only]
    results = []
    with ThreadPoolExecutor(AT_ONCE[options.device]) as pool:
        for result in pool.map(lambda step: run(step, options.device, deadline), chosen):
            results.append(result)
            print(table([result], "").partition("\n")[0], flush=True)
            if options.json is not None:  # what is known is kept, whatever ends the machine's time
                options.json.write_text(as_json(results, options.device))
    print(f"\n{table(results, options.device)}")
    return verdict(results)


def run(step: Step, device: str, deadline: float) -> Result:
    """`step` in a process, and a session, of its own."""
    if step.absent is not None:
        return Result(step.name, Status.ABSENT, 0.0, step.absent)
    began = time.monotonic()
    limit = min(step.seconds * AT_ONCE[device], deadline - began)
    if limit < 1:
        return Result(step.name, Status.NOT_REACHED, 0.0, "the time was over")
    with tempfile.TemporaryDirectory(prefix="stoker-gpu-") as folder:
        answer = Path(folder) / "answer.json"
        program = [sys.executable, "-m", "tests.gpu.__main__", "--step", step.where, device, folder]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, MARK: folder}  # small work: threads would only spin
        process = subprocess.Popen(program, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process.pid)
            process.wait()
            while left := _started_for(folder):  # until they are gone: they may hold the GPU's memory
                for pid in left:
                    _kill(pid)
                time.sleep(0.05)
        seconds = time.monotonic() - began
        if code is None:
            return Result(step.name, Status.LATE, seconds, f"killed after {limit:.0f} s")
        if not answer.exists():
            return Result(step.name, Status.FAILED, seconds, f"it ended with status {code} and gave no answer")
        found = json.loads(answer.read_text())
    status = Status.PASSED if found.pop("passed") and code == 0 else Status.FAILED
    return Result(step.name, status, seconds, found.pop("summary"), found)


def _started_for(folder: str) -> list[int]:
    """Processes of a step, in whatever sessions: they have its folder in their environment."""
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def answer(where: str, device: str, folder: str) -> int:
    """In the step's process: call it and write its answer."""
    module, _, function = where.partition(":")
    file = Path(folder) / "answer.json"
    try:
        if device == "cuda":
            import torch

            assert torch.cuda.is_available(), "torch finds no GPU here: --device cpu runs the script without one"
        found = getattr(importlib.import_module(module), function)(device, Path(folder))
        file.write_text(json.dumps({"passed": True, **found}))
        return 0
    except BaseException as error:
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [""])[0]
        file.write_text(json.dumps({"passed": False, "summary": f"{type(error).__name__}: {line}"[:300]}))
        return 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        status = answer(*sys.argv[2:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(main())
