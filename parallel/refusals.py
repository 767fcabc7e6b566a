"""Layouts and engines that are refused, with the nearest that work."""

from __future__ import annotations

import math

import torch

from stoker.conf.limits import ZERO_BUBBLE
from stoker.conf.schema import ModelConfig
from stoker.parallel.deepspeed_engine.refused import ENTRIES as OF_DEEPSPEED
from stoker.parallel.of_ramps import no_rounds, not_filling, whole_rounds
from stoker.parallel.optimizer_needs import ENTRIES as OF_OPTIMIZERS
from stoker.parallel.start import Refusal, Refusals, Start
from stoker.parallel.suggestions import around, divisors, either, multiples_around

REFUSALS = Refusals()


@REFUSALS.entry("axes", "ranks that are no multiple of tp x pp x cp", "the grid of ranks must be full")
def _axes(start: Start) -> str | None:
    wanted = start.config.parallel
    block = wanted.tp * wanted.pp * wanted.cp
    if start.world < 1:
        return f"{start.world} ranks: launch.nproc=1 is the least"
    if block < 1 or start.world % block == 0:
        return None
    ranks = either(multiples_around(start.world, block))
    cp = f" x cp {wanted.cp}" if wanted.cp > 1 else ""
    return f"{start.world} ranks do not divide into tp {wanted.tp} x pp {wanted.pp}{cp}: launch.nproc={ranks} does"


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
        f"parallel.dp_replicate={either(around(replicas, divisors(dp)))} does"
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
        f"(batch.size={rows} over {dp}): batch.micro_size={either(around(micro, divisors(rows // dp)))} does"
    )


