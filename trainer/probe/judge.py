"""From what ranks found to what a person should know: pure functions.

A machine or rank is compared with the others of the run, because that needs no table of what hardware should do. What
`refuse`s would end in a run whose ranks compute different things, or in a failure for certain; the rest `warn`s.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stoker.conf.devices import device_called
from stoker.conf.schema import Config
from stoker.trainer.probe.facts import Facts, Host, Line
from stoker.trainer.probe.needs import Needs

REFUSE, WARN = "refuse", "warn"
SLOW = 0.7  # of the median rank's rate
SLOW_LINK = 0.5  # of the rate of the better links (the upper quartile), or of the median group
LATE = 3.0  # times the better links' latency, and
LATE_SECONDS = 2e-3  # by so much, at least
FAR_SECONDS = 5e-3  # of latency between machines: not one cluster
CLOCK_SECONDS = 0.5
SHM_OF_RANK = 128 << 20  # bytes of /dev/shm: NCCL takes tens of MB for each pair of GPUs
FILES_OF_RANK = 4  # sockets to each other rank, in a few groups
FILES = 256


@dataclass(frozen=True)
class Finding:
    """`subject` is a kind (slow, link, clock, ...); `text` is one line that names the rank or machine."""

    severity: str
    subject: str
    text: str


def judge(facts: Sequence[Facts], config: Config, needs: Needs | None = None) -> list[Finding]:
    """All findings, those that refuse first. `facts` are those of all ranks, in their order."""
    checks: list[Callable[[Sequence[Facts]], Iterator[Finding]]] = [_versions, _slow, _links, _axes, _clocks, _health]
    found = [finding for check in checks for finding in check(facts)]
    found += [*_limits(facts, config), *_interfaces(facts), *(_storage(facts, needs) if needs is not None else ())]
    return sorted(found, key=lambda finding: finding.severity != REFUSE)


def slow_ranks(facts: Sequence[Facts]) -> dict[int, float]:
    """The ranks slower than SLOW of the median of their kind of device, with their share of it.

    Of two ranks the faster one is the median. A rank's share is the median of its windows': ranks of a machine that is
    busy with other things lose a window now and then.
    """
    found = {}
    for device in {each.device for each in facts}:
        alike = [each for each in facts if each.device == device and each.windows]
        medians = [statistics.median_high(window) for window in zip(*(each.windows for each in alike), strict=True)]
        for each in alike:
            share = statistics.median(own / median for own, median in zip(each.windows, medians, strict=True))
            if share < SLOW:
                found[each.rank] = share
    return dict(sorted(found.items()))


Way = tuple[int, int]  # from a first rank to another


def unusual_links(lines: Mapping[Way, Line]) -> tuple[float, dict[Way, float], dict[Way, float]]:
    """The rate of the better links, the ways slower than SLOW_LINK of it with their share, and the late ones with their
    seconds. `lines` must not be empty."""
    # An exchange goes both ways, whoever begins it: the faster of two measurements is less of a busy host's.
    latencies = {way: min(line.latency, lines.get(way[::-1], line).latency) for way, line in lines.items()}
    quarter = len(lines) // 4  # of three machines with a slow one four links of six are slow
    rate = sorted((line.rate for line in lines.values()), reverse=True)[quarter]
    latency = sorted(latencies.values())[quarter]
    slow = {way: line.rate / rate for way, line in lines.items() if line.rate < SLOW_LINK * rate}
    late = {way: found for way, found in latencies.items() if found > latency * LATE + LATE_SECONDS}
    if not late and latency > FAR_SECONDS:
        late = {way: found for way, found in latencies.items() if found > FAR_SECONDS}
    return rate, slow, late


def machines(facts: Sequence[Facts]) -> dict[int, list[Facts]]:
    """The ranks of each machine, by its first."""
    found: dict[int, list[Facts]] = {}
    for each in facts:
        found.setdefault(each.first, []).append(each)
    return found


def _slow(facts: Sequence[Facts]) -> Iterator[Finding]:
    slow, of_machines = slow_ranks(facts), machines(facts)
    for ranks in of_machines.values():
        own = [each for each in ranks if each.rank in slow]
        if own and len(own) == len(ranks) and len(of_machines) > 1:
            share = statistics.median(slow[each.rank] for each in own)
            text = f"{own[0].host}: all of its ranks multiply matrices at {share:.0%} of the other machines' rate"
            yield Finding(WARN, "slow", text)
            continue
        for each in own:
            text = f"rank {each.rank} ({each.host}) multiplies matrices at {slow[each.rank]:.0%} of the others' rate"
            yield Finding(WARN, "slow", f"{text}: every step waits for it")


def _links(facts: Sequence[Facts]) -> Iterator[Finding]:
    """A machine is named if all its links are slow, otherwise the direction between two."""
    hosts = {each.rank: each.host for each in facts}
    lines = {(each.rank, link.to): link.line for each in facts for link in each.links}
    if not lines:
        return
    rate, slow, late = unusual_links(lines)
    better = f"of the better links' rate, {_gb(rate)}"
    yield from _by_machine(slow, lines, hosts, lambda share: f"go at {share:.0%} {better}")
    yield from _by_machine(late, lines, hosts, lambda late: f"take {late * 1e3:.1f} ms before the first byte")
    known = device_called(facts[0].device)
    if known is not None and known.network_gb_s and not slow and rate < SLOW_LINK * known.network_gb_s * 1e9:
        text = f"messages between machines go at {_gb(rate)}; {known.name} has {known.network_gb_s:g} GB/s by its maker"
        yield Finding(WARN, "link", text)


def _by_machine(
    ways: Mapping[Way, float],
    lines: Mapping[Way, Line],
    hosts: Mapping[int, str],
    how: Callable[[float], str],
) -> Iterator[Finding]:
    """One finding for each machine that all of its ways, of three machines or more, have in common; else for a way."""
    left = dict(ways)
    ends = {end for way in lines for end in way}
    for end in sorted(ends) if len(ends) > 2 else ():
        for text, own in (
            ("to and from", [way for way in lines if end in way]),
            ("from", [way for way in lines if way[0] == end]),
            ("to", [way for way in lines if way[1] == end]),
        ):
            if len({*own}) > 1 and all(way in left for way in own):
                value = statistics.median(left[way] for way in own)
                yield Finding(WARN, "link", f"messages {text} {hosts[end]} {how(value)}")
                for way in own:
                    del left[way]
    for (a, b), value in left.items():
        yield Finding(WARN, "link", f"messages from {hosts[a]} to {hosts[b]} {how(value)}")


def _axes(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Groups of an axis that are slower than the others of it."""
    groups: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
    for each in facts:
        for link in each.axes:
            groups.setdefault((link.axis, link.kind), {})[tuple(link.ranks)] = link.line.rate
    named: set[tuple[str, tuple[int, ...]]] = set()
    for (axis, _), rates in groups.items():
        median = statistics.median_high(rates.values())
        for ranks, rate in rates.items():
            if rate < SLOW_LINK * median and (axis, ranks) not in named:
                named.add((axis, ranks))
                text = f"the {axis} group of ranks {_listed(ranks)} exchanges at {rate / median:.0%} of the others'"
                yield Finding(WARN, "group", f"{text} rate")


