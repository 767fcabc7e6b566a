"""Steps that run `stoker` and benchmarks as a user would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import read_ending
from tests.launch.runs import assert_same_state, command, finish, overrides, steps_of, write_text

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["data.document_mask=true", "precision=bf16", "deterministic=true"]


def _ranks(device: str, ranks: int) -> list[str]:
    """So many ranks on one card, or on the CPU."""
    shared = ["launch.backend=gloo"] if device == "cuda" and ranks > 1 else []
    return [f"launch.device={device}", f"launch.nproc={ranks}", *shared]


def _finish(home: Path, words: list[str]) -> tuple[int, str]:
    status, output = finish(home, words, timeout=145.0, cwd=ROOT)
    print(output, flush=True)
    return status, output


def killed_run(device: str, folder: Path) -> dict[str, Any]:
    """Documents, evaluation and checkpoints; killed in step 7 and resumed, it is the run that was not, bit by bit."""
    write_text(folder / "text")
    words = ["steps=10", "checkpoint.every=3", "eval.sequences=8", "eval.every=5", *DOCUMENTS, *_ranks(device, 1)]
    whole, killed = folder / "whole", folder / "killed"
    for run, faults in ((whole, []), (killed, ["faults=[{at: 7, do: kill}]"])):
        status, output = _finish(folder, command("train", *overrides(run, folder / "text", *words, *faults)))
        assert status == 0, output[-2000:]
    attempts = RunDirectory(killed).attempt_numbers()
    assert len(attempts) == 2, f"it was killed once, and has {len(attempts)} attempts"
    assert steps_of(whole) == steps_of(killed), "the killed run is another"
    assert_same_state(killed, whole)
    losses = [step["loss"] for step in read(RunDirectory(killed).metrics)]
    return {"summary": f"10 steps in 2 attempts are bitwise those of one, loss {losses[-1]:.4f}", "losses": losses}


def check(device: str, folder: Path) -> dict[str, Any]:
    """`stoker check`: one rank on the GPU against one on the CPU, in fp32."""
    write_text(folder / "text")
    words = [word for word in overrides(folder / "run", folder / "text", *_ranks(device, 1)) if "run.dir" not in word]
    against = "launch.device=cpu launch.nproc=1 launch.backend=null"
    status, output = _finish(folder, command("check", *words, "--against", against, "--steps", "4"))
    assert status == 0, output[-2000:]
    rows = dict(re.findall(r"^(loss|gradient norm|gradient|parameter)  .*?(\S+)  \S+  same$", output, re.MULTILINE))
    assert set(rows) == {"loss", "gradient norm", "gradient", "parameter"}, output[-2000:]
    return {"summary": ", ".join(f"{name} {value}" for name, value in rows.items()), "differences": rows}


def hang(device: str, folder: Path) -> dict[str, Any]:
    """A rank that sleeps for ever is named, with the stacks, and the collective in which the other waits."""
    write_text(folder / "text")
    words = ["launch.hang_seconds=2", "launch.max_restarts=0", "faults=[{at: 4, rank: 1, do: hang}]"]
    run = folder / "hung"
    words = overrides(run, folder / "text", *words, *_ranks(device, 2))
    status, output = _finish(folder, command("train", *words))
    directory = RunDirectory(run)
    ending = read_ending(directory, 1)
    assert status == 1 and ending is not None and ending.outcome == "hung", output[-2000:]
    assert "rank 1" in ending.message and "holds the run up" in ending.message, ending.message
    report = (directory.attempt(1) / "hang.txt").read_text()
    assert "waits for other ranks" in report, report
    return {"summary": ending.message, "report": report}


def utilisation(device: str, folder: Path) -> dict[str, Any]:
    """Of `llama3_1b` at 4,096 tokens, beside a hand-written loop on `fully_shard`, eager and compiled."""
    small = "--model tiny --vocab 512 --seq-len 64 --rows 2 --micro 1 --rounds 1 --steps 1 --ranks 1 --precision fp32"
    large = "--model llama3_1b --seq-len 4096 --rows 8 --micro 4 --rounds 4 --steps 3 --ranks 1"
    words = [*(large if device == "cuda" else small).split(), "--no-memory", "--patience", "0"]
    found: dict[str, Any] = {}
    ways: dict[str, list[str]] = {"eager": []}
    if device == "cuda":
        ways["compiled"] = ["--compile"]
    for kind, more in ways.items():
        program = [sys.executable, str(ROOT / "benchmarks" / "mfu.py"), *words, *more]
        done = subprocess.run(program, cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=145, check=True)
        print(done.stdout, flush=True)
        ratio = re.search(r"^ratio ([\d.]+)", done.stdout, re.MULTILINE)
        ours = re.search(r"^\| stoker \| ([\d,]+) \| (.*?) \|", done.stdout, re.MULTILINE)
        assert ratio is not None and ours is not None, done.stdout[-2000:]
        found[kind] = {"ratio": float(ratio[1]), "tokens_per_second": ours[1], "utilisation": ours[2]}
    summary = "; ".join(f"{k}: {v['utilisation']}, {v['ratio']} of the loop" for k, v in found.items())
    return {"summary": summary, **found}
