"""The time of a step by its parts: what a device hides, and what `stoker probe` has measured of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stoker.conf.devices import Device, Measured
from stoker.conf.schema import Config, ParallelConfig
from stoker.parallel.layout import batch_plan, layout_of
from stoker.trainer.plan.times import Counts, StepTime, step_time
from stoker.trainer.rehearsal import Traffic, Work

MEASURED = Measured("fp32", 1.0, 2, memory_gb_s=100.0, link_gb_s=1.0, link_seconds=0.5, call_seconds=1e-3)
CPU = Device(8.0, kind="cpu", measured=MEASURED)
WORK = Work(flops=2 * 10**12, moved=10**11, calls=500, messages={("all_gather", "shards"): Traffic(2, 2 * 10**9)})


def step(device: Device, passes: Work = WORK, zero: int = 2) -> StepTime:
    config = Config(precision="fp32", parallel=ParallelConfig(zero=zero))
    layout = layout_of(config, 2)
    found = step_time(config, layout, Counts(passes, Work(), {"shards": [0, 1]}), device, batch_plan(config, layout))
    assert found is not None
    return found


def test_on_a_cpu_nothing_hides_calls_and_messages() -> None:
    found = step(CPU)
    assert (found.products, found.memory, found.host) == (2.0, 1.0, 0.5)
    assert found.communication == pytest.approx(2 * 0.5 + 1.0), "half of the bytes over one link"


def test_on_a_gpu_computing_hides_calls_and_messages_up_to_its_own_time() -> None:
    gpu = replace(CPU, kind="cuda", measured=replace(MEASURED, call_seconds=5e-3))
    found = step(gpu, replace(WORK, calls=2000))
    memory = 0.5  # compiled blocks pass over memory half as often
    assert (found.products, found.memory) == (2.0, memory)
    assert found.host == pytest.approx(2000 * 0.5 * 5e-3 - 2.0 - memory) and found.communication == 0.0


def test_kinds_of_messages_have_rates_of_their_own() -> None:
    kinds = replace(CPU, measured=replace(MEASURED, link_kinds={"all_gather": [4.0, 0.25]}))
    assert step(kinds).communication == pytest.approx(2 * 0.25 + 1.0 / 4)
    reduced = replace(WORK, messages={("all_reduce", "shards"): Traffic(1, 10**9)})
    assert step(kinds, reduced).communication == pytest.approx(0.5 + 1.0), "of a kind that was not measured"


def test_passes_that_took_longer_than_their_parts_make_steps_longer() -> None:
    slower = step(replace(CPU, measured=replace(MEASURED, passes=1.2)))
    assert (slower.products, slower.memory, slower.host) == pytest.approx((2.4, 1.2, 0.6))
