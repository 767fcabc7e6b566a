"""`stoker compare` names the first step and metric that are not the same, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.launch.cli import main
from stoker.launch.compare import compare_steps
from tests.launch.report.fabricated import a_run


def written(path: Path, steps: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def test_two_runs_of_the_same_numbers_are_equal_to_the_last_bit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = (a_run(tmp_path / name).path for name in ("a", "b"))
    assert main(["compare", str(one), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "the configs are the same" in shown and "equal to the last bit in 60 common steps, to step 60\n" in shown


def test_one_other_key_and_the_first_step_in_which_it_shows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one, other = a_run(tmp_path / "a", steps=60).path, a_run(tmp_path / "b", steps=60, lr=2e-3).path
    assert main(["compare", str(one), str(other)]) == 1
    shown = capsys.readouterr().out
    assert "optim.lr" in shown and "maths" in shown and "batch" not in shown
    assert f"first difference: lr in step 1: {1e-3 / 6!r} and {2e-3 / 6!r} (1.0e+00 relative)" in shown


def test_the_last_bit_of_one_number_is_a_difference(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [{"step": n, "loss": 1.0, "grad_norm": 2.0, "step_seconds": n} for n in range(1, 6)]
    one = written(tmp_path / "a", steps)
    steps[3] = steps[3] | {"loss": 1.0000000000000002}
    found = compare_steps(one, written(tmp_path / "b", steps))
    assert not found.equal and found.first is not None
    assert (found.first.metric, found.first.first) == ("loss", (4, 1.0, 1.0000000000000002))
    assert found.metrics["loss"].differing == 1 and found.metrics["loss"].worst == pytest.approx(2.2e-16, rel=0.1)


def test_steps_of_one_run_only_are_counted_and_the_others_compared(tmp_path: Path) -> None:
    def steps(*numbers: int) -> list[dict[str, Any]]:
        return [{"step": n, "loss": float(n)} for n in numbers]

    found = compare_steps(written(tmp_path / "a", steps(1, 2, 3, 7)), written(tmp_path / "b", steps(2, 3, 4, 5, 7, 8)))
    assert (found.common, found.last_common, found.only, found.equal) == (3, 7, (1, 3), True)
    nothing = compare_steps(written(tmp_path / "a", steps(1)), written(tmp_path / "b", steps(2)))
    assert not nothing.equal and nothing.common == 0


def test_a_number_that_is_not_finite_in_one_run_only_is_a_difference(tmp_path: Path) -> None:
    one = written(tmp_path / "a", [{"step": 1, "loss": None}, {"step": 2, "loss": None}])
    other = written(tmp_path / "b", [{"step": 1, "loss": None}, {"step": 2, "loss": 2.0}])
    found = compare_steps(one, other)
    assert found.first is not None and found.first.first == (2, None, 2.0)
