"""Layouts and engines that are refused, with the nearest that work."""

from __future__ import annotations

import math

from stoker.conf.limits import ZERO_BUBBLE
from stoker.parallel.deepspeed_engine.refused import ENTRIES as OF_DEEPSPEED
from stoker.parallel.optimizer_needs import ENTRIES as OF_OPTIMIZERS
from stoker.parallel.start import Refusal, Refusals, Start
from stoker.parallel.suggestions import around, divisors, either, multiples_around

REFUSALS = Refusals()


@REFUSALS.entry("axes", "ranks that are no multiple of tp x pp", "the grid of ranks must be full")
def _axes(start: Start) -> str | None:
    wanted = start.config.parallel
    block = wanted.tp * wanted.pp
    if start.world < 1:
        return f"{start.world} ranks: launch.nproc=1 is the least"
    if block < 1 or start.world % block == 0:
        return None
    ranks = either(multiples_around(start.world, block))
    return f"{start.world} ranks do not divide into tp {wanted.tp} x pp {wanted.pp}: launch.nproc={ranks} does"


@REFUSALS.entry("replicas of ZeRO 0", "parallel.dp_replicate other than dp under ZeRO 0", "ZeRO 0 shards nothing")
def _replicas_of_zero_0(start: Start) -> str | None:
    dp, replicas = start.dp, start.config.parallel.dp_replicate
    if not dp or start.config.parallel.zero != 0 or replicas in (None, dp):
        return None
    return (
        f"parallel.dp_replicate={replicas}: ZeRO 0 keeps a replica on each of the {dp} data-parallel ranks; "
        f"leave it out, or shard with parallel.zero=1"
    )


@REFUSALS.entry(
    "replicas", "parallel.dp_replicate that does not divide dp", "every replica is sharded over as many ranks"
)
def _replicas(start: Start) -> str | None:
    dp, replicas = start.dp, start.config.parallel.dp_replicate
    if not dp or start.config.parallel.zero == 0 or not replicas or replicas < 1 or dp % replicas == 0:
        return None
    return (
        f"parallel.dp_replicate={replicas} does not divide {dp} data-parallel ranks: "
        f"{either(around(replicas, divisors(dp)))} does"
    )


