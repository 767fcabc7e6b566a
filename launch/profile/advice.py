"""What slows a run down, by rule, and the setting that helps.

Each rule puts seconds of a step on one cause; the cause with the most comes first. Ranks wait for each other in every
step, so a cause on one rank costs all of them as much:

    data            the longest wait for rows of a rank
    checkpoints     what saves hold the slowest rank up
    a slow rank     its work, less the median of the others'; not among the stages of a pipeline, which differ
    a slow module   its own seconds in the median step, less the median of its like in other layers
    communication   exposed on every rank: that of the rank with the least, because the rank others wait for waits least
    bubble          of the stage of a pipeline that waits least for another
    launches        on GPUs: when the device idles, for no cause above
    recomputation   forwards amid the backward pass, each as long as the median of its like
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stoker.conf.schema import Config
from stoker.launch.profile.measure import RECOMPUTED, RankProfile

LEAST_SHARE = 0.05  # of a step, for a cause to be named
_TRANSFERS = ("send", "recv")  # between stages of a pipeline
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Finding:
    """A cause. `setting` is a key of the config, alone or with the value to try; None where no setting helps."""

    cause: str
    seconds: float  # of a step
    share: float  # of the step
    text: str
    setting: str | None


def findings(ranks: Sequence[RankProfile], config: Config) -> list[Finding]:
    """The causes that take at least `LEAST_SHARE` of a step, the largest first; else what the step is made of."""
    step = max(rank.step_seconds for rank in ranks) or 1e-9
    found = [
        Finding(cause, seconds, seconds / step, text, setting)
        for cause, seconds, text, setting in _causes(ranks, config)
        if seconds / step >= LEAST_SHARE
    ]
    return sorted(found, key=lambda each: -each.seconds) or [_computing(ranks, config, step)]


def sentence(finding: Finding) -> str:
    """One sentence: the cause, its share, and what helps."""
    return f"{finding.text} ({finding.seconds:.3g} s, {finding.share:.0%} of a step)"


def alike(name: str) -> str:
    """The name of a module with a `*` for each number: that of its like in all layers."""
    return _NUMBER.sub("*", name)


Cause = tuple[str, float, str, str | None]


def _causes(ranks: Sequence[RankProfile], config: Config) -> Iterator[Cause]:
    yield _data(ranks, config)
    yield _checkpoints(ranks, config)
    if config.parallel.pp == 1:
        yield from _slow_rank(ranks)
    yield from _slow_module(ranks)
    yield _communication(ranks, config)
    if all(rank.bubble_seconds is not None for rank in ranks):
        yield _bubble(ranks)
    if all(rank.idle_seconds is not None for rank in ranks):
        yield _launches(ranks, config)
    yield _recomputation(ranks, config)


def _data(ranks: Sequence[RankProfile], config: Config) -> Cause:
    worst = max(ranks, key=lambda rank: rank.data_seconds)
    more = f"data.workers={max(2, 2 * config.data.workers)}"
    text = f"data-bound: rank {worst.rank} waits for rows; more readers help: {more}"
    return "data", worst.data_seconds, text, more


def _checkpoints(ranks: Sequence[RankProfile], config: Config) -> Cause:
    worst = max(ranks, key=lambda rank: rank.checkpoint_seconds)
    if config.checkpoint.mode == "sync":
        setting, how = "checkpoint.mode=async", "saving beside training helps"
    elif config.checkpoint.staging_limit is not None:
        setting, how = "checkpoint.staging_limit=null", "room for a whole snapshot helps"
    else:
        setting, how = "checkpoint.every", "fewer saves help: a larger"
    text = f"checkpoints: a save holds rank {worst.rank} up; {how}{':' if '=' in setting else ''} {setting}"
    return "checkpoints", worst.checkpoint_seconds, text, setting


def _slow_rank(ranks: Sequence[RankProfile]) -> Iterator[Cause]:
    if len(ranks) < 2:
        return
    slow = max(ranks, key=lambda rank: rank.work_seconds)
    others = statistics.median(rank.work_seconds for rank in ranks if rank is not slow)
    on = f" on {slow.host}" if slow.host else ""
    times = f"{slow.work_seconds / others:.1f} times" if others > 0 else "more than"
    text = (
        f"a slow rank: rank {slow.rank}{on} works {times} the median of the others, which wait for it; no setting "
        "makes it faster: compare its machine with theirs, or run without it"
    )
    yield "a slow rank", slow.work_seconds - others, text, None


def _slow_module(ranks: Sequence[RankProfile]) -> Iterator[Cause]:
    """The module that takes longest beside its like, also on other stages of a pipeline.

    It counts as on the rank where it takes least: if it is slow on one rank alone, the rank is.
    """
    like: dict[str, dict[str, float]] = {}
    for rank in ranks:
        for name, seconds in rank.typical.items():
            if alike(name) != name:
                group = like.setdefault(alike(name), {})
                group[name] = min(seconds, group.get(name, seconds))
    found = []
    for group in like.values():
        for name, seconds in group.items():
            others = [other for beside, other in group.items() if beside != name]
            if others:
                found.append(
                    (seconds - statistics.median(others), name, seconds / max(statistics.median(others), 1e-9))
                )
    if found:
        excess, name, times = max(found)
        text = (
            f"a slow module: {name} takes {times:.1f} times the median of {alike(name)}; no setting makes it faster: "
            "look at its forward"
        )
        yield "a slow module", excess, text, None


def _communication(ranks: Sequence[RankProfile], config: Config) -> Cause:
    """What helps depends on the group that communicates most, which NCCL's traces name."""
    least = min(ranks, key=lambda rank: rank.exposed_seconds)
    longest = next((each for each in least.collectives if each.kind not in _TRANSFERS), None)
    wanted, group = config.parallel, longest.group.partition(".")[0] if longest is not None else ""
    if wanted.tp > 1 and group in ("tp", ""):
        setting, how = f"parallel.tp={wanted.tp // 2}", "fewer ranks to a layer help:"
    elif wanted.zero == 3:
        setting, how = "parallel.zero=2", "parameters that stay gathered help, if they fit:"
    elif wanted.zero == 2:
        setting, how = "parallel.zero=1", "gradients summed once a step help, if they fit:"
    else:
        setting, how = "batch.size", "more rows between two sums of the gradients help, which changes the run: a larger"
    what = f", most of it {longest.kind}{f' of {longest.group}' if longest.group else ''}" if longest else ""
    text = f"communication-bound: every rank waits for collectives{what}; {how} {setting}"
    return "communication", least.exposed_seconds, text, setting


