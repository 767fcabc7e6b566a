"""`parallel.engine=deepspeed` from the command line: settings, kills, and a change of engine in the middle."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from stoker.parallel.deepspeed_engine.async_io import folder, is_built, missing_for_async_io
from tests import world
from tests.launch.runs import command, finish, overrides, started, steps_of, wait_until_gone
from tests.launch.test_kills import Killer

STEPS = 16
RUN = [f"steps={STEPS}", "checkpoint.every=2", "launch.max_restarts=20", "parallel.engine=deepspeed"]
EXTENSIONS = folder() if is_built() and missing_for_async_io() is None else None


def undisturbed(words: list[str], port: int, store: str) -> str:
    """On a rank: the run that `words` ask for, as torchrun would start it."""
    import stoker

    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # tests/world.py made one; a rank has none yet
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ending = stoker.run(words)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    return ending.outcome.value


@pytest.mark.full
@pytest.mark.parametrize(
    "offload",
    [
        pytest.param(
            "none", marks=pytest.mark.skipif(EXTENSIONS is not None, reason="with parameters on NVMe it is harder")
        ),
        pytest.param("nvme", marks=pytest.mark.skipif(EXTENSIONS is None, reason="needs DeepSpeed's async IO, built")),
    ],
)
def test_a_run_killed_at_random_moments_is_bitwise_the_undisturbed_one(
    home: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undisturbed one has its parameters and its optimizer in memory."""
    matrices = [
        "model.hidden_size=256",
        "model.intermediate_size=2048",
    ]  # half of one is 1 MiB: DeepSpeed swaps what is as large
    layout = [*RUN, *matrices, "batch.micro_size=4", "parallel.zero=3", f"data.cache={home / 'cache'}"]
    reference, run, disk = home / "undisturbed", home / "killed", home / "nvme"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = overrides(reference, home / "text", *layout)
    assert world.run(undisturbed, 2, words, port, str(home / "store"), timeout=120.0, fresh=True) == ["completed"] * 2
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))  # the cache of these runs is their own
    layout += [f"parallel.offload={offload}", f"parallel.nvme_path={disk}"]
    killer = Killer(run, seed=3, steps=STEPS)
    with started(home, command("train", *overrides(run, home / "text", *layout))) as process:
        for victim in ("rank", "rank in mid-save"):
            killer.strike(process, victim)
        output, _ = process.communicate(timeout=120)
        wait_until_gone(home)
    assert process.returncode == 0, output
    assert len(killer.kills) == 2
    assert steps_of(run) == steps_of(reference)
    assert offload == "none" or not list(disk.iterdir()), "left behind"


def test_a_setting_that_stoker_owns_is_refused_in_one_line(home: Path) -> None:
    words = overrides(home / "refused", home / "text", *RUN, "parallel.deepspeed.gradient_clipping=1.0")
    status, output = finish(home, command("train", *words))
    assert status != 0
    assert "parallel.deepspeed.gradient_clipping is set by Stoker: use grad_clip_norm" in output
    assert "Traceback" not in output
