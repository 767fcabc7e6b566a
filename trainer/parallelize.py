"""How a model is parallelized: from a config and a mesh to an engine with initialised weights.

The order matters and is defined here only: adapters -> float8 -> stages (pipeline) -> tensor parallel -> context
parallel -> expert parallel -> fp32 modules -> frozen parameters -> activation checkpointing -> compile -> ZeRO ->
memory -> initial values.
Until ZeRO has sharded it, the model is on the meta device and takes no memory.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stoker.conf.schema import Config
from stoker.models.adapters import apply, plan_of
from stoker.models.document_attention import attention_of_documents
from stoker.models.family import build_on_meta, family_of
from stoker.models.float8 import NONE as NO_FLOAT8
from stoker.models.float8 import compute_in_float8
from stoker.models.loss import Head
from stoker.models.objectives import objective_of
from stoker.models.objectives.teaching import TARGET
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.engine import Engine
from stoker.parallel.experts import expert_axis, parallelize_experts
from stoker.parallel.fp32_modules import compute_in_fp32
from stoker.parallel.frozen import store_frozen
from stoker.parallel.gpu_clock import GpuClock
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import OF_TOKENS, BatchPlan, Layout
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import ParallelizableModel, Part, whole_model
from stoker.parallel.native import build_native
from stoker.parallel.objective import Taught, takes_targets
from stoker.parallel.registry import Registry, entries_of
from stoker.parallel.rules.settings import unused_group
from stoker.parallel.sequence import parallelize_sequence, sequence_axis
from stoker.parallel.stages import costs_of, parts, stages_of
from stoker.parallel.tensor import enable_async_tensor_parallelism, parallelize_tensors
from stoker.parallel.tensor.dropout import TokenNumbers, token_numbers
from stoker.parallel.tensor.float8 import float8_of, refuse_device
from stoker.parallel.tensor.low_rank import SLOT
from stoker.parallel.tensor.nf4 import BLOCK, WANTED, pack, packed_in
from stoker.parallel.trial import Trial
from stoker.trainer.loss_chunk import loss_chunk

log = logging.getLogger(__name__)

# Of an objective, or of weights, for a model that computes its loss on its own.
NO_HEAD = (
    "needs the log-probability of each token, and model.target={} computes its loss by itself: a model that ends in "
    "stoker.models.loss.Head, as every built-in one does, returns them"
)

OF_DORA = (f"*.{SLOT}.magnitude",)  # modules that compute in fp32

FUSED_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def cut(config: Config, mesh: Mesh, plan: BatchPlan) -> Engine:
    """The engine for `config` on this rank, its weights a function of (seed, names) only.

    `config.model.vocab_size` must be set. Raises ValueError for a model target that cannot be imported, and for a
    model that cannot be parallelized as configured.
    """
    engine, initialise = build_engine(config, mesh, plan)
    initialise()
    return engine


class Initialise(Protocol):
    """Gives parameters their initial values, `but` for those of these names."""

    def __call__(self, but: Collection[str] = ()) -> None: ...


def build_engine(
    config: Config, mesh: Mesh, plan: BatchPlan, every: Sequence[Part] | None = None
) -> tuple[Engine, Initialise]:
    """`parallelize` in two parts: an engine with uninitialised parameters, and a function that initialises them.

    A run that resumes from a checkpoint does not need them, and drawing them takes seconds per billion parameters.
    `every` are the parts of all stages, in the order of the pipeline; a rehearsal leaves layers out of them.
    """
    build = part_builder(config)
    whole = build(whole_model(config.model.num_hidden_layers))
    log.info("model: %s, %s parameters", config.model.name, f"{_count(whole):,}")
    chunk = loss_chunk(config, mesh, whole)
    if config.adapter.name != "none" or config.model.freeze:
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        log.info("adapter: %s, %s parameters are trained", config.adapter.name, f"{trained:,}")
    if config.precision == "fp8":
        refuse_device(mesh.device)
        layers = sum(float8_of(module) is not None for module in whole.modules())
        if not layers:
            raise ValueError(NO_FLOAT8.format(config.model.name))
        log.info("float8: %d linear layers, rowwise scales, %s", layers, _products(mesh.device))
    if config.objective.target != TARGET and not any(parameter.requires_grad for parameter in whole.parameters()):
        raise ValueError(f"model.target={config.model.target}: none of its parameters is trained")
    trained_roles = {entry.name: entry.role for entry in entries_of(whole) if entry.trainable}
    if (problem := unused_group(config.optim, trained_roles)) is not None:
        raise ValueError(problem)
    objective = objective_of(config.objective)
    extended = objective.per_token or isinstance(objective, Taught)
    if (extended or config.objective.z_loss or config.eval.tasks) and not takes_targets(whole):
        what = f"objective={config.objective.name}" if extended else "objective.z_loss"
        what = what if extended or config.objective.z_loss else f"eval.tasks={config.eval.tasks}"
        raise ValueError(f"{what} {NO_HEAD.format(config.model.target)}")
    if objective.per_token and mesh.layout.cp > 1:
        raise ValueError(
            f"objective.target={config.objective.target} takes log-probabilities of whole sequences, which "
            f"parallel.cp={mesh.layout.cp} divides: parallel.cp=1 works"
        )
    if objective.reference and config.objective.teacher is None and config.adapter.name == "none":
        raise ValueError(
            f"objective.target={config.objective.target} needs the model without its adapter: adapter=lora"
        )

    shortened = every is not None
    every = every or parts_of(config, mesh.layout, whole, build)
    numbers = stages_of(mesh.coordinate.pp, mesh.layout.pp, config.parallel.stages_per_rank)
    stages = [build(every[n]) for n in numbers] if mesh.layout.pp > 1 or shortened else [whole]
    trial = Trial(plan.micro_rows, config.seq_len // mesh.layout.cp, bool(config.data.document_mask))
    dtype = PRECISIONS[config.precision]
    activations = whole_activations = trial.activations(every, build, dtype)
    registry = _cut_tensors(config, mesh, stages)
    if mesh.group("tp") is not None:
        if config.parallel.sequence_parallel:
            activations = [_shared(activation, mesh.layout.tp) for activation in whole_activations]
        for number, stage in zip(numbers, stages, strict=True):
            rebuild = functools.partial(build, every[number])
            received, whole_received = ([None, *known][number] for known in (activations, whole_activations))
            trial.refuse_open_regions(stage, registry, received, rebuild, whole_received)
    if mesh.layout.pp > 1:
        registry = _tie_stages(config, mesh, registry, stages)
    known = registry
    if config.adapter.base == "nf4":
        registry = _pack_weights(mesh, registry, stages)

    sequence = sequence_axis(config, mesh)
    if sequence is not None:
        parallelize_sequence(whole, stages, sequence)
        log.info("context parallel over %d ranks: %s", sequence.size, sequence.exchange)

    experts = expert_axis(config, mesh)
    if experts is not None:
        registry = parallelize_experts(whole, stages, registry, experts)
        log.info("expert parallel over %d ranks: %s", experts.size, experts.dispatcher)

    patterns = [*config.fp32_modules, *(OF_DORA if config.adapter.name == "dora" and dtype != torch.float32 else ())]
    full = [compute_in_fp32(stage, patterns, dtype) if patterns else () for stage in stages]
    if config.fp32_modules:
        log.info("fp32 modules: %s", ", ".join(config.fp32_modules))
    registry = store_frozen(stages, full, registry, dtype)
    narrow = sum(entry.dtype != torch.float32 for entry in registry.entries.values() if not entry.buffer)
    if narrow:
        log.info("frozen: %d parameters of this rank are held in %s, without masters", narrow, str(dtype)[6:])
    compiled = compiles(config, mesh.device)
    clock = GpuClock(mesh.device)
    for stage in stages:
        _prepare_heads(stage, chunk, compiled and mesh.device.type == "cuda")
        tokens = token_numbers(stage)
        for block in _parallelizable(stage).blocks().values():
            _checkpoint_activations(block, config.activation_checkpointing, tokens)
            if compiled:
                block.forward = torch.compile(block.forward)
            clock.time(block)
    if config.activation_checkpointing != "none":
        log.info("activation checkpointing: %s, per block", config.activation_checkpointing)
    if compiled:
        log.info("compile: per block%s", ", and the loss" if mesh.device.type == "cuda" else "")

    engine = build_native(config, mesh, plan, stages, full, registry, activations, clock, objective)
    log.info("layout: %s; %d micro-batches of %d rows per rank", mesh.layout, plan.micro_batches, plan.micro_rows)

    def initialise(but: Collection[str] = ()) -> None:
        initialize((shard for shard in engine.shards() if shard.name not in but), registry.initial, config.run.seed)
        for packed in packed_in(stages):
            if packed.name not in but:
                shard = packed.shard()
                initialize([shard], known.initial, config.run.seed)
                packed.fill(shard.data)
        engine.shards_written()

    return engine, initialise


def parameters_of(config: Config) -> int:
    """Numbers in all parameters of the whole model. `config.model.vocab_size` must be set."""
    return _count(build_on_meta(config.model, whole_model(config.model.num_hidden_layers)))


def trained_and_frozen(config: Config) -> tuple[int, int]:
    """The same, of those that are trained, adapters among them, and of those that are not."""
    whole = part_builder(config)(whole_model(config.model.num_hidden_layers))
    trained = sum(math.prod(parameter.shape) for parameter in whole.parameters() if parameter.requires_grad)
    return trained, _count(whole) - trained


def _count(model: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in model.parameters())


def _products(device: torch.device) -> str:
    return "on tensor cores" if device.type == "cuda" else "emulated: rounded as on GPUs, multiplied in bf16"


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are compiled: as `config.compile`, else on GPUs where nothing forbids it, which is logged."""
    if config.compile is not None or device.type != "cuda":
        return bool(config.compile)
    if config.parallel.engine == "deepspeed" and config.parallel.zero == 3:
        log.info("compile: off, as the hooks of DeepSpeed ZeRO 3 run inside the blocks")
        return False
    return True


