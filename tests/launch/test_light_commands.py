"""Commands that only look at a run, or at nothing, do not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory, make_run_directory, write_config
from stoker.conf.schema import Config
from tests.extent import some
from tests.launch.runs import environment

COMMANDS = ["status", "--help", "stop", "logs", "completion bash", "checkpoint save"]
HEAVY = ("torch", "transformers", "datasets", "tokenizers", "deepspeed")


@pytest.mark.parametrize("command", some(COMMANDS, 1))
def test_a_command_that_looks_at_a_run_loads_no_torch(tmp_path: Path, command: str) -> None:
    run = RunDirectory(tmp_path / "run")
    make_run_directory(run, False)
    write_config(run, Config())
    run.attempts.mkdir(exist_ok=True)
    words = command.split() + ([] if command in ("--help", "completion bash") else [str(run.path)])
    program = f"""
import sys
from stoker.launch.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert ended.stderr.splitlines()[-1] == "[]", ended.stderr
