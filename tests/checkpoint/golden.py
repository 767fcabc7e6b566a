"""The golden checkpoint: one of each format version is kept, because later versions must read it.

python -m tests.checkpoint.golden      # writes tests/checkpoint/golden/format-N/step-00000003, once per version
"""

from __future__ import annotations

from pathlib import Path

import torch

from stoker.checkpoint import plan, writer
from stoker.checkpoint.format import FORMAT
from stoker.parallel.dtypes import DTYPES
from tests.checkpoint.simulated import Grid, Tensors, cut, save, start

HOME = Path(__file__).with_name("golden")
STEP, GRID = 3, Grid(rows=2, replicas=2)
STATE = {"step": STEP, "loss": 2.5, "val_loss": None, "data": {"row": 2**40}, "config": {"seed": 7, "name": "süß"}}


def tensors() -> Tensors:
    """Every dtype; matrices, a vector, a scalar, an empty one; more than a block of one tensor."""
    small = torch.arange(15).reshape(5, 3)
    found: Tensors = {("param", f"of.{name}"): small.to(dtype) for name, dtype in DTYPES.items()}
    found["param", "large"] = torch.arange(600.0).reshape(20, 30) / 7
    found["optim.exp_avg", "large"] = torch.arange(600.0).reshape(20, 30) / 11
    found["param", "vector"] = torch.arange(9.0)
    found["param", "scalar"] = torch.tensor(-1.5)
    found["param", "empty"] = torch.zeros(0, 4)
    return found


def write(directory: Path) -> None:
    writer.BLOCK_BYTES, plan.SPLIT_ELEMENTS = 1024, 16
    save(start(directory, GRID.world, timeout_seconds=60.0), STEP, cut(tensors(), GRID), STATE)


if __name__ == "__main__":
    write(HOME / f"format-{FORMAT}")
