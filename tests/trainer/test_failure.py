"""A rank's failure is one line: what a user can fix as it was written, a defect with its class and place."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.trainer.failure import Attempt, fail, in_one_line, is_error_of_a_gpu, is_loss_of_a_peer
from stoker.trainer.runtime.outcome import read_ending
from stoker.trainer.runtime.process import Console, Place


def raised(error: Exception, cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as found:
            raise error from found
    except Exception as found:
        return found


def test_an_error_for_the_user_shows_no_class_of_a_library() -> None:
    error = raised(ValueError("a.tar at byte 7: damaged"), tarfile.TarError("truncated header"))
    assert in_one_line(error) == "a.tar at byte 7: damaged: truncated header"
    error = raised(RuntimeError("stage 1 failed"), ValueError("width 3 is odd"))
    assert in_one_line(error) == "stage 1 failed: width 3 is odd"


@pytest.mark.parametrize("outer", [RuntimeError("stage 1 failed"), TypeError("no such argument")], ids=repr)
def test_a_defect_shows_its_class_and_place(outer: Exception) -> None:
    line = in_one_line(raised(outer, KeyError("width")))
    assert line.startswith(f"KeyError: {outer}: 'width' (") and "test_failure.py:" in line


LOST = [
    "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234",
    "NCCL Error 6: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.",
    "NCCL communicator was aborted on rank 3. ",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. Last error:\n"
    "socketProgress: Connection closed by remote peer node2<43110>",
    "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: Failed to recv, got 0 bytes. Connection was likely closed.",
]
OWN = [
    "NCCL communicator was aborted on rank 3. Original reason for failure was: [PG ID 0] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
    "CUDA error: an illegal memory access was encountered",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "mat1 and mat2 shapes cannot be multiplied",
]


@pytest.mark.parametrize("text", LOST)
def test_a_lost_peer_is_recognised_over_gloo_and_nccl(text: str) -> None:
    assert is_loss_of_a_peer(RuntimeError(text))
    assert is_loss_of_a_peer(torch.distributed.DistBackendError(text))
    assert not is_loss_of_a_peer(ValueError(text))


@pytest.mark.parametrize("text", OWN)
def test_an_error_of_this_rank_is_no_lost_peer(text: str) -> None:
    assert not is_loss_of_a_peer(RuntimeError(text))


def reported(tmp_path: Path, error: BaseException, gpu: str | None = None) -> tuple[str, bool, str]:
    """The outcome's message, whether it is retried, and what the user sees."""
    run = RunDirectory(tmp_path)
    run.attempt(1).mkdir(parents=True)
    attempt = Attempt(run, 1, Place(0, 2, 0, 2, 0), met=True, config=Config(), gpu=gpu, training=True, step=5)
    console = Console()
    with open(tmp_path / "screen", "w") as console.errors:
        assert fail(error, attempt, attempt.place, console) == 1
    ending = read_ending(run, 1)
    assert ending is not None
    return ending.message, ending.retry, (tmp_path / "screen").read_text()


def test_an_error_of_a_gpu_names_it_and_its_host_and_is_retried(tmp_path: Path) -> None:
    error = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")
    assert is_error_of_a_gpu(error)
    message, retry, screen = reported(tmp_path, error, "GPU-1234 on node7")
    assert "uncorrectable ECC error encountered" in message and "this was GPU-1234 on node7" in message and retry
    assert "GPU-1234 on node7" in screen
    message, _, _ = reported(tmp_path / "other", RuntimeError("shapes differ"), "GPU-1234 on node7")
    assert "GPU-1234" not in message


def test_an_out_of_memory_error_is_explained_and_not_retried(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    message, retry, _ = reported(tmp_path, error)
    assert message.startswith("out of memory in this rank: 2.0 GiB more than the ") and not retry
    assert "batch.micro_size=" in message
