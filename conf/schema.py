"""The typed config: every key of a run, its unit, and its kind.

Each field is of one of three kinds, which decide what may change when a run is resumed:

- `free`: where and how the run runs (layout, engine, launch, logging). Change it at will.
- `maths`: what the run computes from here on. Shown as a difference, allowed with `run.change=true`.
- `fixed`: what the run *is* (model shape, tokenizer, seed). Refused.

`stoker.conf.compose` makes `Config` from the YAML groups beside this file; our launcher's ranks get it as JSON.
"""

# ruff: noqa: RUF009 (free, maths and fixed return dataclasses.field)

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stoker.conf.fields import fixed, free, maths
from stoker.conf.model_schema import ModelConfig as ModelConfig
from stoker.conf.model_schema import RopeParameters as RopeParameters
from stoker.conf.values import ConfigError, expected, fits, options


@dataclass
class RunConfig:
    dir: str | None = free()  # run directory; default runs/<run.name>
    name: str | None = free()  # default <model>-<start time>
    seed: int = fixed(0)  # seeds initial weights and the order of the data
    fresh: bool = free(False)  # start over at step 1 without checkpoints; earlier metrics and config are moved aside
    change: bool = free(False)  # allow `maths` keys to change on resume
    trust: bool = free(False)  # run code that the stored config names, though another user started the run
    public: bool = free(False)  # make the run directory as the umask says; default: for this user alone (mode 0700)
    adopt: bool = free(False)  # take over places for checkpoints that are marked as another run's


@dataclass
class BatchConfig:
    size: int = maths(32)  # sequences per optimizer step over all ranks (the global batch)
    micro_size: int | None = free()  # sequences per micro-batch on a rank; default: as many as divide, at most 8
    ramp: list[Any] = maths([])  # smaller batches before `size`, and the tokens until which: [[8,1e6],[16,4e6]]


@dataclass
class ParallelConfig:
    tp: int = free(1)  # ranks that share each layer
    sequence_parallel: bool = free(True)  # sequence parallelism: norms and residuals hold tokens / tp; with tp > 1
    pp: int = free(1)  # pipeline stages (times stages_per_rank)
    cp: int = free(1)  # context parallelism: ranks that share the tokens of each sequence
    context: str = free("gather")  # how their attention meets: gather (keys and values) | ulysses (heads for tokens)
    ep: int = free(1)  # expert parallelism: of the ranks that read different tokens, so many hold the experts together
    token_dispatcher: str = free("alltoall")  # how tokens reach experts on other ranks: alltoall | allgather
    expert_tp: bool = free(False)  # with tp > 1: each rank has a share of every expert's channels, not whole experts
    zero: int = free(1)  # 0 replicate | 1 shard optimizer state | 2 and gradients | 3 and parameters
    dp_replicate: int | None = free()  # copies of the shards (hybrid sharding); derived for ZeRO 0, else 1
    schedule: str = free("1f1b")  # pipeline schedule: 1f1b | gpipe | interleaved
    stages_per_rank: int = free(1)  # pipeline stages per rank, > 1 with schedule=interleaved
    engine: str = free("fsdp")  # fsdp | deepspeed
    offload: str = free("none")  # none | cpu | nvme: where fp32 parameters and optimizer state are kept
    nvme_path: str | None = free()  # offload=nvme: a directory on a fast local disk of each machine
    deepspeed: dict[str, Any] = free({})  # engine=deepspeed: further settings, in DeepSpeed's own JSON
    timeout_seconds: float = free(600.0)  # of every process group's collectives


@dataclass
class AdapterConfig:
    """Keys by peft's names. Modules go by Stoker's names, by Hugging Face's, or by the end of one (`q_proj`)."""

    name: str = fixed("none")  # none | lora: two thin matrices beside each target | dora: and the lengths of its rows
    rank: int = fixed(8)  # columns and rows of the thin matrices
    alpha: float = fixed(16.0)  # their product is multiplied by alpha / rank
    rslora: bool = fixed(False)  # by alpha / sqrt(rank) instead
    target_modules: list[str] = fixed(["all-linear"])  # linear layers by names or patterns; all-linear: of all blocks
    layers_to_transform: list[int] = fixed([])  # numbers of the blocks whose linear layers are targets; default: all
    rank_pattern: dict[str, Any] = fixed({})  # another rank for targets by name or pattern: {q_proj: 16}
    modules_to_save: list[str] = fixed([])  # modules of the base that are trained whole, such as [embedding, head]
    dropout: float = maths(0.0)  # share of each adapter's inputs that is left out in training, drawn anew each time
    base: str | None = fixed()  # nf4: weights of the blocks' linear layers in four bits; default: as the model has them
    keep_base: bool = free(False)  # keep the base's weights in the run directory, by hard links where that is possible
    init_from: str | None = fixed()  # folder of an adapter in peft's format, whose shape and values the run begins with


