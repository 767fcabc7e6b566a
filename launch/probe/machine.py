"""machine.json of what ranks found, and the sentence on what bounds a step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stoker.conf.devices import Device, Measured, device_called
from stoker.conf.schema import Config
from stoker.trainer.plan.make import Asked, Machine, make_plan
from stoker.trainer.plan.times import StepTime, computing_of, rates_of
from stoker.trainer.probe.facts import AxisLink, Facts
from stoker.trainer.probe.judge import Finding
from stoker.trainer.probe.needs import Needs
from stoker.trainer.probe.products import dtype_of

ADVICE = {  # by the largest part of a step
    "products": "matrix products",
    "memory": "passes over memory: compile=true fuses them",
    "host": "the host's calls of operations: more tokens a micro-batch, or compile=true",
    "communication": "communication: fewer ranks to a group, or more sequences a rank",
    "bubble": "the pipeline's bubble: more micro-batches, or fewer stages",
    "update": "the optimizer's update: more sequences a step, or ZeRO to share it",
}
FIRST = ("slow", "link", "group", "storage")  # findings that bound a step before any part of it does


@dataclass(frozen=True)
class Report:
    """What is shown and written."""

    config: Config
    facts: Sequence[Facts]
    findings: Sequence[Finding]
    needs: Needs | None
    device: Device
    sentence: str
    times: StepTime | None

    def values(self) -> dict[str, Any]:
        """machine.json: a device in the form of conf/devices.yaml, and under `probe` all that was found."""
        found = {key: value for key, value in dataclasses.asdict(self.device).items() if value not in (None, "", {})}
        found["probe"] = {
            "bottleneck": self.sentence,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "needs": dataclasses.asdict(self.needs) if self.needs is not None else None,
            "step": dataclasses.asdict(self.times) if self.times is not None else None,
            "ranks": [dataclasses.asdict(each) for each in self.facts],
        }
        return found


def machine_of(facts: Sequence[Facts], config: Config) -> Device:
    """The slowest rank's rates, because a step waits for it. Peaks are published ones where they are known."""
    known = device_called(facts[0].device)
    on_machine = [each for each in facts if each.first == facts[0].first]
    here = [link for each in facts for link in each.axes if not _crosses(link, facts)]
    there = [link for each in facts for link in each.axes if _crosses(link, facts)]
    precision = dtype_of(config.precision)
    own = [each.own or each.peaks.get(precision) for each in facts]
    measured = Measured(
        precision=precision,
        products_tflops=_round(min(rate for rate in own if rate) / 1e12),
        devices_per_machine=len(on_machine),
        memory_gb_s=_gb(each.memory for each in facts),
        link_gb_s=_gb(link.line.rate for link in here),
        link_seconds=_latency(here),
        network_gb_s=_gb([*(link.line.rate for link in there), *(link.line.rate for f in facts for link in f.links)]),
        network_seconds=_latency(there),
        from_device_gb_s=_gb(each.from_device for each in facts),
        link_kinds=_kinds(here),
        network_kinds=_kinds(there),
        call_seconds=max((_round(each.call) for each in facts if each.call is not None), default=None),
    )
    device = Device(0.0, kind="cuda" if facts[0].cuda else "cpu", measured=measured)
    measured.passes = _passes(facts, device, precision)
    peaks = {dtype: _round(min(each.peaks[dtype] for each in facts) / 1e12) for dtype in facts[0].peaks}
    return Device(
        memory_gib=round(min(each.memory_gib for each in facts), 2),
        source="stoker probe",
        tflops=peaks if known is None else {**peaks, **known.tflops},
        hbm_gb_s=known.hbm_gb_s if known is not None else measured.memory_gb_s,
        link_gb_s=known.link_gb_s if known is not None else measured.link_gb_s,
        network_gb_s=known.network_gb_s if known is not None else measured.network_gb_s,
        power_w=known.power_w if known is not None else None,
        name=facts[0].device,
        kind="cuda" if facts[0].cuda else "cpu",
        measured=measured,
    )


def bottleneck(
    facts: Sequence[Facts], config: Config, findings: Sequence[Finding], device: Device
) -> tuple[str, StepTime | None]:
    """What bounds a step, in one sentence, and the step as `stoker plan` estimates it from what was measured."""
    times = _step(config, len(facts), device)
    for finding in sorted(
        (f for f in findings if f.subject in FIRST), key=lambda finding: FIRST.index(finding.subject)
    ):
        return f"bottleneck: {finding.text}", times
    if times is None:
        return "bottleneck: not known, because a step of this config cannot be rehearsed", None
    part, seconds = max(dataclasses.asdict(times).items(), key=lambda each: each[1])
    share = seconds / times.total
    rate = ""
    best = min((each.peaks.get(dtype_of(config.precision), 0.0) for each in facts), default=0.0)
    if part == "products" and device.measured is not None and best:
        rate = f", at {device.measured.products_tflops * 1e12 / best:.0%} of the rate of the best square ones"
    return f"bottleneck: {share:.0%} of an estimated step are {ADVICE[part]}{rate}", times


def _step(config: Config, world: int, device: Device) -> StepTime | None:
    try:
        plan = make_plan(config, world, Machine(device.kind, device), Asked())
    except ValueError:
        return None
    return plan.times.step if plan.times is not None else None


def _crosses(link: AxisLink, facts: Sequence[Facts]) -> bool:
    """Whether a group has ranks of several machines."""
    return len({facts[rank].first for rank in link.ranks}) > 1


def _gb(rates: Iterable[float | None]) -> float | None:
    """The least of `rates` in 1e9 bytes a second; None where there is none."""
    found = [rate for rate in rates if rate]
    return _round(min(found) / 1e9) if found else None


def _latency(links: Sequence[AxisLink]) -> float | None:
    return _round(statistics.median(link.line.latency for link in links)) if links else None


def _passes(facts: Sequence[Facts], device: Device, precision: str) -> float | None:
    """Seconds of the model's own passes, of the slowest rank, by those that the rates in `device` add up to."""
    own, rates = [each.passes for each in facts if each.passes is not None], rates_of(device, precision)
    if not own or rates is None:
        return None
    slowest = max(own, key=lambda passes: passes.seconds)
    return _round(slowest.seconds / sum(computing_of(slowest.work, rates, 1.0, device.kind)))


def _kinds(links: Sequence[AxisLink]) -> dict[str, list[float]]:
    """For each kind of message, of the slowest group's link: 1e9 bytes a second, and seconds to start one."""
    found: dict[str, list[float]] = {}
    for kind in dict.fromkeys(link.kind for link in links):
        slowest = min((link.line for link in links if link.kind == kind), key=lambda line: line.rate)
        found[kind] = [_round(slowest.rate / 1e9), _round(slowest.latency)]
    return found


def _round(value: float) -> float:
    return float(f"{value:.4g}")
