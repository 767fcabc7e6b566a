"""`launch.preflight` in a run: it changes no step, and refuses before one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import assert_same_state, overrides, steps_of, train_here, write_text

pytestmark = pytest.mark.long
OTHER = "Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n"


def test_steps_and_state_are_equal_to_the_last_bit_with_and_without_it(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    for name in ("false", "true"):
        words = overrides(tmp_path / name, tmp_path / "text", "steps=6", f"launch.preflight={name}", "tracker=none")
        train_here(tmp_path, words)
    assert steps_of(tmp_path / "true") == steps_of(tmp_path / "false") != []
    assert_same_state(tmp_path / "true", tmp_path / "false")