def _clocks(facts: Sequence[Facts]) -> Iterator[Finding]:
    for ranks in machines(facts).values():
        off = [each for each in ranks if abs(each.clock) > CLOCK_SECONDS]
        whole = len(off) == len(ranks)
        for each in off[:1] if whole else off:
            who = each.host if whole else f"rank {each.rank} ({each.host})"
            way = "ahead of" if each.clock > 0 else "behind"
            text = f"the clock of {who} is {abs(each.clock):.1f} s {way} rank 0's: times in logs do not fit together"
            yield Finding(WARN, "clock", text)


def _versions(facts: Sequence[Facts]) -> Iterator[Finding]:
    names = dict.fromkeys(name for each in facts for name in each.versions)
    for name in names:
        found = Counter(each.versions.get(name, "absent") for each in facts)
        if len(found) < 2:
            continue
        common = max(found, key=lambda version: (found[version], version == facts[0].versions.get(name)))
        for version in found.keys() - {common}:
            who = [each for each in facts if each.versions.get(name, "absent") == version]
            where = f"{', '.join(dict.fromkeys(each.host for each in who))} (ranks {_listed(e.rank for e in who)})"
            text = f"{name} is {version} on {where} and {common} on the others: install the same"
            yield Finding(REFUSE, "version", text)


