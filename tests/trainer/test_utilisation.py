"""MFU: a step's arithmetic by the published count, over the published peak, and only where both are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import BatchConfig, Config, ModelConfig
from stoker.parallel.update import StepMetrics
from stoker.trainer.report.observer import StepRecord
from stoker.trainer.report.progress import Pace
from stoker.trainer.runtime.process import Phases
from stoker.trainer.step_log import Progress, StepLog
from stoker.trainer.utilisation import Arithmetic, arithmetic_of

H100 = "NVIDIA H100 80GB HBM3"
MODEL = ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


def config(**changes: Any) -> Config:
    return dataclasses.replace(Config(model=MODEL, batch=BatchConfig(8, 2), seq_len=128, precision="bf16"), **changes)


def test_the_operations_are_those_of_the_closed_form() -> None:
    found = arithmetic_of(config(), H100, 4)
    width, kv, inner = 64, 2 * 16, MODEL.intermediate_size or 0
    assert inner, "the width of the MLP is settled"
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    products = 3 * layer + width + 1000 * width  # embedding looked up, head multiplied
    a_token = 6 * products + 12 * 3 * width * 128
    assert found is not None and found.flops == a_token * 8 * 128 / 4
    assert found.peak == pytest.approx(989.4e12, rel=1e-3)


def lora(config: Config) -> None:
    config.adapter.name = "lora"


def preferences(config: Config) -> None:
    config.objective.name = "dpo"


def frozen(config: Config) -> None:
    config.model = dataclasses.replace(config.model, freeze=["embedding"])


@pytest.mark.parametrize("change", [lora, preferences, frozen])
def test_what_the_count_does_not_hold_for_has_none(change: Callable[[Config], None]) -> None:
    changed = config()
    change(changed)
    assert arithmetic_of(changed, H100, 1) is None


@pytest.mark.parametrize(("device", "precision"), [("NVIDIA Quadro K600", "bf16"), ("cpu", "bf16"), (H100, "int3")])
def test_a_peak_that_is_not_known_gives_none(device: str, precision: str) -> None:
    assert arithmetic_of(config(precision=precision), device, 1) is None


def test_a_step_has_its_share_of_the_peak(tmp_path: Path) -> None:
    records: list[StepRecord] = []

    class Seen:
        def step(self, record: StepRecord) -> None:
            records.append(record)

    class Result:
        def read(self) -> StepMetrics:
            return StepMetrics(2.0, 1.0, 10, False, frozenset(), 1.0, False)

    observers: Any = Seen()
    log = StepLog(Config(), Progress(), observers, Phases(tmp_path / "stamp"), None, Arithmetic(6e12, 24e12))
    result: Any = Result()
    seconds = log.enter(1, 1e-3, result, None, {})
    log.settle(everything=True)
    (record,) = records
    assert record.extra["tflops"] == pytest.approx(6 / seconds)
    assert record.extra["mfu"] == pytest.approx(6 / seconds / 24)


def test_the_screen_shows_the_mean_of_the_last_steps() -> None:
    steps = [
        {"tokens_per_second": 100.0, "step_seconds": seconds, "data_seconds": 0.0, "mfu": mfu}
        for seconds, mfu in ((9.0, 0.9), (1.0, 0.3), (3.0, 0.5))  # the first warms up
    ]
    assert Pace.of(steps).speed == "100 tok/s  MFU 45.0%"
    assert Pace.of([{**step, "mfu": None} for step in steps]).speed == "100 tok/s"
