"""Traces made by hand: what counts for which phase, in nanoseconds that a reader can add up."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.trainer.report.breakdown import EXPOSED, Event, minus, phase_seconds, union

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=8)


def marked(name: str, start: int, end: int) -> Event:
    return Event(f"stoker.{name}", start, end, thread=1, annotation=True)


def operation(start: int, end: int, name: str = "aten::mm", thread: int = 1) -> Event:
    return Event(name, start, end, thread=thread)


def collective(start: int, end: int) -> Event:
    return Event("gloo:all_reduce", start, end, thread=7, annotation=True)


def received(start: int, end: int) -> Event:
    return collective(start, end)._replace(name="gloo:recv")


def sent(start: int, end: int) -> Event:
    return collective(start, end)._replace(name="gloo:send")


def kernel(launched: int, start: int, end: int, name: str = "gemm", number: int = 0) -> list[Event]:
    """A kernel and the call on the host that launched it."""
    number = number or 1000 + launched
    call = Event("cudaLaunchKernel", launched, launched + 1, thread=2, correlation=number)
    return [call, Event(name, start, end, on_device=True, correlation=number)]


def nanoseconds(*events: Event | list[Event]) -> dict[str, int]:
    flat = [event for some in events for event in (some if isinstance(some, list) else [some])]
    return {
        key.removeprefix("phase_").removesuffix("_seconds"): round(seconds * 1e9)
        for key, seconds in phase_seconds(flat).items()
    }


def covered(spans: list[list[int]]) -> set[int]:
    return {instant for start, end in spans for instant in range(start, end)}


@given(SPANS, SPANS)
def test_intervals_are_sets_of_instants(these, those):
    a, b = (union(Event("", start, end) for start, end in spans) for spans in (these, those))
    left = minus(a, b)
    assert covered(a) == covered(these)
    assert covered(left) == covered(these) - covered(those)
    for intervals in (a, left):
        assert all(start < end for start, end in intervals)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(intervals))


def test_a_trace_without_ranges_has_no_phases():
    assert phase_seconds([operation(0, 5), collective(2, 9)]) == {}


def test_on_one_cpu_the_phases_are_the_ranges_and_micro_batches_add_up():
    assert nanoseconds(
        marked("data", 0, 3), marked("forward", 5, 10), marked("backward", 10, 20),
        marked("forward", 20, 26), marked("backward", 26, 37), marked("update", 40, 44),
        operation(6, 9), operation(11, 20),
    ) == {"data": 3, "forward": 11, "backward": 21, "update": 4, "communication_exposed": 0}  # fmt: skip


def test_waiting_for_gloo_is_taken_off_the_phase_that_waits():
    found = nanoseconds(
        marked("forward", 0, 100), marked("update", 100, 200),
        operation(0, 99), operation(101, 110), collective(112, 180), operation(183, 199),
    )  # fmt: skip
    assert found == {"forward": 100, "update": 32, "communication_exposed": 68}


def test_a_collective_that_ends_beside_computation_is_hidden():
    found = nanoseconds(marked("backward", 0, 100), operation(0, 30), collective(10, 60), operation(31, 99))
    assert found == {"backward": 100, "communication_exposed": 0}


def test_only_the_end_of_a_hidden_collective_is_exposed():
    found = nanoseconds(marked("backward", 0, 100), operation(0, 70), collective(10, 90), operation(92, 99))
    assert found == {"backward": 80, "communication_exposed": 20}


def test_a_collective_that_goes_on_after_a_wait_is_not_waited_for():
    found = nanoseconds(
        marked("backward", 0, 100), operation(0, 30), collective(10, 50), collective(20, 90), operation(60, 99)
    )
    assert found == {"backward": 80, "communication_exposed": 20}


def test_a_wait_may_run_over_from_one_phase_into_the_next():
    found = nanoseconds(marked("backward", 0, 50), marked("update", 50, 90), operation(0, 40), collective(5, 65))
    assert found == {"backward": 40, "update": 25, "communication_exposed": 25}


def test_what_a_stage_waits_for_its_neighbour_is_the_bubble_and_not_communication():
    found = nanoseconds(
        marked("forward", 0, 100), marked("update", 100, 200),
        operation(0, 20), received(5, 60), operation(60, 101), sent(101, 103), collective(110, 150),
        operation(150, 199),
    )  # fmt: skip
    assert found == {"forward": 60, "update": 58, "communication_exposed": 40, "bubble": 42}


def test_a_collective_during_a_transfer_is_communication():
    found = nanoseconds(marked("forward", 0, 100), received(5, 90), operation(0, 20), collective(30, 60))
    assert found == {"forward": 30, "communication_exposed": 30, "bubble": 40}


def test_a_stage_that_never_waits_has_a_bubble_of_nothing():
    found = nanoseconds(marked("forward", 0, 100), operation(0, 99), received(5, 60))
    assert found == {"forward": 100, "communication_exposed": 0, "bubble": 0}


def test_the_bubble_of_nccl_is_its_transfers_where_no_kernel_computes():
    found = nanoseconds(
        marked("forward", 0, 200), kernel(1, 2, 50), kernel(3, 40, 120, "ncclDevKernel_SendRecv(...)"),
        kernel(4, 110, 150, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)"), kernel(5, 150, 190),
    )  # fmt: skip
    assert found == {"forward": 100, "communication_exposed": 40, "bubble": 60}


def test_waiting_between_ranges_is_exposed_too():
    found = nanoseconds(
        marked("forward", 0, 10), marked("backward", 60, 70), operation(0, 10), collective(11, 59), operation(60, 70)
    )
    assert found == {"forward": 10, "backward": 10, "communication_exposed": 48}


@pytest.mark.parametrize(
    "around",
    [
        "autograd::engine::evaluate_function: X",
        "torch::autograd::AccumulateGrad",
        "MyFunction",
        "c10d::allreduce_",
        "_c10d_functional::wait_tensor",
    ],
)
def test_what_only_contains_operations_does_not_compute(around):
    found = nanoseconds(marked("backward", 0, 100), operation(0, 100, around), operation(0, 10), collective(12, 90))
    assert found["communication_exposed"] == 78


def test_a_compiled_graph_computes():
    graph = operation(0, 100, "## Call CompiledFxGraph f00 ##")
    assert nanoseconds(marked("forward", 0, 100), graph, collective(12, 90))["communication_exposed"] == 0


def test_other_threads_hide_nothing():
    found = nanoseconds(marked("update", 0, 100), operation(0, 100, thread=7), collective(0, 90))
    assert found["communication_exposed"] == 90


def test_on_a_gpu_a_phase_lasts_until_its_kernels_end():
    """The host runs ahead: it has left every range when the first kernel starts."""
    assert nanoseconds(
        marked("data", 0, 10), marked("forward", 10, 20), marked("backward", 20, 30), marked("update", 30, 35),
        kernel(12, 14, 100), kernel(22, 100, 290), kernel(31, 290, 300),
    ) == {"data": 10, "forward": 90, "backward": 190, "update": 10, "communication_exposed": 0}  # fmt: skip


def test_a_gpu_that_waits_for_the_host_counts_for_the_phase_in_which_the_host_is_late():
    assert nanoseconds(
        marked("forward", 0, 100), marked("backward", 150, 200), kernel(5, 6, 20), kernel(160, 161, 190),
    ) == {"forward": 100, "backward": 50, "communication_exposed": 0}  # fmt: skip


def test_kernels_launched_between_ranges_belong_to_none():
    found = nanoseconds(marked("backward", 0, 10), marked("update", 50, 60), kernel(20, 21, 500), kernel(5, 6, 8))
    assert found == {"backward": 10, "update": 10, "communication_exposed": 0}


def test_backward_kernels_are_launched_by_another_thread():
    found = nanoseconds(marked("forward", 0, 10), marked("backward", 10, 30), kernel(5, 6, 50), kernel(12, 50, 80))
    assert found == {"forward": 50, "backward": 30, "communication_exposed": 0}


def test_nccl_is_exposed_where_no_kernel_computes():
    nccl = kernel(11, 40, 130, "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
    found = nanoseconds(
        marked("forward", 0, 10), marked("backward", 10, 30),
        kernel(5, 6, 50), nccl, kernel(12, 90, 160),
    )  # fmt: skip
    assert found == {"forward": 50, "backward": 70, "communication_exposed": 40}


def test_copies_and_ranges_on_the_device_hide_no_communication():
    nccl = kernel(11, 40, 100, "ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)")
    found = nanoseconds(
        marked("update", 0, 200), nccl, kernel(20, 40, 100, "Memcpy DtoH (Device -> Pinned)"),
        kernel(21, 40, 100, "Memset (Device)"),
        Event("stoker.update", 30, 250, annotation=True, on_device=True),
        Event("nccl:all_reduce", 40, 100, annotation=True, on_device=True),
    )  # fmt: skip
    assert found == {"update": 140, "communication_exposed": 60}


def test_an_operation_of_the_host_with_the_number_of_a_launch_is_none():
    """Operations and launches are numbered apart."""
    launch, gemm = kernel(25, 30, 90, number=5)
    found = nanoseconds(
        marked("forward", 0, 20), marked("backward", 20, 40), launch, gemm, operation(3, 4)._replace(correlation=5)
    )
    assert found == {"forward": 20, "backward": 70, "communication_exposed": 0}


def test_the_phases_and_what_is_exposed_have_the_names_of_the_metrics():
    found = phase_seconds([marked(name, at, at + 1) for at, name in enumerate(("data", "forward", "backward"))])
    assert list(found) == ["phase_data_seconds", "phase_forward_seconds", "phase_backward_seconds", EXPOSED]
    assert EXPOSED == "phase_communication_exposed_seconds"