def _bubble(ranks: Sequence[RankProfile]) -> Cause:
    least = min(rank.bubble_seconds or 0.0 for rank in ranks)
    setting, how = "batch.micro_size", "more micro-batches make the bubble smaller: a smaller"
    return "bubble", least, f"pipeline: every stage waits for another; {how} {setting}", setting


def _launches(ranks: Sequence[RankProfile], config: Config) -> Cause:
    idle = min(max(0.0, (rank.idle_seconds or 0.0) - rank.data_seconds - rank.checkpoint_seconds) for rank in ranks)
    if config.compile is False:
        setting, how = "compile=true", "fewer, longer kernels help:"
    else:
        setting, how = "batch.micro_size", "more rows in each kernel help: a larger"
    text = f"launch-bound: the GPUs wait for their host to launch kernels; {how} {setting}"
    return "launches", idle, text, setting


def _recomputation(ranks: Sequence[RankProfile], config: Config) -> Cause:
    less = "none" if config.activation_checkpointing == "selective" else "selective"
    setting = f"activation_checkpointing={less}"
    text = f"recomputation: activations are computed again; if they fit: {setting}"
    return "recomputation", max(map(_recomputed_seconds, ranks)), text, setting


def _recomputed_seconds(rank: RankProfile) -> float:
    like: dict[str, list[float]] = {}
    for name, seconds in rank.modules.items():
        like.setdefault(alike(name), []).append(seconds[RECOMPUTED])
    return sum(len(group) * statistics.median_low(group) for group in like.values())


def _computing(ranks: Sequence[RankProfile], config: Config, step: float) -> Finding:
    """For a step that nothing else slows down: the modules that it consists of."""
    slow = max(ranks, key=lambda rank: rank.work_seconds)
    sums: dict[str, float] = {}
    for name, seconds in slow.modules.items():
        sums[alike(name)] = sums.get(alike(name), 0.0) + sum(seconds)
    name = max(sums, key=lambda name: sums[name]) if sums else ""
    most = f", most of the time in {name} ({sums[name] / step:.0%})" if name else ""
    if config.precision == "fp32" and slow.on_gpu:
        setting, how = "precision=bf16", "a shorter type helps, which changes the run:"
    elif config.compile is not True and not slow.on_gpu:
        setting, how = "compile=true", "compiled blocks may help:"
    else:
        setting, how = "launch.nproc", "more ranks help: a larger"
    text = f"compute-bound: nothing else takes {LEAST_SHARE:.0%} of a step{most}; {how} {setting}"
    return Finding("computation", slow.work_seconds, slow.work_seconds / step, text, setting)