def part_builder(config: Config) -> Callable[[Part], nn.Module]:
    """Builds parts of the model that `config` trains, with its adapters, without memory.

    Raises ValueError for an adapter, or names in `model.freeze`, that do not fit the model.
    """
    build: Callable[[Part], nn.Module] = functools.partial(build_on_meta, config.model)
    if config.adapter.name != "none" or config.model.freeze:
        plan = plan_of(build(whole_model(config.model.num_hidden_layers)), config)
        build = _then(build, lambda part: apply(part, plan, config))
    return _then(build, lambda part: compute_in_float8(part, config)) if config.precision == "fp8" else build


def _then(build: Callable[[Part], nn.Module], change: Callable[[nn.Module], nn.Module]) -> Callable[[Part], nn.Module]:
    return lambda part: change(build(part))


def parts_of(config: Config, layout: Layout, whole: nn.Module, build: Callable[[Part], nn.Module]) -> list[Part]:
    """The parts of all stages, in the order of the pipeline."""
    if layout.pp == 1:
        return [whole_model(config.model.num_hidden_layers)]
    cost = functools.partial(family_of(config.model).layer_cost, config.model)
    costs = costs_of(_parallelizable(whole), build, cost)
    every = parts(costs, layout.pp * config.parallel.stages_per_rank)
    spans = ", ".join(f"{part.layers.start}-{part.layers.stop - 1}" for part in every)
    log.info("pipeline: %s, layers of the stages: %s", config.parallel.schedule, spans)
    return every