@REFUSALS.entry(
    "rows over ranks", "batch.size that is no multiple of dp", "every data-parallel rank reads as many rows"
)
def _rows(start: Start) -> str | None:
    dp, rows = start.dp, start.config.batch.size
    if not dp or rows < 1 or rows % dp == 0:
        return None
    ranks = either(n * (start.world // dp) for n in around(dp, divisors(rows)))
    return (
        f"batch.size={rows} does not divide over {dp} data-parallel ranks: "
        f"batch.size={either(multiples_around(rows, dp))} does, or launch.nproc={ranks}"
    )


@REFUSALS.entry(
    "micro-batches", "batch.micro_size that does not divide the rows of a rank", "micro-batches are equally large"
)
def _micro(start: Start) -> str | None:
    rows, micro, dp = start.config.batch.size, start.config.batch.micro_size, start.dp
    if not dp or rows < 1 or rows % dp or not micro or micro < 1 or (rows // dp) % micro == 0:
        return None
    return (
        f"batch.micro_size={micro} does not divide the {rows // dp} rows of a rank "
        f"(batch.size={rows} over {dp}): {either(around(micro, divisors(rows // dp)))} does"
    )


@REFUSALS.entry(
    "sequence parallelism",
    "micro-batches whose tokens do not divide over parallel.tp under parallel.sequence_parallel",
    "between regions every rank holds as many tokens",
)
def _sequence_parallel(start: Start) -> str | None:
    tp, seq_len, plan = start.config.parallel.tp, start.config.seq_len, start.plan
    if (
        not start.config.parallel.sequence_parallel
        or plan is None
        or seq_len < 1
        or plan.micro_rows * seq_len % tp == 0
    ):
        return None
    micro = [n for n in divisors(plan.rank_rows) if n * seq_len % tp == 0]
    rows = f"batch.micro_size={either(around(plan.micro_rows, micro))} does, or " if micro else ""
    lengths = either(multiples_around(seq_len, tp // math.gcd(tp, plan.micro_rows)))
    return (
        f"micro-batches of {plan.micro_rows} x seq_len={seq_len} tokens do not divide over parallel.tp={tp}: "
        f"{rows}seq_len={lengths}, or parallel.sequence_parallel=false"
    )


@REFUSALS.entry(
    "interleaving",
    "stages_per_rank > 1 without schedule=interleaved, or the reverse, or either without a pipeline",
    "interleaving and several stages on a rank go together",
)
def _interleaving(start: Start) -> str | None:
    wanted = start.config.parallel
    interleaved, several = wanted.schedule == "interleaved", wanted.stages_per_rank > 1
    seen = f"parallel.schedule={wanted.schedule} with parallel.stages_per_rank={wanted.stages_per_rank}"
    if several and not interleaved:
        return f"{seen}: several stages on a rank need parallel.schedule=interleaved"
    if interleaved and not several:
        return f"{seen}: interleaving needs parallel.stages_per_rank=2 or more, otherwise use 1f1b"
    if several and wanted.pp == 1:
        return f"{seen} and parallel.pp=1: a pipeline needs parallel.pp=2 or more"
    return None


@REFUSALS.entry(
    "zero bubble",
    f"parallel.schedule={', '.join(ZERO_BUBBLE)}",
    "torch's split backward adds weight gradients up in the compute dtype, past the hooks that reduce them",
)
def _zero_bubble(start: Start) -> str | None:
    schedule = start.config.parallel.schedule
    if schedule not in ZERO_BUBBLE:
        return None
    return (
        f"parallel.schedule={schedule}: the split backward of zero-bubble schedules adds weight gradients up in the "
        "compute dtype and past the hooks that reduce them; parallel.schedule=interleaved with "
        "parallel.stages_per_rank=2 or more has a small bubble too"
    )


@REFUSALS.entry(
    "full pipeline", "fewer micro-batches than stages under schedule=1f1b", "it begins with one in each stage"
)
def _full_pipeline(start: Start) -> str | None:
    wanted, plan = start.config.parallel, start.plan
    if plan is None or wanted.schedule != "1f1b" or wanted.pp == 1 or plan.micro_batches >= wanted.pp:
        return None
    stages = wanted.pp
    advice = f"batch.micro_size={plan.rank_rows // stages}" if plan.rank_rows % stages == 0 else None
    advice = advice or f"batch.size={stages * plan.micro_rows * plan.rows // plan.rank_rows}"
    return f"{plan.micro_batches} micro-batches do not fill {stages} pipeline stages: {advice} does"


@REFUSALS.entry(
    "interleaved rounds",
    "micro-batches that do not split into rounds of about pp each under schedule=interleaved",
    "the schedule visits all stages of a rank once a round",
)
def _interleaved_rounds(start: Start) -> str | None:
    wanted, plan = start.config.parallel, start.plan
    if plan is None or wanted.schedule != "interleaved" or _whole_rounds(plan.micro_batches, wanted.pp):
        return None
    counts = [n for n in divisors(plan.rank_rows) if _whole_rounds(n, wanted.pp)]
    micro = either(plan.rank_rows // n for n in around(plan.micro_batches, counts))
    return (
        f"{plan.micro_batches} micro-batches do not split into rounds over parallel.pp={wanted.pp}: "
        f"batch.micro_size={micro} does"
    )


@REFUSALS.entry("GPUs", "more ranks than GPUs when they compute on GPUs", "NCCL needs a GPU for each rank")
def _gpus(start: Start) -> str | None:
    if not start.cuda or start.world <= start.gpus:
        return None
    if start.gpus == 0:
        return "launch.device=cuda: there is no GPU here; launch.device=cpu works"
    return (
        f"{start.world} ranks on {start.gpus} {'GPU' if start.gpus == 1 else 'GPUs'}: "
        f"launch.nproc={start.gpus} works, or launch.device=cpu"
    )


@REFUSALS.entry("fp16 on CPUs", "precision=fp16 on CPUs", "it is slow and narrow there, and bf16 is neither")
def _fp16_on_cpus(start: Start) -> str | None:
    if start.config.precision != "fp16" or start.cuda:
        return None
    return "precision=fp16 on CPUs: precision=bf16 works"


REFUSALS.extend(Refusal(*entry) for entry in (*OF_DEEPSPEED, *OF_OPTIMIZERS))


def _whole_rounds(micro_batches: int, pp: int) -> bool:
    return micro_batches % max(1, micro_batches // pp) == 0
