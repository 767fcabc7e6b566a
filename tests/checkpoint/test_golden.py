"""Checkpoints of every format version so far are read; the present version writes the bytes it has always written."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint import TensorReader, describe, verify
from stoker.checkpoint.format import FORMAT
from stoker.checkpoint.names import MANIFEST
from tests.checkpoint.golden import HOME, STATE, STEP, tensors, write
from tests.checkpoint.simulated import Grid, blank, cut, holds, resume_all, same_bits

VERSIONS = sorted(HOME.iterdir())


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_checkpoint_of_every_version_is_read(version: Path) -> None:
    ranks = blank(cut(tensors(), Grid(rows=3)))
    assert resume_all(version, ranks) == [STATE] * 3
    assert holds(ranks, tensors())
    assert verify(version / f"step-{STEP:08d}") == []
    (summary,) = describe(version)
    assert (summary.step, summary.loss, summary.problem, summary.ranks) == (STEP, 2.5, None, 4)
    with TensorReader(summary.path) as reader:
        assert all(same_bits(reader.read(name, kind), value) for (kind, name), value in tensors().items())


def test_this_version_has_a_golden_checkpoint_and_still_writes_it_byte_for_byte(tmp_path: Path) -> None:
    """A change of the written bytes is a new format version, with its golden checkpoint."""
    write(tmp_path)
    golden = HOME / f"format-{FORMAT}" / f"step-{STEP:08d}"
    names = sorted(path.name for path in golden.iterdir())
    assert names == sorted(path.name for path in (tmp_path / golden.name).iterdir())
    for name in names:
        if name != MANIFEST:  # which holds the time
            assert (tmp_path / golden.name / name).read_bytes() == (golden / name).read_bytes(), name
    assert sum(path.stat().st_size for path in golden.iterdir()) < 32_000