@dataclass
class ObjectiveConfig:
    """What is minimised. The preference objectives take pairs of answers (data.args.shape=preference), kto and
    apo_zero_unpaired answers that are rated one by one (data.args.shape=unpaired_preference)."""

    name: str = maths("next_token")  # next_token | distill | dpo | ipo | simpo | orpo | kto | apo_zero_unpaired
    target: str | None = maths()  # import path pkg.mod:function of a user's objective
    beta: float = maths(0.1)  # factor of rewards; ipo: the paper's tau; orpo: its lambda, weight of the odds ratio
    label_smoothing: float = maths(0.0)  # dpo: probability that the answers of a pair are the wrong way round
    desirable_weight: float = maths(1.0)  # kto, apo_zero_unpaired: factor of the loss of desirable answers
    undesirable_weight: float = maths(1.0)  # and of undesirable ones
    gamma: float = maths(0.0)  # simpo: by how much the chosen reward is to exceed the rejected one
    teacher: str | None = fixed()  # folder of `stoker teach`: a teacher's predictions, or those of a reference
    temperature: float = maths(1.0)  # distill: of both distributions
    mix: float = maths(1.0)  # distill: share of the distance from the teacher; the rest is cross entropy
    z_loss: float = maths(0.0)  # next_token, in training: factor of the squared log of the softmax's normaliser
    args: dict[str, Any] = maths({})  # for a user's objective.target


@dataclass
class DataConfig:
    target: str = fixed("stoker.data.stdlib:open_source")  # import path pkg.mod:function of the source
    splits: str | None = fixed()  # import path pkg.mod:function of the source as splits, for mode=streaming
    name: str = free("data")  # for tables
    path: str | None = free()  # file or directory for sources that read one
    urls: Any = free()  # shards: an address, a brace pattern such as s-{000..099}.tar, or a list of them
    mode: str = fixed("indexed")  # indexed: tokens counted first | streaming: read, tokenised and packed on the fly
    streams: int = fixed(8)  # mode=streaming: logical streams that the sequences of a batch are assigned to
    shuffle_window: int = fixed(4)  # mode=streaming: splits shuffled together
    split_bytes: int | None = fixed()  # mode=streaming: bytes of a split of a file; default: at most 1 MiB
    assign_every: int = fixed(16)  # mode=streaming: sequences of a stream between two assignments of windows
    retries: int = free(5)  # attempts after the first at reading from a server, without a byte in between
    stall_seconds: float = free(60.0)  # without a byte, after which a connection counts as broken
    block_cache: str | None = free()  # folder for blocks downloaded from servers; default: none are kept
    block_cache_gib: float = free(16.0)  # GiB in it, above which the blocks used longest ago are removed
    on_damage: str = maths("error")  # mode=streaming: error | skip damaged documents, recorded in the state
    max_decompressed_gib: float = free(1.0)  # GiB of a compressed file held at once: a line, or a file read whole
    zstd_window_log: int = free(27)  # largest window of .zst files, log2 of its bytes; 31 reads `zstd --long=31`
    skip_limit: int = free(10_000)  # on_damage=skip: skips of a source; the run fails at more
    sources: dict[str, Any] = fixed({})  # several at once: {name: {kind: text, path: ..., weight: 2, max_epochs: 3}}
    weights: dict[str, Any] = maths({})  # share of the tokens by source; default: those in data.sources
    temperature: float = maths(1.0)  # weights to the power 1/temperature: above 1 small sources get more
    phases: list[dict[str, Any]] = maths([])  # weights from a step on: [{from_step: 1000, weights: {a: 1, b: 3}}]
    tokenizer: str | None = fixed("byte")  # byte | bpe (trained on the data) | path; null: the data's; or init_from's
    bpe_vocab: int = fixed(8192)  # vocabulary of tokenizer=bpe
    end_of_document: str | None = fixed()  # token that closes a document; default: the tokenizer's end token
    tiktoken_pattern: str | None = fixed()  # regex that cuts texts for a .tiktoken file; default: by its token count
    epochs: int | None = maths()  # passes over the data, which make `steps` if nothing else does; default: no end
    validation: float = fixed(0.02)  # share of the documents kept for validation
    validation_path: str | None = free()  # file or folder of the validation documents; default: data.validation of all
    validation_by: str | None = fixed()  # documents | position (the last tokens); default: position for one document
    packing: str = fixed("concatenated")  # concatenated | best_fit | padded: how documents become rows
    document_mask: bool | None = fixed()  # keep attention inside documents; default: for chats and best_fit
    workers: int = free(1)  # reader processes per rank; 0 reads in the rank itself
    prefetch: int = free(4)  # global batches read ahead per worker
    cache: str | None = free()  # tokenised data; default $XDG_CACHE_HOME/stoker
    args: dict[str, Any] = fixed({})  # for a user's data.target


