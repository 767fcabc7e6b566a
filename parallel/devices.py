"""The device of a rank, and what its arithmetic may round.

A thread's current GPU is number 0 until it is set, and what runs there makes a context of half a gigabyte on that GPU,
in every rank of the machine. So each thread that touches a GPU calls `use_device` first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic

from stoker.conf.values import ConfigError

CUDNN = 91501  # the version from which its attention comes first


def pick_device(wanted: str | None, local_rank: int, local_world: int = 1, backend: str | None = None) -> torch.device:
    """The device of the rank with this number on its machine: `wanted` (cpu | cuda), else CUDA where there is one.

    A rank that sees a single GPU takes it: a launcher may show each rank its own. Over gloo ranks share GPUs. Raises
    ConfigError where there is no GPU for the rank.
    """
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("launch.device=cuda: this rank sees no GPU; launch.device=cpu works")
    if local_rank >= count > 1 and backend != "gloo":
        raise ConfigError(
            f"rank {local_rank} of the {local_world} on this machine sees {count} GPUs: show each rank all of them, or "
            "the one that is its own (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Make `device` the current one of the calling thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def backend_of(wanted: str | None, device: torch.device) -> str:
    """The backend of collectives between tensors on `device`: `wanted` (nccl | gloo), else the one made for it."""
    return wanted or ("nccl" if device.type == "cuda" else "gloo")


def gpu_of(device: torch.device) -> str | None:
    """The UUID of a GPU, as nvidia-smi prints it; None for a CPU."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


@dataclass(frozen=True)
class Exactness:
    """What `set_exactness` changes in a process."""

    bf16: Any
    fp16: Any
    deterministic: bool
    warns: bool  # instead of raising, where an operation is not deterministic
    fills: bool
    kernels: list[int]

    def restore(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = self.bf16
        matmul.allow_fp16_reduced_precision_reduction = self.fp16
        if _determinism() != (self.deterministic, self.warns):  # the call loads the compiler
            torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warns)
        torch.utils.deterministic.fill_uninitialized_memory = self.fills  # type: ignore[attr-defined]
        torch._C._set_sdp_priority_order(self.kernels)


def exactness_now() -> Exactness:
    matmul = torch.backends.cuda.matmul
    return Exactness(
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        *_determinism(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch._C._get_sdp_priority_order(),
    )


def _determinism() -> tuple[bool, bool]:
    """Whether deterministic operations are asked for, and whether others warn only."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def set_exactness(deterministic: bool) -> None:
    """Sums in products of bf16 and fp16 are taken in fp32, whatever their shape; with `deterministic` repeats are equal
    to the last bit. Uninitialised memory stays as it is: filling it is a pass over every tensor that is made."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def order_kernels(device: torch.device) -> None:
    """Let attention of this process take the fastest kernel that takes its inputs (`attention_kernels`).

    What a user has forbidden by `torch.backends.cuda.enable_*_sdp` stays so.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    from torch.nn.attention import SDPBackend

    capability = torch.cuda.get_device_capability(device)
    wanted = [int(getattr(SDPBackend, name)) for name in attention_kernels(capability, torch.backends.cudnn.version())]
    others = [kernel for kernel in torch._C._get_sdp_priority_order() if kernel not in wanted]
    torch._C._set_sdp_priority_order([*wanted, *others])


def attention_kernels(capability: tuple[int, int], cudnn: int | None) -> list[str]:
    """Kernels of attention in order of speed on a GPU of this compute `capability`, by their names in SDPBackend.

    cuDNN's are the fastest on Hopper and on Blackwell's data centre GPUs, whose tensor cores FlashAttention 2 does not
    fill, from version 9.15.1 on, which mends sequences that are no multiple of 128 (torch prefers it on the same
    conditions). Elsewhere it is the last that is fused. torch itself leaves it out where repeats must be equal to the
    last bit, and each kernel where it does not take dtype, heads or mask.
    """
    if capability[0] in (9, 10) and (cudnn or 0) >= CUDNN:
        return ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    return ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"]
