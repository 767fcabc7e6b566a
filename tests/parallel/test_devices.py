"""What a process may round, the timing of GPUs, and threads that set their GPU first."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from stoker.parallel.devices import attention_kernels, exactness_now, order_kernels, set_exactness, use_device
from stoker.parallel.gpu_clock import GpuClock
from stoker.parallel.update import ControlFlag, StepResult
from tests.fake_cuda import install, on_gpu


@pytest.fixture
def exactness():
    before = exactness_now()
    yield
    before.restore()


def test_products_are_summed_in_fp32_in_every_run(exactness) -> None:
    set_exactness(False)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_runs_do_not_fill_what_they_allocate(exactness) -> None:
    set_exactness(True)
    assert torch.are_deterministic_algorithms_enabled()
    zeros = torch.zeros(1 << 20)
    address = zeros.data_ptr()
    del zeros
    again = torch.empty(1 << 20)
    assert again.data_ptr() != address or not again.isnan().any(), "torch fills with nan"
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("warns", [None, False, True])
def test_what_a_run_rounds_is_as_before_when_it_ends(exactness, warns: bool | None) -> None:
    if warns is not None:
        torch.use_deterministic_algorithms(True, warn_only=warns)
    before = exactness_now()
    set_exactness(True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    before.restore()
    assert exactness_now() == before
    assert torch.is_deterministic_algorithms_warn_only_enabled() == bool(warns)


def test_a_thread_has_gpu_0_until_it_sets_its_own(monkeypatch) -> None:
    cuda, seen = install(monkeypatch), []
    use_device(torch.device("cuda", 5))

    def look() -> None:
        seen.append(cuda.current)
        use_device(torch.device("cuda", 5))
        seen.append(cuda.current)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [0, 5]


def test_a_result_is_waited_for_asleep(monkeypatch) -> None:
    cuda = install(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    result = StepResult(on_gpu(torch.arange(7.0 + len(ControlFlag) + 1, dtype=torch.float64)))
    assert result.read().grad_norm == 1.0
    assert cuda.blocking == [True]


def test_the_clock_of_a_gpu_counts_the_blocks_of_a_step_and_never_waits(monkeypatch) -> None:
    cuda = install(monkeypatch)

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cuda.milliseconds += 250.0
            return x

    block, clock = Block(), GpuClock(torch.device("cuda", 0))
    clock.time(block)
    block.register_forward_pre_hook(lambda *_: setattr(cuda, "milliseconds", cuda.milliseconds + 9000.0))  # a gather
    for _ in range(2):
        block(torch.ones(1))
    with torch.no_grad():
        block(torch.ones(1))  # an evaluation is no work of a step
    cuda.passed = False
    assert clock.take() == 0.0, "the host is ahead: what has not passed is not waited for"
    block(torch.ones(1))
    assert clock.take() == 0.0
    cuda.passed = True
    block(torch.ones(1))
    block(torch.ones(1))
    block(torch.ones(1))
    assert clock.take() == 0.75, "of the newest step that is over"
    assert len(clock._free) == 6 and not cuda.blocking
    off = GpuClock(torch.device("cpu"))
    plain = Block()
    off.time(plain)
    assert "forward" not in vars(plain) and off.take() == 0.0


@pytest.mark.parametrize(
    ("capability", "cudnn", "first"),
    [
        ((9, 0), 91501, "CUDNN_ATTENTION"),
        ((10, 0), 92000, "CUDNN_ATTENTION"),
        ((9, 0), 91002, "FLASH_ATTENTION"),
        ((9, 0), None, "FLASH_ATTENTION"),
        ((8, 0), 92000, "FLASH_ATTENTION"),
        ((12, 0), 92000, "FLASH_ATTENTION"),
    ],
)
def test_attention_takes_the_fastest_kernel_first_and_the_plain_one_last(
    capability, cudnn, first, monkeypatch, exactness
) -> None:
    from torch.nn.attention import SDPBackend

    kernels = attention_kernels(capability, cudnn)
    assert kernels[0] == first and kernels[-1] == "MATH" and len(set(kernels)) == 4
    assert kernels.index("FLASH_ATTENTION") < kernels.index("EFFICIENT_ATTENTION")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    before = torch._C._get_sdp_priority_order()
    order_kernels(torch.device("cuda", 0))
    order = torch._C._get_sdp_priority_order()
    assert order[:4] == [int(getattr(SDPBackend, name)) for name in kernels] and sorted(order) == sorted(before)


def test_on_a_cpu_the_order_of_kernels_is_left_as_it_is(exactness) -> None:
    before = torch._C._get_sdp_priority_order()
    order_kernels(torch.device("cpu"))
    assert torch._C._get_sdp_priority_order() == before
    torch._C._set_sdp_priority_order(before[::-1])
    exactness_before = exactness_now()
    torch._C._set_sdp_priority_order(before)
    exactness_before.restore()
    assert torch._C._get_sdp_priority_order() == before[::-1], "what a run changes is as before when it ends"
