"""`python -m tests.gpu`: what fails, is late or does not run cannot seem to have passed. Its steps run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.__main__ import ROOT, STEPS, Step, main
from tests.gpu.report import Result, Status, as_json, table, verdict

HERE = "tests.test_gpu_script"
PROVES = Step("proves", f"{HERE}:proves", 60)


def proves(device: str, folder: Path) -> dict[str, Any]:
    return {"summary": f"on {device}", "number": 7}


def is_wrong(device: str, folder: Path) -> dict[str, Any]:
    raise AssertionError("differs by 1e-2\nand more")


def dies(device: str, folder: Path) -> dict[str, Any]:
    os._exit(0)


def sleeps(device: str, folder: Path) -> dict[str, Any]:
    """With a child in a session of its own, as `stoker train` has its ranks."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with Path(os.environ["STOKER_TEST_NOTE"]).open("a") as note:
        note.write(f"{child.pid}\n")
    time.sleep(60)
    return {"summary": "never"}


def ran(steps: list[Step], tmp_path: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status = main(["--device", "cpu", "--json", str(tmp_path / "found.json"), *words], steps)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "cpu"
    return status, {step["name"]: step for step in found["steps"]}


def test_a_step_reports_what_it_found_or_why_it_failed(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps = [PROVES, Step("is wrong", f"{HERE}:is_wrong", 60), Step("dies", f"{HERE}:dies", 60)]
    status, found = ran([*steps, Step("none", "", 0, absent="there is none")], tmp_path)
    assert status == 1
    assert (found["proves"]["status"], found["proves"]["summary"]) == ("passed", "on cpu")
    assert found["proves"]["numbers"] == {"number": 7}
    assert (found["is wrong"]["status"], found["is wrong"]["summary"]) == ("failed", "AssertionError: differs by 1e-2")
    assert (found["dies"]["status"], found["dies"]["summary"]) == (
        "failed",
        "it ended with status 0 and gave no answer",
    )
    assert found["none"]["status"] == "absent"
    shown = capsys.readouterr().out
    assert "1 passed, 2 failed, 1 absent" in shown and "nothing of a GPU" in shown


@pytest.mark.long
def test_a_step_is_killed_at_its_limit_with_all_that_it_started_and_the_rest_is_not_reached(
    tmp_path: Path, monkeypatch
) -> None:
    note = tmp_path / "children"
    monkeypatch.setenv("STOKER_TEST_NOTE", str(note))
    late = [Step(name, f"{HERE}:sleeps", 600) for name in ("sleeps", "sleeps too")]  # as many as run at a time
    status, found = ran([*late, PROVES], tmp_path, "--seconds", "12")
    assert status == 1
    assert found["sleeps"]["status"] == "late" and found["proves"]["status"] == "not reached"
    children = note.read_text().split()
    assert len(children) == 2
    for child in children:
        with suppress(FileNotFoundError, ProcessLookupError):  # it is gone
            assert not Path(f"/proc/{child}/environ").read_bytes(), "only a zombie has none"


@pytest.mark.parametrize("status", [Status.FAILED, Status.LATE, Status.NOT_REACHED])
def test_only_what_passed_counts_as_passed(status: Status) -> None:
    passed, other = (Result("a", of, 1.0, "") for of in (Status.PASSED, status))
    assert verdict([passed]) == 0 and verdict([passed, other]) == 1 and verdict([]) == 1
    assert verdict([passed, Result("b", Status.ABSENT, 0.0, "none")]) == 0
    assert verdict([Result("b", Status.ABSENT, 0.0, "none")]) == 1, "nothing was proven"
    assert status.value in table([passed, other], "cuda") and json.loads(as_json([passed], "cuda"))["steps"]


def test_an_unknown_step_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "crad"], STEPS)
    assert "no step crad: card" in capsys.readouterr().err


def test_a_machine_without_a_gpu_fails_at_once_unless_it_is_told_to_use_its_cpu(tmp_path: Path) -> None:
    status = main(["--json", str(tmp_path / "found.json")], [PROVES])
    (step,) = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert status == 1 and "torch finds no GPU here" in step["summary"]


BARE = """
import importlib, sys
absent = ("pytest", "hypothesis", "deepspeed", "datasets", "webdataset", "wandb", "pyarrow", "tensorboard", "rich",
          "matplotlib", "fsspec", "s3fs", "zstandard", "isal", "moto", "requests")
sys.modules |= dict.fromkeys(absent)  # importing them fails
from pathlib import Path
from tests.gpu.__main__ import STEPS
for step in STEPS:
    if step.absent is None:
        module, _, function = step.where.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
from tests.gpu import steps
print(steps.card("cpu", Path("."))["summary"])
print(steps.host_syncs("cpu", Path("."))["summary"])
print(steps.kernels("cpu", Path("."))["summary"])
print(steps.offload_and_staging("cpu", Path("."))["summary"])
"""


@pytest.mark.long
def test_steps_run_on_a_bare_machine_with_the_device_replaced() -> None:
    """Without pytest, DeepSpeed and all packages that only data and reports need."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BARE], env=environment, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "TFLOP/s in bf16" in lines[0] and "0 in 5 steps" in done.stdout and "staging" in lines[-1]


def test_the_whole_script_reports_every_step_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ["-m", "tests.gpu", "--device", "cpu", "--seconds", "500", "--json", str(file)]
    done = subprocess.run([sys.executable, *words], text=True, capture_output=True, cwd=ROOT)
    found = {step["name"]: step["status"] for step in json.loads(file.read_text())["steps"]}
    assert found == {step.name: "absent" if step.absent else "passed" for step in STEPS}, done.stdout[-3000:]
    assert done.returncode == 0