@dataclass
class OptimConfig:
    name: str = maths("adamw")  # adamw | sgd | lion | lamb | muon (which leaves what is no matrix to adamw)
    target: str | None = maths()  # import path pkg.mod:function of a user's torch optimizer
    needs: str | None = free()  # optim.target: elementwise | norms | matrix, what it needs; default: its declaration
    lr: float = maths(1e-3)  # peak learning rate
    weight_decay: float = maths(0.1)  # decoupled: share of lr x weight taken off per step
    betas: list[float] = maths([0.9, 0.95])  # adamw (also muon's), lion, lamb: decay per step of the two moments
    eps: float = maths(1e-8)  # adamw (also muon's), lamb: added to the root of the second moment
    momentum: float = maths(0.0)  # sgd, muon: decay per step of the velocity
    ns_dtype: str = maths("fp32")  # muon: fp32 | bf16, of Newton-Schulz; in bf16 layouts differ (docs/optimizers.md)
    init_from: str | None = fixed()  # adamw: folder of `stoker import`, whose moments it begins with
    ema: float | None = maths()  # decay per step of a moving average of the weights, such as 0.999; default: none
    decay_all: bool = maths(False)  # decay norms, biases and embeddings too
    groups: list[dict[str, Any]] = maths([])  # own rule, rate and decay: [{role: head, name: adamw, lr: 1e-3}]
    args: dict[str, Any] = maths({})  # for a user's optim.target


@dataclass
class ScheduleConfig:
    name: str = maths("cosine")  # constant | linear | cosine | inverse_sqrt | wsd (warmup-stable-decay)
    warmup_steps: int = maths(0)  # steps of linear rise to the peak
    total_steps: int | None = maths()  # default: `steps` of the first start, then pinned
    decay_fraction: float = maths(0.2)  # wsd: share of total_steps in the final decay
    decay_shape: str = maths("linear")  # wsd: linear | cosine | sqrt (1 - the root of the share that is done)
    decays: list[list[int]] = maths([])  # wsd: first and last step of decays before the final one: [[800,1000]]
    cycle_steps: int | None = maths()  # cosine, linear: steps of the first cycle; default: one cycle, to the end
    cycle_growth: float = maths(1.0)  # cycle_steps: each cycle is so many times as long as the one before
    final: float = maths(0.1)  # learning rate at the end, as a share of the peak


@dataclass
class CheckpointConfig:
    every: int = free(200)  # steps between checkpoints; 0: by `minutes` and at the end only
    minutes: float | None = free(15.0)  # since the last save began, after which another does; null: by steps only
    keep: int = free(3)  # newest valid checkpoints kept
    keep_every: int = free(0)  # steps: checkpoints of their multiples are kept for good; 0: none
    keep_best: int = free(0)  # checkpoints of the lowest validation loss kept as well
    mode: str = free("async")  # async | sync
    staging_limit: int | None = free()  # bytes of host memory per rank for a snapshot; default: all of it
    dir: str | None = free()  # a faster place for this run only, shared by all ranks; default: the run directory
    remote: str | None = free()  # fsspec URL of a second tier for this run only: s3://bucket/run, file:///mnt/run
    on_error: str = free("warn")  # of a save or metrics line not written: warn: reported, and the run continues | fail