def _cut_tensors(config: Config, mesh: Mesh, stages: list[nn.Module]) -> Registry:
    """Shard the layers of all stages over tp; their registries name the groups that still sum each gradient."""
    wanted = config.parallel
    entries = [
        entry
        for stage in stages
        for entry in parallelize_tensors(stage, mesh, wanted.sequence_parallel, wanted.expert_tp).entries.values()
    ]
    group = mesh.group("tp")
    if group is not None:
        kind = "tensor and sequence parallel" if wanted.sequence_parallel else "tensor parallel"
        log.info("%s over %d ranks", kind, mesh.layout.tp)
        if compiles(config, mesh.device) and mesh.device.type == "cuda":
            enable_async_tensor_parallelism(group)
    return Registry(entries)


def _tie_stages(config: Config, mesh: Mesh, registry: Registry, stages: list[nn.Module]) -> Registry:
    """Parameters that the first and the last stage both hold (tied embeddings): the same gradient, counted once."""
    last = config.model.num_hidden_layers - 1
    ends = Part(range(1), embedding=True, head=False), Part(range(last, last + 1), embedding=False, head=True)
    first_names, last_names = (
        {name for name, _ in build_on_meta(config.model, end).named_parameters()} for end in ends
    )
    tied = first_names & last_names
    if not tied:
        return registry
    mesh.add_groups("ends", [[ranks[0], ranks[-1]] for ranks in mesh.layout.groups("pp")])
    log.info("tied over the ends of the pipeline: %s", ", ".join(sorted(tied)))
    copy = 0 if mesh.coordinate.pp == 0 else 1
    return Registry(
        dataclasses.replace(
            entry,
            replica=entry.replica + copy * entry.replicas,
            replicas=2 * entry.replicas,
            partial=(*entry.partial, "ends"),
        )
        if entry.name in tied
        else entry
        for entry in registry.entries.values()
    )


