"""Steps that grow (`batch.ramp`) in a pipeline: refusals of sizes whose micro-batches its schedule cannot take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stoker.conf.ramp import ramp_of, unit_rows
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan
from stoker.parallel.suggestions import around, divisors, either


def whole_rounds(micro_batches: int, pp: int) -> bool:
    """Whether so many micro-batches split into equal rounds of about `pp`, as interleaved schedules take them."""
    return micro_batches % max(1, micro_batches // pp) == 0


def not_filling(config: Config, plans: Sequence[BatchPlan], stages: int) -> str:
    """Of `plans` by size, of which the smallest has fewer micro-batches than there are `stages`."""
    least, ranks = plans[0], plans[0].rows // plans[0].rank_rows
    micro = [n for n in _micro_sizes(plans) if least.rank_rows // n >= stages]
    if micro:
        advice = f"batch.micro_size={micro[-1]}"
    else:  # fewer rows than stages
        unit = unit_rows(config)
        enough = math.ceil(stages * ranks / unit) * unit
        larger = [[max(enough, size), tokens] for size, tokens in ramp_of(config).stages]
        listed = ",".join(f"[{size},{tokens:g}]" for size, tokens in larger[:-1])
        advice = f"batch.ramp=[{listed}] with batch.size={larger[-1][0]} and batch.micro_size=1"
    return (
        f"{least.micro_batches} micro-batches of the steps of {least.rows} sequences (batch.ramp) do not fill {stages} "
        f"pipeline stages: {advice} does"
    )


def no_rounds(config: Config, plans: Sequence[BatchPlan], bad: BatchPlan, pp: int) -> str:
    """Of `plans` by size, of which `bad` has micro-batches that make no whole rounds over `pp` ranks."""

    def work(size: int, of: Sequence[BatchPlan]) -> bool:
        return all(whole_rounds(plan.rank_rows // size, pp) for plan in of)

    sizes = [size for size in _micro_sizes(plans) if work(size, plans)]
    advice = f"batch.micro_size={either(around(bad.micro_rows, sizes))}"
    if not sizes:
        last = next(plan for plan in plans if plan.rows == config.batch.size)
        alone = [size for size in _micro_sizes([last]) if work(size, [last])]
        advice = f"batch.ramp=[] with batch.micro_size={around(bad.micro_rows, alone)[0]}"
    return (
        f"{bad.micro_batches} micro-batches of the steps of {bad.rows} sequences (batch.ramp) do not split into rounds "
        f"over parallel.pp={pp}: {advice} does"
    )


def _micro_sizes(plans: Sequence[BatchPlan]) -> list[int]:
    """Those that divide the rows of a rank at every size."""
    return divisors(math.gcd(*(plan.rank_rows for plan in plans)))
