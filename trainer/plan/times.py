"""How long a step takes, by what was counted and what makers publish of a device: an estimate, which names its parts.

Counts are exact; rates are not. The shares of published rates that are reached, and what hides behind what, are
assumptions, listed in `ASSUMED`. A device of unknown rates has no times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stoker.conf.devices import Device
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan, Layout
from stoker.trainer.probe.links import ring_share
from stoker.trainer.rehearsal import Traffic, Work
from stoker.trainer.utilisation import step_flops

PRODUCTS = 0.75  # of the peak, by matrix products of a model's shapes
MEMORY = 0.8  # of the bandwidth
LINKS = 0.8
MESSAGE_SECONDS = 20e-6  # to start a message
CALL_SECONDS = 5e-6  # of the host, for an operation
MACHINE = 8  # devices of a machine
COMPILED = 0.5  # of the passes over memory, when blocks are compiled
STORAGE = 1e9  # bytes a second that a rank writes of a checkpoint
TO_HOST = 20e9  # bytes a second of a snapshot
RESTART_SECONDS = 300.0
ASSUMED = (
    f"{PRODUCTS:.0%} of the peak in products, {MEMORY:.0%} of memory's and {LINKS:.0%} of links' bandwidth, "
    f"{MACHINE} devices a machine, {MESSAGE_SECONDS * 1e6:.0f} us a message, {CALL_SECONDS * 1e6:.0f} us a call of the "
    "host, half of the passes over memory fused by compilation"
)
MEASURED = "rates as measured by `stoker probe`; half of the passes over memory fused by compilation, where blocks are"
HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Rates:
    """What a device reaches, in operations or bytes a second: as measured, else the assumed shares of its rates."""

    products: float
    memory: float
    link: float | None  # between devices of a machine
    network: float | None  # between machines
    link_seconds: float  # to start a message
    network_seconds: float
    machine: int  # devices of a machine
    assumed: str  # what is assumed, in words
    link_kinds: Mapping[str, Sequence[float]] = field(default_factory=dict)  # bytes a second and seconds to start
    network_kinds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    passes: float = 1.0  # what passes take of the sum of their parts
    call: float = CALL_SECONDS


def rates_of(device: Device, precision: str) -> Rates | None:
    """None where the rates in this precision are not known."""
    found = device.measured
    if found is not None and found.precision == precision and found.memory_gb_s:
        return Rates(
            found.products_tflops * 1e12,
            found.memory_gb_s * 1e9,
            found.link_gb_s * 1e9 if found.link_gb_s else _share(device.link_gb_s),
            found.network_gb_s * 1e9 if found.network_gb_s else _share(device.network_gb_s),
            MESSAGE_SECONDS if found.link_seconds is None else found.link_seconds,
            MESSAGE_SECONDS if found.network_seconds is None else found.network_seconds,
            found.devices_per_machine,
            MEASURED,
            _per_second(found.link_kinds),
            _per_second(found.network_kinds),
            1.0 if found.passes is None else found.passes,
            CALL_SECONDS if found.call_seconds is None else found.call_seconds,
        )
    peak = device.peak(precision)
    if not peak or not device.hbm_gb_s:
        return None
    memory = device.hbm_gb_s * 1e9 * MEMORY
    links = _share(device.link_gb_s), _share(device.network_gb_s), MESSAGE_SECONDS, MESSAGE_SECONDS
    return Rates(peak * 1e12 * PRODUCTS, memory, *links, MACHINE, ASSUMED)


def _per_second(kinds: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {kind: (rate * 1e9, start) for kind, (rate, start) in kinds.items()}


def _share(published: float | None) -> float | None:
    return published * 1e9 * LINKS if published else None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part. Communication and the bubble are what is not hidden behind computing."""

    products: float  # matrix products and attention
    memory: float  # other operations, bound by memory
    host: float  # calling operations, where a device does not hide it: all of it on a CPU
    communication: float
    bubble: float
    update: float

    @property
    def total(self) -> float:
        return self.products + self.memory + self.host + self.communication + self.bubble + self.update


@dataclass(frozen=True)
class Times:
    """What follows from a step's time."""

    step: StepTime
    tokens_per_second: float
    mfu: float  # of the published peak, by the model's own operations (PaLM, appendix B)
    tokens: float  # of the whole run
    seconds: float  # for them, without failures


@dataclass(frozen=True)
class Failures:
    """A run that fails every so often: what it keeps of its time, and how often it should save."""

    goodput: float  # share of the time that brings the run further
    interval: float  # seconds between saves that lose least
    mtbf: float  # seconds between failures


