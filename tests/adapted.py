"""Runs with adapters for tests: in this process, of a base that transformers wrote."""

from __future__ import annotations

from pathlib import Path

import stoker
from stoker.checkpoint import newest
from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Outcome
from tests.launch.runs import overrides, write_text

OF_THE_BASE = ("model.", "optim.lr=1e-2")  # settings of other tests' runs that the base, or this file, decides


def adapter_words(home: Path, name: str, base: Path, *more: str) -> list[str]:
    """The words of a run of four steps in fp32 on one rank, with an adapter for two projections."""
    text = home / "text"
    if not text.exists():
        write_text(text, 12)
    words = overrides(home / name, text, f"data.cache={home / 'cache'}", "steps=4", "checkpoint.every=2")
    kept = [word for word in words if not word.startswith(OF_THE_BASE)]
    lora = ["adapter=lora", "adapter.rank=4", "adapter.target_modules=[q_proj,down_proj]"]
    others = [f"model.init_from={base}", "launch.nproc=1", "data.workers=0", "log.progress=none", "optim.lr=1e-2"]
    wanted = [*kept, *lora, *others, "schedule=constant", *more]
    chosen = {word.partition("=")[0]: word for word in wanted}
    return [word for word in chosen.values() if not word.endswith("=-")]  # which takes a setting out


def adapter_run(home: Path, name: str, base: Path, *more: str) -> RunDirectory:
    """Train it here, to its last step."""
    ending = stoker.run(adapter_words(home, name, base, *more))
    assert ending.outcome is Outcome.COMPLETED, ending
    return RunDirectory(home / name)


def checkpoint_of(run: RunDirectory) -> Path:
    return newest(run.checkpoints)[0]
