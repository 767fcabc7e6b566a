"""Commands on a run with a long history: seconds and memory, beside the same on a short one.

    python benchmarks/histories.py [--steps 1000000] [--attempts 1000] [--checkpoints 300]

The long run has so many lines of metrics (and as many of log), attempts and checkpoints; the short one has a hundredth.
Each command runs in a process of its own; "more" is its peak of memory beyond that on the short run. Goal: 32 MiB more
at most, and no command but the summary of a run's end, which reads every line, above a few seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from stoker.checkpoint.format import decode_manifest, encode_manifest
from stoker.checkpoint.names import MANIFEST, step_directory
from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Beginning, Ending, Outcome, write_beginning, write_ending

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "indexed"
SHORTER = 100  # how many times shorter the short history is
GOAL_MIB = 32.0

COMMANDS = {
    "status": "main(['status', str(run.path)])",
    "logs": "main(['logs', str(run.path), '--attempt', '1'])",
    "checkpoint ls": "main(['checkpoint', 'ls', str(run.path)])",
    "resume: newest checkpoint": "newest_step(run.checkpoints)",
    "resume: cut back to half": "cut_back(run.metrics, last_step(run.metrics) // 2)",
    "end: table and picture": "summarize(run.path, compose([]), 'completed')",
}
PROGRAM = """
import contextlib, io, json, resource, sys, time
from pathlib import Path
from stoker.checkpoint import newest_step
from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.metrics import cut_back, last_step
from stoker.trainer.report.summary import summarize
run = RunDirectory(Path(sys.argv[1]))
began = time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    {command}
seconds = time.process_time() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--attempts", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=300)
    options = parser.parse_args()
    sizes = (options.steps, options.attempts, options.checkpoints)
    with tempfile.TemporaryDirectory() as folder:
        short = make_run(Path(folder) / "short", *(max(2, size // SHORTER) for size in sizes))
        long = make_run(Path(folder) / "long", *sizes)
        print(f"{sizes[0]:,} steps, {sizes[1]:,} attempts, {sizes[2]:,} checkpoints; goal: {GOAL_MIB:.0f} MiB more")
        print(f"{'':28} {'s, short':>9} {'s, long':>9} {'MiB':>6} {'more':>6}")
        for name, command in COMMANDS.items():
            brief, whole = (measured(run, command) for run in (short, long))
            more = whole[1] - brief[1]
            verdict = "met" if more <= GOAL_MIB else "missed"
            print(f"{name:28} {brief[0]:9.2f} {whole[0]:9.2f} {whole[1]:6.0f} {more:6.0f}  {verdict}", flush=True)


def measured(run: RunDirectory, command: str) -> list[float]:
    """Seconds of processor time, without imports, and the peak of memory in MiB."""
    words = [sys.executable, "-c", PROGRAM.replace("{command}", command), str(run.path)]
    found: list[float] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return found


def make_run(path: Path, steps: int, attempts: int, checkpoints: int) -> RunDirectory:
    """A run directory with such a history. Of its checkpoints only manifests and states are read, and there."""
    run = RunDirectory(path)
    run.attempt(1).mkdir(parents=True)
    shutil.copyfile(GOLDEN / "config.yaml", run.config)
    line = json.loads((GOLDEN / "metrics.jsonl").read_text().splitlines()[-1])
    with run.metrics.open("w") as metrics, run.log(1, 0).open("w") as log:
        for number in range(1, steps + 1):
            text = json.dumps(line | {"step": number})
            metrics.write(text + "\n")
            log.write(f"step {number}/{steps}  {text[:80]}\n")
    now = time.time()
    for number in range(1, attempts + 1):
        run.attempt(number).mkdir(exist_ok=True)
        write_beginning(run, number, Beginning(now + number, number, 2, "host"))
        write_ending(run, number, Ending(Outcome.FAILED, f"message {number}", number, retry=True, time=now + number))
        seconds = {"began": now + number, "time": now + number + 0.5, "resumed_from": number, "seconds": {}}
        run.seconds(number).write_text(json.dumps(seconds))
    sound = GOLDEN / "checkpoints" / "step-00000006"
    manifest = decode_manifest((sound / MANIFEST).read_bytes(), MANIFEST)
    for number in range(1, checkpoints + 1):
        place = step_directory(run.checkpoints, number)
        shutil.copytree(sound, place)
        (place / MANIFEST).write_bytes(encode_manifest(replace(manifest, step=number)))
    return run


if __name__ == "__main__":
    main()