@dataclass(frozen=True)
class Counts:
    """What a rank does in a step, and the ranks of its groups by the names of messages."""

    passes: Work
    update: Work
    groups: Mapping[str, Sequence[int]]


def step_time(config: Config, layout: Layout, counts: Counts, device: Device, batch: BatchPlan) -> StepTime | None:
    """The step of ranks with these `counts`; None where the device's rates in the run's precision are not known."""
    rates = rates_of(device, config.precision)
    if rates is None:
        return None
    compiled = config.compile or (config.compile is None and device.kind == "cuda")
    fused = COMPILED if compiled else 1.0
    passes, update = counts.passes, counts.update
    products, memory, host = computing_of(passes, rates, fused, device.kind)
    inside, between = _messages(passes, layout, counts.groups, rates)
    if inside is None or between is None:
        return None
    computing = products + memory + host
    # Reductions of ZeRO 0 and 1 wait for the last micro-batch's backward; those of 2 and 3, and their gathers, for any.
    behind = computing if layout.zero >= 2 else computing * 2 / 3 / batch.micro_batches
    if device.kind == "cpu":  # messages need the cores that compute
        behind = 0.0
    communication = inside + max(0.0, between - behind)
    bubble = 0.0
    if layout.pp > 1:
        bubble = (computing + inside) * (layout.pp - 1) / (batch.micro_batches * config.parallel.stages_per_rank)
    _, last = _messages(update, layout, counts.groups, rates)
    updating = max(update.moved / rates.memory, update.calls * rates.call) + (last or 0.0)
    return StepTime(products, memory, host, communication, bubble, updating)


def computing_of(passes: Work, rates: Rates, fused: float, kind: str) -> tuple[float, float, float]:
    """Seconds of products, of other operations, and of the host: what a GPU does not hide of its calls."""
    products = passes.flops / rates.products * rates.passes
    memory = passes.moved * fused / rates.memory * rates.passes
    host = passes.calls * fused * rates.call * (rates.passes if kind == "cpu" else 1.0)
    return products, memory, host if kind == "cpu" else max(0.0, host - products - memory)


def times(
    config: Config,
    layout: Layout,
    slowest: StepTime,
    device: Device,
    parameters: int,
    tokens: float,
    seconds: float,
) -> Times:
    """Of steps like `slowest`, in a run that takes `seconds` for `tokens`."""
    per_step = config.batch.size * config.seq_len
    peak = device.peak(config.precision)
    assert peak is not None
    mfu = step_flops(config, parameters) / (slowest.total * layout.world * peak * 1e12)
    speed = per_step / slowest.total
    return Times(slowest, speed, mfu, tokens, seconds)


def failures(mtbf: float, staged: float) -> Failures:
    """With a failure every `mtbf` seconds, and snapshots of `staged` bytes of a rank.

    A save takes the copy to the host from training, and is worth something only when it is written. The interval is
    Young's (1974, "A first order approximation to the optimum checkpoint interval"), but at least the time of writing.
    """
    stands, written = staged / TO_HOST, staged / STORAGE
    interval = max(math.sqrt(2 * stands * mtbf), written)
    lost = (interval / 2 + written + RESTART_SECONDS) / mtbf
    return Failures(max(0.0, (1 - lost) * interval / (interval + stands)), interval, mtbf)


def _messages(
    work: Work, layout: Layout, groups: Mapping[str, Sequence[int]], rates: Rates
) -> tuple[float | None, float | None]:
    """Seconds of messages that computing waits for (tensor, context and expert parallelism), and of the others.

    None: no known rate.
    """
    inside = between = 0.0
    for (kind, name), traffic in work.messages.items():
        seconds = _seconds(kind, traffic, groups[name], rates)
        if seconds is None:
            return None, None
        if name.startswith(("tp", "cp", "ep")) or (name == "world" and layout.tp == layout.world):
            inside += seconds
        elif kind != "receive":  # the same message as the other rank's send
            between += seconds
    return inside, between


def _seconds(kind: str, traffic: Traffic, ranks: Sequence[int], rates: Rates) -> float | None:
    """Of messages over a ring of `ranks`, as slow as its slowest link."""
    here = len({rank // rates.machine for rank in ranks}) == 1
    rate, start = (rates.link, rates.link_seconds) if here else (rates.network, rates.network_seconds)
    rate, start = (rates.link_kinds if here else rates.network_kinds).get(kind, (rate, start))
    if not rate:
        return None
    return traffic.bytes * ring_share(kind, len(ranks)) / rate + traffic.count * start
