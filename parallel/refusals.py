"""What Stoker refuses to start, and why: one table, printed in docs/refusals.md.

A start is judged as a whole before any rank is spawned. `stoker.conf.limits` judges each value alone; the refusals here
judge values together, with the number of ranks and GPUs. Every message names the values and the nearest that work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stoker.conf.faults import read_faults
from stoker.conf.limits import LIMITS, ZERO_BUBBLE
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.parallel.deepspeed_engine.refused import ENTRIES as OF_DEEPSPEED
from stoker.parallel.start import Start
from stoker.parallel.streaming_refused import ENTRIES as OF_LANES
from stoker.parallel.suggestions import around, divisors, either, multiples_around


@dataclass(frozen=True)
class Refusal:
    """An entry of the table. `check` returns what to tell the user, or None when there is nothing to refuse."""

    name: str
    what: str
    why: str
    check: Callable[[Start], str | None]


REFUSALS: list[Refusal] = []


def _refuses(name: str, what: str, why: str) -> Callable[[Callable[[Start], str | None]], Callable]:
    def enter(check: Callable[[Start], str | None]) -> Callable[[Start], str | None]:
        REFUSALS.append(Refusal(name, what, why, check))
        return check

    return enter


@_refuses("axes", "ranks that are no multiple of tp x pp", "the grid of ranks must be full")
def _axes(start: Start) -> str | None:
    wanted = start.config.parallel
    block = wanted.tp * wanted.pp
    if start.world < 1:
        return f"{start.world} ranks: launch.nproc=1 is the least"
    if block < 1 or start.world % block == 0:
        return None
    ranks = either(multiples_around(start.world, block))
    return f"{start.world} ranks do not divide into tp {wanted.tp} x pp {wanted.pp}: launch.nproc={ranks} does"


@_refuses("replicas of ZeRO 0", "parallel.dp_replicate other than dp under ZeRO 0", "ZeRO 0 shards nothing")
def _replicas_of_zero_0(start: Start) -> str | None:
    dp, replicas = start.dp, start.config.parallel.dp_replicate
    if not dp or start.config.parallel.zero != 0 or replicas in (None, dp):
        return None
    return (
        f"parallel.dp_replicate={replicas}: ZeRO 0 keeps a replica on each of the {dp} data-parallel ranks; "
        f"leave it out, or shard with parallel.zero=1"
    )


@_refuses("replicas", "parallel.dp_replicate that does not divide dp", "every replica is sharded over as many ranks")
def _replicas(start: Start) -> str | None:
    dp, replicas = start.dp, start.config.parallel.dp_replicate
    if not dp or start.config.parallel.zero == 0 or not replicas or replicas < 1 or dp % replicas == 0:
        return None
    return (
        f"parallel.dp_replicate={replicas} does not divide {dp} data-parallel ranks: "
        f"{either(around(replicas, divisors(dp)))} does"
    )


@_refuses("rows over ranks", "batch.size that is no multiple of dp", "every data-parallel rank reads as many rows")
def _rows(start: Start) -> str | None:
    dp, rows = start.dp, start.config.batch.size
    if not dp or rows < 1 or rows % dp == 0:
        return None
    ranks = either(n * (start.world // dp) for n in around(dp, divisors(rows)))
    return (
        f"batch.size={rows} does not divide over {dp} data-parallel ranks: "
        f"batch.size={either(multiples_around(rows, dp))} does, or launch.nproc={ranks}"
    )


@_refuses(
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


@_refuses(
    "tensor parallelism",
    "parallel.tp that does not divide heads and hidden, or that neither divides kv_heads nor is a multiple of it",
    "every rank holds as many heads and channels, or one kv head that neighbours hold too; "
    "width and vocabulary may be of any size",
)
def _tensor_parallel(start: Start) -> str | None:
    tp, model = start.config.parallel.tp, start.config.model
    heads, kv_heads, hidden = (
        model.num_attention_heads,
        model.num_key_value_heads or model.num_attention_heads,
        model.intermediate_size,
    )
    if not start.built_in_model or min(tp, heads, kv_heads, hidden) < 1:
        return None

    def shares_kv_heads(ranks: int) -> bool:
        return kv_heads % ranks == 0 or ranks % kv_heads == 0

    uneven = [
        f"model.{name}={size}"
        for name, size in (("num_attention_heads", heads), ("intermediate_size", hidden))
        if size % tp
    ]
    if model.num_key_value_heads and not shares_kv_heads(tp):
        uneven.append(f"model.num_key_value_heads={kv_heads}")
    if not uneven:
        return None
    fitting = around(tp, filter(shares_kv_heads, divisors(math.gcd(heads, hidden))))
    return f"parallel.tp={tp} does not go with {', '.join(uneven)}: {either(fitting)} does"


@_refuses(
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


@_refuses("stages", "more pipeline stages than layers", "a stage holds at least one layer")
def _stages(start: Start) -> str | None:
    wanted, layers = start.config.parallel, start.config.model.num_hidden_layers
    stages = wanted.pp * wanted.stages_per_rank
    if not start.built_in_model or stages <= max(layers, 1):
        return None
    return (
        f"parallel.pp={wanted.pp} x parallel.stages_per_rank={wanted.stages_per_rank} are {stages} stages for "
        f"model.num_hidden_layers={layers}: at most {layers} stages work"
    )


@_refuses(
    "interleaving",
    "stages_per_rank > 1 without schedule=interleaved, or the reverse, or either without a pipeline",
    "interleaving is what several stages on a rank are for",
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


@_refuses(
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


@_refuses("full pipeline", "fewer micro-batches than stages under schedule=1f1b", "it begins with one in each stage")
def _full_pipeline(start: Start) -> str | None:
    wanted, plan = start.config.parallel, start.plan
    if plan is None or wanted.schedule != "1f1b" or wanted.pp == 1 or plan.micro_batches >= wanted.pp:
        return None
    stages = wanted.pp
    advice = f"batch.micro_size={plan.rank_rows // stages}" if plan.rank_rows % stages == 0 else None
    advice = advice or f"batch.size={stages * plan.micro_rows * plan.rows // plan.rank_rows}"
    return f"{plan.micro_batches} micro-batches do not fill {stages} pipeline stages: {advice} does"


@_refuses(
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


@_refuses("GPUs", "more ranks than GPUs when they compute on GPUs", "NCCL wants a GPU for each rank")
def _gpus(start: Start) -> str | None:
    if not start.cuda or start.world <= start.gpus:
        return None
    if start.gpus == 0:
        return "launch.device=cuda: there is no GPU here; launch.device=cpu works"
    return (
        f"{start.world} ranks on {start.gpus} {'GPU' if start.gpus == 1 else 'GPUs'}: "
        f"launch.nproc={start.gpus} works, or launch.device=cpu"
    )


@_refuses("several machines", "launch.nodes above 1 with launch=local", "`stoker train` starts ranks on one machine")
def _several_machines(start: Start) -> str | None:
    nodes = start.config.launch.nodes
    if start.config.launch.name != "local" or nodes == 1:
        return None
    return f"launch.nodes={nodes} with launch=local, which is this machine: `stoker submit launch=slurm` has several"


@_refuses("fp16 on CPUs", "precision=fp16 on CPUs", "it is slow and narrow there, and bf16 is neither")
def _fp16_on_cpus(start: Start) -> str | None:
    if start.config.precision != "fp16" or start.cuda:
        return None
    return "precision=fp16 on CPUs: precision=bf16 works"


@_refuses(
    "query groups",
    "model.num_attention_heads that is no multiple of model.num_key_value_heads",
    "query heads share kv heads evenly",
)
def _query_groups(start: Start) -> str | None:
    heads, kv_heads = start.config.model.num_attention_heads, start.config.model.num_key_value_heads
    if not start.built_in_model or not kv_heads or min(heads, kv_heads) < 1 or heads % kv_heads == 0:
        return None
    return (
        f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads={heads}: "
        f"{either(around(kv_heads, divisors(heads)))} does"
    )


@_refuses(
    "width of a head",
    "model.hidden_size that does not split into heads of an even width, with head_dim null",
    "rotary embeddings turn pairs of channels",
)
def _head_width(start: Start) -> str | None:
    model = start.config.model
    if not start.built_in_model or model.head_dim is not None or min(model.num_attention_heads, model.hidden_size) < 1:
        return None
    heads = model.num_attention_heads
    if model.hidden_size % (2 * heads) == 0:
        return None
    return (
        f"model.hidden_size={model.hidden_size} does not split into num_attention_heads={heads} of an even width: "
        f"model.hidden_size={either(multiples_around(model.hidden_size, 2 * heads))} does, or set model.head_dim"
    )


@_refuses("context extension", "rope_scaling whose frequency factors are not in order", "it divides by their distance")
def _context_extension(start: Start) -> str | None:
    scaling = start.config.model.rope_scaling
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if not start.built_in_model or scaling.factor == 1 or 0 < low < high:
        return None
    return (
        f"model.rope_scaling: low_frequency_factor={low} must be above 0 and below high_frequency_factor={high}; "
        f"Llama 3.1 has 1 and 4"
    )


@_refuses("warmup", "a warmup, with wsd also the decay, longer than the schedule", "the peak is never reached")
def _warmup(start: Start) -> str | None:
    schedule = start.config.schedule
    total = start.config.steps if schedule.total_steps is None else schedule.total_steps
    decay = round(schedule.decay_fraction * total) if schedule.name == "wsd" else 0
    if schedule.warmup_steps + decay <= max(total, 1):
        return None
    also = f" and a decay of {decay} steps" if decay else ""
    return (
        f"schedule.warmup_steps={schedule.warmup_steps}{also} do not fit into {total} steps: "
        f"schedule.warmup_steps={max(total - decay, 0)} does"
    )


@_refuses(
    "evaluation", "eval.every without eval.sequences, or eval.sequences with data.validation=0", "it evaluates nothing"
)
def _evaluation(start: Start) -> str | None:
    every, rows = start.config.eval.every, start.config.eval.sequences
    if every > 0 and rows == 0:
        size = start.config.batch.size
        return f"eval.every={every} with eval.sequences=0 evaluates nothing: set eval.sequences, such as {size}"
    if rows > 0 and start.config.data.validation == 0:
        return f"eval.sequences={rows} with data.validation=0: no document is kept for validation; 0.02 keeps some"
    return None


@_refuses(
    "best checkpoints",
    "checkpoint.keep_best when not every checkpoint has a validation loss of its own step",
    "there is nothing to compare",
)
def _best_checkpoints(start: Start) -> str | None:
    wanted, every = start.config.checkpoint, start.config.eval.every
    if wanted.keep_best < 1 or wanted.every < 1:
        return None
    if every > 0 and wanted.every % every == 0:
        return None
    return (
        f"checkpoint.keep_best={wanted.keep_best} with checkpoint.every={wanted.every} and eval.every={every}: "
        f"eval.every={wanted.every} measures every checkpoint (with eval.sequences above 0)"
    )


@_refuses("traced steps", "profile.steps that begin after the last step", "nothing would be traced")
def _traced_steps(start: Start) -> str | None:
    traced, steps = start.config.profile.steps, start.config.steps
    if not traced or len(traced) != 2 or steps < 1 or traced[0] <= steps or traced[1] < traced[0]:
        return None
    first = max(1, steps - (traced[1] - traced[0]))
    return f"profile.steps={traced} with steps={steps}: no such step is taken; profile.steps=[{first},{steps}] works"


@_refuses("faults", "entries of faults that are none, or that no step and rank of the run meets", "nothing would break")
def _faults(start: Start) -> str | None:
    try:
        faults = read_faults(start.config.faults)
    except ValueError as error:
        return f"faults: {error}"
    for fault in faults:
        if fault.rank >= start.world:
            return f"faults: {fault.name} is for rank {fault.rank} of {start.world}: rank 0 to {start.world - 1} work"
        if fault.at > start.config.steps:
            return f"faults: {fault.name} is for step {fault.at} of {start.config.steps}"
    return None


REFUSALS.extend(Refusal(*entry) for entry in (*OF_DEEPSPEED, *OF_LANES))


def refuse(config: Config, world: int, gpus: int) -> None:
    """Raises ConfigError with everything that forbids this start, one line each.

    `world` counts the ranks, `gpus` the GPUs that they may use, both over all machines.
    """
    start = Start(config, world, gpus)
    found = [
        *(limit.broken(config) for limit in LIMITS),
        *(refusal.check(start) for refusal in REFUSALS),
    ]
    messages = [message for message in found if message is not None]
    if messages:
        raise ConfigError("\n".join(messages))


def table_markdown() -> str:
    """The whole table, as docs/refusals.md prints it."""
    together = ((entry.name, entry.what, entry.why) for entry in REFUSALS)
    single = ((f"`{limit.key}`", limit.rule, limit.why) for limit in LIMITS)
    return "\n".join(
        [
            "# What Stoker refuses to start",
            "",
            "Printed from `parallel/refusals.py` and `conf/limits.py`. A start is judged as a whole before any rank is",
            "spawned; each message names the values it saw and the nearest that work.",
            "",
            "## Values that do not go together",
            "",
            *_table(("", "refused", "why"), together),
            "",
            "## Values that are impossible alone",
            "",
            *_table(("key", "must be", "why"), single),
            "",
        ]
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _whole_rounds(micro_batches: int, pp: int) -> bool:
    return micro_batches % max(1, micro_batches // pp) == 0


if __name__ == "__main__":
    print(table_markdown(), end="")