@dataclass
class EvalConfig:
    every: int | None = free()  # steps between evaluations; default: a tenth of `steps`, at least 50; 0: at the end
    sequences: int | None = free()  # validation sequences, and as many training sequences; default: at most 64; 0: none
    seed: int | None = free(0)  # of the sample, spread over all validation documents; null: the first of each source
    tasks: list[str] = free([])  # tasks of lm-eval to run between steps and at the end, such as [hellaswag]
    tasks_every: int | None = free()  # steps between them; default: as `every`; 0: at the end
    include: str | None = free()  # folder of task files of your own, in lm-eval's YAML
    fewshot: int | None = free()  # examples shown before each question; default: as the task says
    limit: int | None = free()  # questions of each task; default: all


@dataclass
class Float8Config:
    filter_fqns: list[str] = maths(["router", "model.layers.*.gate"])  # linear layers to leave in bf16: of experts
    amax_floor: float = maths(1e-12)  # least value that the scale of a row is taken from


@dataclass
class NonfiniteConfig:
    action: str = maths("skip")  # of a bad step: skip (leave its update out) | rollback (and train without it) | stop
    limit: int = free(10)  # the run ends after this many bad (skip) or unlabelled steps in a row, or one more rollback
    spike: float | None = maths()  # bad too: above median + this many deviations (1.4826 MAD); default: nan and inf
    window: int = maths(100)  # sound steps over which these are taken


@dataclass
class TrackerConfig:
    names: list[str] = free([])  # of wandb | tensorboard | mlflow | csv, any number; tracker=[wandb,csv] sets it
    project: str = free("stoker")  # wandb: project of the run; mlflow: its experiment
    entity: str | None = free()  # wandb: user or team; default: the key's own
    mode: str | None = free()  # wandb: online | offline | disabled; default: WANDB_MODE, else online with a key


@dataclass
class PrometheusConfig:
    port: int | None = free()  # TCP port at which rank 0's machine serves metrics; 0: a free one; default: none
    host: str = free("127.0.0.1")  # address to listen at; whoever can reach it reads the metrics


@dataclass
class AlertsConfig:
    command: str | None = free()  # shell command run on the events of `on`; they are in STOKER_EVENT, STOKER_RUN, ...
    on: list[str] = free(["hang", "rollback", "failure", "end"])  # events that run it


@dataclass
class LaunchConfig:
    name: str = free("local")  # local: processes here | slurm, kubernetes, skypilot: elsewhere, by `stoker submit`
    nproc: int | None = free()  # ranks on each machine; default: its GPUs, else 2
    max_restarts: int = free(3)  # restarts in a row that may fail before a new checkpoint is reached
    hang_seconds: float | None = free()  # without progress is a hang; default: 30 median steps, 120 at least
    preflight: bool = free(False)  # measure machines before training: warn of slow ones, refuse unequal versions
    threads: int | None = free()  # CPU threads per rank; default: cores / ranks
    device: str | None = free()  # cpu | cuda; default: cuda where there is one
    backend: str | None = free()  # of collectives: nccl | gloo; default: nccl on GPUs; gloo lets ranks share a GPU
    deadline: str | None = free()  # time by which the run must have saved and ended: 2026-12-24T18:00[:00][+01:00]
    nodes: int = free(1)  # machines, other than for launch=local
    time: str | None = free()  # slurm: time limit of the job, D-HH:MM:SS; default: the partition's
    partition: str | None = free()  # slurm; default: the cluster's
    gpus: int | None = free()  # GPUs of each machine, each for a rank, other than for launch=local; default: none
    cpus: int | None = free()  # processors of each machine; default, for each rank: threads + data.workers + 2
    grace_seconds: int = free(120)  # slurm, kubernetes: from the signal to the end of the machine, for the last save
    requeue: bool = free(True)  # slurm: come back to the queue after a preemption and at the time limit
    chain: int = free(1)  # slurm: jobs in a row, each waiting for the one before; for sites without requeue
    array: str | None = free()  # slurm: a run for each task, such as 0-3; {task} in a setting is its number
    setup: str | None = free()  # slurm: a line of shell before all else, such as "module load cuda"
    image: str | None = free()  # container image with Stoker; kubernetes and skypilot need one, slurm may have one
    container: str = free("pyxis")  # slurm with launch.image: pyxis | apptainer, which starts it
    manifest: str = free("jobset")  # kubernetes: jobset | trainjob (Kubeflow's Trainer v2)
    namespace: str | None = free()  # kubernetes; default: the context's
    volume: str | None = free()  # kubernetes: a claim that all pods mount; skypilot: a volume; holds the run directory
    mount: str = free("/runs")  # where launch.volume is in a pod; relative paths, as of run.dir, begin there
    accelerator: str = free("H100")  # skypilot: kind of GPU
    sbatch_args: list[str] = free([])  # slurm: further options of sbatch, such as [--account=lab,--exclusive]
    srun_args: list[str] = free([])  # slurm: further options of srun, such as [--container-image=...]