@REFUSALS.entry(
    "sequence parallelism",
    "micro-batches whose tokens do not divide over parallel.tp under parallel.sequence_parallel",
    "between regions every rank holds as many tokens",
)
def _sequence_parallel(start: Start) -> str | None:
    tp, cp, seq_len, plan = start.config.parallel.tp, start.config.parallel.cp, start.config.seq_len, start.plan
    if not start.config.parallel.sequence_parallel or plan is None or seq_len < 1 or seq_len % cp:
        return None
    if plan.micro_rows * (seq_len // cp) % tp == 0:
        return None
    micro = [n for n in divisors(plan.rank_rows) if n * (seq_len // cp) % tp == 0]
    rows = f"batch.micro_size={either(around(plan.micro_rows, micro))} does, or " if micro else ""
    lengths = either(multiples_around(seq_len, cp * (tp // math.gcd(tp, plan.micro_rows))))
    over = f"parallel.tp={tp}" + (f" and parallel.cp={cp}" if cp > 1 else "")
    return (
        f"micro-batches of {plan.micro_rows} x seq_len={seq_len} tokens do not divide over {over}: "
        f"{rows}seq_len={lengths}, or parallel.sequence_parallel=false"
    )


@REFUSALS.entry(
    "tokens over ranks", "seq_len that is no multiple of parallel.cp", "every rank holds as many tokens of a sequence"
)
def _context_parallel(start: Start) -> str | None:
    cp, seq_len = start.config.parallel.cp, start.config.seq_len
    if cp <= 1 or seq_len < 1 or seq_len % cp == 0:
        return None
    wanted = start.config.parallel
    ranks = start.world // max(1, wanted.tp * wanted.pp)
    degrees = either(around(cp, divisors(math.gcd(seq_len, max(1, ranks)))))
    return (
        f"seq_len={seq_len} does not divide over parallel.cp={cp}: "
        f"seq_len={either(multiples_around(seq_len, cp))} does, or parallel.cp={degrees}"
    )


@REFUSALS.entry(
    "experts over ranks",
    "parallel.ep that does not divide the ranks that ZeRO shards over; with ZeRO 0 those that read different tokens",
    "expert groups are equally large, and ZeRO shards and copies each part of the experts like any other parameter",
)
def _expert_parallel(start: Start) -> str | None:
    ep, layout = start.config.parallel.ep, start.without_ep
    if ep <= 1 or layout is None or layout.most_ep % ep == 0:
        return None
    kind = "shard one copy of the parameters" if layout.shards > 1 else "read different tokens"
    return (
        f"parallel.ep={ep} does not divide the {layout.most_ep} ranks that {kind}: "
        f"parallel.ep={either(around(ep, divisors(layout.most_ep)))} does"
    )


@REFUSALS.entry(
    "experts of a rank",
    "parallel.ep above 1 without experts (model.num_experts=0), or that does not divide them",
    "every rank of an expert group holds as many experts",
)
def _experts_of_a_rank(start: Start) -> str | None:
    ep, model, layout = start.config.parallel.ep, start.config.model, start.without_ep
    if ep <= 1 or model.target != ModelConfig().target or model.num_experts < 0:  # others are judged when built
        return None
    if model.num_experts == 0:
        return (
            f"parallel.ep={ep} with model.num_experts=0: parallel.ep=1 works, or experts by model.num_experts={4 * ep}"
        )
    if model.num_experts % ep == 0:
        return None
    degrees = divisors(math.gcd(model.num_experts, layout.most_ep if layout is not None else 1))
    return (
        f"model.num_experts={model.num_experts} do not divide over parallel.ep={ep}: "
        f"parallel.ep={either(around(ep, degrees))} works"
    )


@REFUSALS.entry(
    "channels of experts",
    "parallel.expert_tp where parallel.tp does not divide the channels of an expert",
    "every rank has as many channels of each expert",
)
def _channels_of_experts(start: Start) -> str | None:
    tp, model = start.config.parallel.tp, start.config.model
    hidden = model.moe_intermediate_size or model.intermediate_size
    if not start.config.parallel.expert_tp or min(tp, model.num_experts) < 1 or hidden % tp == 0:
        return None
    return (
        f"parallel.expert_tp=true with parallel.tp={tp}: the {hidden} channels of an expert do not divide; "
        "parallel.expert_tp=false works, with whole experts on every rank"
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
    if (several or interleaved) and wanted.pp == 1:
        return (
            f"{seen} and parallel.pp=1: without a pipeline parallel.schedule=1f1b with parallel.stages_per_rank=1 "
            f"works, and a pipeline is parallel.pp=2 with launch.nproc={2 * start.world} and "
            f"parallel.schedule=interleaved and parallel.stages_per_rank={max(2, wanted.stages_per_rank)}, or more"
        )
    if several and not interleaved:
        return f"{seen}: several stages on a rank need parallel.schedule=interleaved"
    if interleaved and not several:
        return f"{seen}: interleaving needs parallel.stages_per_rank=2 or more, or use parallel.schedule=1f1b"
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
    works = "parallel.schedule=interleaved with parallel.stages_per_rank=2 or more has a small bubble too"
    if start.config.parallel.pp == 1:
        works = "parallel.schedule=1f1b works, as parallel.pp=1 is no pipeline"
    return (
        f"parallel.schedule={schedule}: the split backward of zero-bubble schedules adds weight gradients up in the "
        f"compute dtype and past the hooks that reduce them; {works}"
    )


@REFUSALS.entry(
    "full pipeline", "fewer micro-batches than stages under schedule=1f1b", "it begins with one in each stage"
)
def _full_pipeline(start: Start) -> str | None:
    wanted, plans = start.config.parallel, start.plans
    if not plans or wanted.schedule != "1f1b" or wanted.pp == 1 or plans[0].micro_batches >= wanted.pp:
        return None
    stages, plan = wanted.pp, plans[0]
    if len(plans) > 1:
        return not_filling(start.config, plans, stages)
    advice = f"batch.micro_size={plan.rank_rows // stages}" if plan.rank_rows % stages == 0 else None
    rows = stages * plan.micro_rows * plan.rows // plan.rank_rows
    advice = advice or f"batch.size={rows} with batch.micro_size={plan.micro_rows}"
    return f"{plan.micro_batches} micro-batches do not fill {stages} pipeline stages: {advice} does"


@REFUSALS.entry(
    "interleaved rounds",
    "micro-batches that do not split into rounds of about pp each under schedule=interleaved",
    "the schedule visits all stages of a rank once a round",
)
def _interleaved_rounds(start: Start) -> str | None:
    wanted = start.config.parallel
    if wanted.schedule != "interleaved":
        return None
    plan = next((plan for plan in start.plans if not whole_rounds(plan.micro_batches, wanted.pp)), None)
    if plan is None:
        return None
    if start.config.batch.ramp:
        return no_rounds(start.config, start.plans, plan, wanted.pp)
    counts = [n for n in divisors(plan.rank_rows) if whole_rounds(n, wanted.pp)]
    micro = either(plan.rank_rows // n for n in around(plan.micro_batches, counts))
    return (
        f"{plan.micro_batches} micro-batches do not split into rounds over parallel.pp={wanted.pp}: "
        f"batch.micro_size={micro} does"
    )


@REFUSALS.entry(
    "GPUs",
    "more ranks than GPUs on a machine when they compute on GPUs, but under launch.backend=gloo",
    "NCCL needs a GPU for each rank",
)
def _gpus(start: Start) -> str | None:
    if not start.cuda or (start.gloo_on_gpus and start.gpus):
        return None
    if start.gpus == 0:
        return "launch.device=cuda: there is no GPU here; launch.device=cpu works"
    if start.local <= start.gpus or (start.one_each and start.gpus == 1):
        return None
    seen = f"{start.local} ranks on {start.gpus} {'GPU' if start.gpus == 1 else 'GPUs'}"
    if start.one_each:  # another launcher has started them
        return (
            f"{seen} of this machine: start {start.gpus} ranks on it (torchrun --nproc-per-node {start.gpus}), or let "
            "each rank see the one GPU that is its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)"
        )
    return (
        f"{seen}: launch.nproc={start.gpus} works, or launch.device=cpu; launch.backend=gloo lets ranks share a GPU, "
        "for tests"
    )


@REFUSALS.entry("NCCL on CPUs", "launch.backend=nccl on CPUs", "NCCL moves the memory of GPUs")
def _nccl_on_cpus(start: Start) -> str | None:
    if start.config.launch.backend != "nccl" or start.cuda:
        return None
    return "launch.backend=nccl on CPUs: leave launch.backend out, or set launch.backend=gloo"


@REFUSALS.entry(
    "pipelines over gloo on GPUs",
    "parallel.pp > 1 with launch.backend=gloo on GPUs",
    "gloo sends and receives no tensors of GPUs, though it reduces and gathers them",
)
def _pipelines_over_gloo(start: Start) -> str | None:
    if not start.gloo_on_gpus or start.config.parallel.pp == 1:
        return None
    return (
        f"parallel.pp={start.config.parallel.pp} with launch.backend=gloo on GPUs: parallel.pp=1 works, or "
        "launch.device=cpu, or launch.backend=nccl with a GPU for each rank"
    )


@REFUSALS.entry(
    "pipelines on older torch",
    "parallel.pp > 1 with a torch before 2.13",
    "stages build on parts of torch.distributed.pipelining that earlier versions do not have",
)
def _pipelines_on_older_torch(start: Start) -> str | None:
    if start.config.parallel.pp == 1 or pipelines_work(torch.__version__):
        return None
    return f"parallel.pp={start.config.parallel.pp} on torch {torch.__version__}: parallel.pp=1 works, or torch 2.13"


@REFUSALS.entry("fp16 on CPUs", "precision=fp16 on CPUs", "it is slow and narrow there, and bf16 is neither")
def _fp16_on_cpus(start: Start) -> str | None:
    if start.config.precision != "fp16" or start.cuda:
        return None
    return "precision=fp16 on CPUs: precision=bf16 works"


REFUSALS.extend(Refusal(*entry) for entry in (*OF_DEEPSPEED, *OF_OPTIMIZERS))


def pipelines_work(torch_version: str) -> bool:
    """Whether this version of torch has what `stoker.parallel.pipeline` builds on."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return (major, minor) >= (2, 13)