def _pack_weights(mesh: Mesh, registry: Registry, stages: list[nn.Module]) -> Registry:
    """Hold frozen weights of linear layers in four bits: the entries of what is left to the sharding strategy."""
    places = mesh.layout.place(mesh.rank, OF_TOKENS), mesh.layout.size(OF_TOKENS)
    gone: set[str] = set()
    for stage in stages:
        for name, module in stage.named_modules():
            if getattr(module, WANTED, False):
                assert isinstance(module, nn.Linear)
                pack(module, registry.entries[f"{name}.weight"], places, mesh.device)
                gone.add(f"{name}.weight")
    log.info("nf4: weights of %d linear layers of this rank, in blocks of %d", len(gone), BLOCK)
    return Registry(entry for entry in registry.entries.values() if entry.name not in gone)


def _shared(activation: Tensor, ranks: int) -> Tensor:
    """The share of `activation` that each of `ranks` holds when they share its tokens."""
    if activation.shape[0] % ranks:
        raise ValueError(f"sequence parallelism: {activation.shape[0]} tokens do not divide over {ranks} ranks")
    return activation[: activation.shape[0] // ranks].clone()


def _parallelizable(model: nn.Module) -> ParallelizableModel:
    return model  # type: ignore[return-value]


def _prepare_heads(stage: nn.Module, chunk: int | None, compiled: bool) -> None:
    """Let the heads of `stage` take `chunk` tokens at a time, if it is not None, and compute by `compiled` kernels."""
    for module in stage.modules():
        if isinstance(module, Head):
            module.compiled = compiled
            if chunk is not None:
                module.chunk = chunk


def _checkpoint_activations(block: nn.Module, mode: str, tokens: TokenNumbers | None) -> None:
    """Recompute a block's activations in backward: all of them (full), or those that are cheap (selective).

    Selective keeps the output of attention, of every second matrix product, and of collectives, so that no
    communication is repeated. `tokens` are those of the block's stage, if it has dropout: what is recomputed has those
    of its forward pass, though other micro-batches may have come in between.
    """
    if mode == "none":
        return
    from torch.utils import checkpoint

    # Marks for profilers: a unit of `fully_shard` inside a block sets one more where a recomputation begins with it.
    marks = torch.ops.profiler
    checkpoint.SAC_IGNORED_OPS.add(marks._record_function_enter_new.default)
    checkpoint.SAC_IGNORED_OPS.add(marks._record_function_exit._RecordFunction)
    options: dict[str, Any] = {"context_fn": _selective} if mode == "selective" else {}
    forward = block.forward
    if tokens is None:
        block.forward = functools.partial(checkpoint.checkpoint, forward, use_reentrant=False, **options)
        return

    def numbered(numbers: Tensor | None, *args: Any, **named: Any) -> Any:
        with tokens.of(numbers):
            return forward(*args, **named)

    def checkpointed(*args: Any, **named: Any) -> Any:
        return checkpoint.checkpoint(numbered, tokens.current, *args, use_reentrant=False, **options, **named)

    block.forward = checkpointed


def _selective() -> tuple[Any, Any]:
    """The contexts of one pass through a block: its forward, and the recomputation, which see the same operations."""
    from torch.utils import checkpoint

    aten, collectives = torch.ops.aten, torch.ops._c10d_functional
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default}
    kept = {operation.default for operation in (collectives.reduce_scatter_tensor, collectives.all_to_all_single)}
    kept |= {collectives.all_reduce.default}
    kept |= {getattr(aten, name).default for name in FUSED_ATTENTION if hasattr(aten, name)}
    kept |= attention_of_documents()
    seen = {False: 0, True: 0}  # matrix products, in the forward pass and in the recomputation

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> Any:
        if operation in products:
            seen[context.is_recompute] += 1
            keeps = seen[context.is_recompute] % 2 == 1
        else:
            keeps = operation in kept
        return checkpoint.CheckpointPolicy.MUST_SAVE if keeps else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)