@dataclass
class LogConfig:
    every: int = free(10)  # steps between plain progress lines
    expert_tokens_every: int = free(100)  # steps between those with each expert's tokens in metrics.jsonl; 0: never
    norms_by_role: bool = free(False)  # the gradient norm of matrices, vectors, embedding and head in metrics.jsonl
    plan: bool | None = free()  # write attempts/K/plan.json where processors idle; default: on GPUs
    progress: str = free("auto")  # auto (live on a terminal) | live | plain | none


@dataclass
class ProfileConfig:
    steps: list[int] | None = free()  # first and last step traced into RUN/profiles, such as [10,13]; default: none
    phases_every: int = free(0)  # steps between those whose phases are in metrics.jsonl; 0: never


@dataclass
class Config:
    run: RunConfig = free(RunConfig)
    steps: int = free(200)  # optimizer steps of the whole run
    tokens: float | None = free()  # tokens of the whole run, such as 1e9, which make its steps at the first start
    skip_steps: list[list[int]] = maths([])  # first and last step of spans whose rows are left out: [[100,120]]
    seq_len: int = fixed(512)  # tokens per row
    batch: BatchConfig = free(BatchConfig)
    parallel: ParallelConfig = free(ParallelConfig)
    model: ModelConfig = fixed(ModelConfig)
    adapter: AdapterConfig = fixed(AdapterConfig)
    objective: ObjectiveConfig = maths(ObjectiveConfig)
    data: DataConfig = fixed(DataConfig)
    optim: OptimConfig = maths(OptimConfig)
    schedule: ScheduleConfig = maths(ScheduleConfig)
    grad_clip_norm: float | None = maths(1.0)  # largest gradient norm; null: no clipping
    precision: str = maths("bf16")  # fp32 | bf16 | fp16 | fp8: bf16, and products of linear layers in float8
    fp8: Float8Config = maths(Float8Config)
    fp32_modules: list[str] = maths([])  # modules that compute in fp32; patterns of names: [layers.0, layers.*.mlp]
    activation_checkpointing: str = free("none")  # none | selective | full
    compile: bool | None = free()  # torch.compile per block; default: on GPUs, unless the engine forbids it
    deterministic: bool = free(False)  # bitwise equal repeats on GPUs too
    nonfinite: NonfiniteConfig = free(NonfiniteConfig)
    checkpoint: CheckpointConfig = free(CheckpointConfig)
    eval: EvalConfig = free(EvalConfig)
    tracker: TrackerConfig = free(TrackerConfig)
    prometheus: PrometheusConfig = free(PrometheusConfig)
    alerts: AlertsConfig = free(AlertsConfig)
    observers: list[Any] = free([])  # classes of yours, pkg.mod:Class or {target: pkg.mod:Class, ARGUMENT: VALUE}
    launch: LaunchConfig = free(LaunchConfig)
    log: LogConfig = free(LogConfig)
    profile: ProfileConfig = free(ProfileConfig)
    faults: list[dict[str, Any]] = free([])  # failures to inject, each once per run: [{at: 7, rank: 1, do: kill}]


GROUPS = ("model", "adapter", "objective", "data", "optim", "schedule", "tracker", "launch")


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """The inverse of `to_dict`. Raises ConfigError, naming the dotted key, for an unknown key or a wrong type."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            raise ConfigError(f"unknown key {key!r}" + (f": did you mean {prefix + near[0]!r}?" if near else ""))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{key}={value!r}: expected a section of keys")
            value = from_dict(value, typing.cast(type, hint), f"{key}.")
        elif not fits(value, hint):
            raise ConfigError(f"{key}={value!r}: expected {expected(hint)}")
        elif type(value) is int and float in options(hint):
            value = float(value)
        arguments[name] = value
    return kind(**arguments)


def leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf key, dotted, with its field and its type, in the order of the schema."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, hint


def kinds(kind: type = Config) -> dict[str, str]:
    """Every leaf key with its kind: `{"run.seed": "fixed", ...}`."""
    return {key: entry.metadata["kind"] for key, entry, _ in leaves(kind)}


def lookup(config: Any, key: str) -> Any:
    """The value at a dotted key: `lookup(config, "parallel.tp")`."""
    return functools.reduce(getattr, key.split("."), config)