def _health(facts: Sequence[Facts]) -> Iterator[Finding]:
    for host, machine, ranks in _hosts(facts):
        for gpu in machine.gpus or ():
            who = f"{gpu.uuid} on {host}"
            if gpu.remap_failed:
                yield Finding(REFUSE, "gpu", f"{who}: a row of its memory could not be replaced: have it exchanged")
            if gpu.remap_pending:
                yield Finding(WARN, "gpu", f"{who}: a row of its memory is replaced at the next reset: reset it")
            if gpu.uncorrected:
                yield Finding(WARN, "gpu", f"{who}: {gpu.uncorrected} uncorrected memory errors since its last reset")
            if gpu.slowed:
                yield Finding(WARN, "gpu", f"{who}: its clock is lowered by {' and '.join(gpu.slowed)}")
        seen = len(machine.gpus or ())
        if ranks[0].cuda and machine.gpus is not None and machine.visible < seen and machine.visible < len(ranks):
            yield Finding(WARN, "gpu", f"{host}: {machine.visible} of its {seen} GPUs can be used")
    counts = Counter(machine.visible for _, machine, ranks in _hosts(facts) if ranks[0].cuda)
    if len(counts) > 1:
        most = max(counts, key=lambda count: (counts[count], count))
        for host, machine, _ in _hosts(facts):
            if machine.visible < most:
                yield Finding(WARN, "gpu", f"{host} has {machine.visible} GPUs where the others have {most}")


def _limits(facts: Sequence[Facts], config: Config) -> Iterator[Finding]:
    world = len(facts)
    for host, machine, ranks in _hosts(facts):
        least = SHM_OF_RANK * len(ranks)
        if machine.shm_bytes is not None and machine.shm_bytes < least:
            text = f"/dev/shm of {host} has {_mib(machine.shm_bytes)}, less than {_mib(least)} for {len(ranks)} ranks"
            yield Finding(WARN, "shm", f"{text}: start its container with --shm-size={least >> 20}m")
        fabric = any(each.kind == "infiniband" for each in machine.interfaces)
        if fabric and machine.memlock is not None:
            text = f"{host} may lock {_mib(machine.memlock)} of memory, and InfiniBand needs more: ulimit -l unlimited"
            yield Finding(WARN, "memlock", text)
        files = FILES_OF_RANK * world + FILES
        if machine.open_files is not None and machine.open_files < files:
            text = f"a rank of {host} may open {machine.open_files} files, fewer than about {files}: ulimit -n {files}"
            yield Finding(WARN, "files", text)
        busy = len(ranks) * ((config.data.workers or 0) + (1 if ranks[0].cuda else (config.launch.threads or 1)))
        if machine.cores < (busy if ranks[0].cuda else len(ranks)):
            what = f"{len(ranks)} ranks" + (f" with {config.data.workers} readers each" if ranks[0].cuda else "")
            yield Finding(WARN, "cores", f"{host} has {machine.cores} cores for {what}")


def _interfaces(facts: Sequence[Facts]) -> Iterator[Finding]:
    hosts = list(_hosts(facts))
    for host, machine, _ in hosts:
        for each in machine.interfaces:
            if each.kind == "infiniband" and not each.active:
                yield Finding(WARN, "interface", f"{host}: InfiniBand port {each.name} is not active")
    speeds = {host: _gbit(machine) for host, machine, _ in hosts}
    most = max(speeds.values(), default=0.0)
    for host, speed in speeds.items():
        if 0 < speed < most:
            yield Finding(WARN, "interface", f"{host} has {speed:g} Gbit/s of active interfaces, others {most:g}")


def _gbit(machine: Host) -> float:
    kind = "infiniband" if any(each.kind == "infiniband" for each in machine.interfaces) else "ethernet"
    return sum(each.gbit_s or 0.0 for each in machine.interfaces if each.active and each.kind == kind)


def _storage(facts: Sequence[Facts], needs: Needs) -> Iterator[Finding]:
    """All machines measure at once, and share what the run needs."""
    for what, way, need in (("data", "read", needs.data), ("checkpoints", "write", needs.checkpoints)):
        rates = [
            (each.host, folder.path, folder.rate)
            for each in facts
            for folder in each.folders
            if folder.what == what and folder.way == way and folder.rate is not None
        ]
        if rates and sum(rate for *_, rate in rates) < need:
            host, path, rate = min(rates, key=lambda each: each[2])
            text = f"{path} gives {_gb(rate)} on {host}, and the run needs up to {_gb(need / len(rates))} there"
            yield Finding(WARN, "storage", f"{what}: {text}")


def _hosts(facts: Sequence[Facts]) -> Iterator[tuple[str, Host, list[Facts]]]:
    for first, ranks in machines(facts).items():
        machine = next((each.machine for each in ranks if each.rank == first), None)
        if machine is not None:
            yield ranks[0].host, machine, ranks


def _listed(ranks: object) -> str:
    numbers = [*ranks]  # type: ignore[misc]
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
