"""Which modules a rank loads up to the end of its steps: real processes, as any launcher starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from stoker.conf.rundir import RunDirectory
from tests.extent import some
from tests.launch.runs import environment, last_step, overrides, write_text

LAYOUTS = [
    ["parallel.zero=3", "activation_checkpointing=full"],
    ["parallel.zero=0", "optim=sgd"],
]


@pytest.mark.parametrize("layout", some(LAYOUTS, 2), ids=" ".join)
def test_a_rank_that_compiles_nothing_loads_no_compiler(tmp_path: Path, layout: list[str]) -> None:
    """It is 800 modules and more than a second of every start, and torch loads it wherever it is not kept from it."""
    run = tmp_path / "run"
    words = overrides(run, write_text(tmp_path / "text"), "steps=2", "checkpoint.every=0", "compile=false", *layout)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = environment(tmp_path) | {
        "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPROFILEIMPORTTIME": "1",
    }  # fmt: skip
    program = [sys.executable, "-P", "-m", "stoker.trainer", *words]
    outputs = [tmp_path / f"output-{rank}" for rank in (0, 1)]
    ranks = []
    for rank, output in enumerate(outputs):
        own = given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(output, "w") as file:
            ranks.append(subprocess.Popen(program, env=own, stdout=file, stderr=file))
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0], outputs[0].read_text()
    assert last_step(run) == 2
    for rank, output in enumerate(outputs):
        loaded = imported(output.read_text() + RunDirectory(run).log(1, rank).read_text())
        assert {"torch", "stoker.parallel.native"} <= loaded
        assert "torch._dynamo" not in loaded


def imported(output: str) -> set[str]:
    """The modules in the lines that Python writes about its imports."""
    return {line.rpartition("|")[2].strip() for line in output.splitlines() if line.startswith("import time:")}
