"""Shapes that the decoder cannot have, and adapters that would do nothing, with the nearest that work."""

from __future__ import annotations

import math

from stoker.conf.schema import AdapterConfig, RopeParameters
from stoker.models.feed_forward import all_sparse, expert_width
from stoker.models.rope import FAST, SLOW
from stoker.parallel.start import Refusals, Start
from stoker.parallel.suggestions import around, divisors, either, multiples_around

REFUSALS = Refusals()

# Required keys of each rope_type beside rope_theta; nothing else may be set with it. (Llama 3.1's values, for the
# message.)
_NEEDED = {
    "default": {},
    "linear": {"factor": 8.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 40.0, "original_max_position_embeddings": 4096},
    "longrope": {"attention_factor": 1.19, "original_max_position_embeddings": 4096},
}
_OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # which may be absent
_SCALING = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", *_OF_YARN),
    "attention_factor",
)
_PUBLISHED = {"linear": "Gemma 3", "llama3": "Llama 3.1", "yarn": "DeepSeek-V3", "longrope": "Phi-3"}


@REFUSALS.entry(
    "tensor parallelism",
    "parallel.tp that does not divide model.num_attention_heads, model.intermediate_size and the channels of shared "
    "experts, or that neither divides model.num_key_value_heads nor is a multiple of it",
    "every rank holds equally many heads and channels, or one kv head that other ranks hold too; "
    "model.hidden_size and model.vocab_size may be of any size",
)
def _tensor_parallel(start: Start) -> str | None:
    tp, model = start.config.parallel.tp, start.config.model
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if min(tp, heads, kv_heads, model.intermediate_size, model.moe_intermediate_size or 1) < 1:
        return None
    shared = {"moe_intermediate_size": expert_width(model)} if model.num_experts and model.num_shared_experts else {}
    channels = shared if all_sparse(model) else {"intermediate_size": model.intermediate_size, **shared}

    def shares_kv_heads(ranks: int) -> bool:
        return kv_heads % ranks == 0 or ranks % kv_heads == 0

    uneven = [f"model.{name}={size}" for name, size in {"num_attention_heads": heads, **channels}.items() if size % tp]
    if model.num_key_value_heads and not shares_kv_heads(tp):
        uneven.append(f"model.num_key_value_heads={kv_heads}")
    if not uneven:
        return None
    works, pp, cp = [], start.config.parallel.pp, start.config.parallel.cp
    for fitting in around(tp, filter(shares_kv_heads, divisors(math.gcd(heads, *channels.values())))):
        ranks = start.world if start.dp is None else start.dp * pp * cp * fitting  # as many replicas as now
        whole = start.dp is None or start.world % (fitting * pp * cp) == 0
        works.append(f"parallel.tp={fitting}" + ("" if whole else f" with launch.nproc={ranks}"))
    return f"parallel.tp={tp} does not go with {', '.join(uneven)}: {', or '.join(works)} does"


@REFUSALS.entry(
    "context parallelism by heads",
    "parallel.context=ulysses with parallel.cp that does not divide the query heads of a tensor-parallel rank, or that "
    "neither divides its kv heads nor is a multiple of them",
    "every rank takes equally many heads of all tokens",
)
def _ulysses(start: Start) -> str | None:
    wanted, model = start.config.parallel, start.config.model
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if wanted.context != "ulysses" or wanted.cp <= 1 or min(wanted.tp, heads, kv_heads) < 1 or heads % wanted.tp:
        return None
    heads, kv_heads = heads // wanted.tp, max(1, kv_heads // wanted.tp)
    if heads % wanted.cp == 0 and (kv_heads % wanted.cp == 0 or wanted.cp % kv_heads == 0):
        return None
    return (
        f"parallel.context=ulysses with parallel.cp={wanted.cp}: {heads} query heads and {kv_heads} kv heads of a rank "
        "do not divide: parallel.context=gather works"
    )


@REFUSALS.entry("stages", "more pipeline stages than layers", "a stage holds at least one layer")
def _stages(start: Start) -> str | None:
    wanted, layers = start.config.parallel, start.config.model.num_hidden_layers
    stages = wanted.pp * wanted.stages_per_rank
    if stages <= max(layers, 1):
        return None
    pp = max(1, layers // wanted.stages_per_rank)
    ranks = start.world // wanted.pp * pp  # as many replicas as now
    advice = f"parallel.pp={pp} with launch.nproc={ranks}"
    if wanted.stages_per_rank > layers:
        advice += " and parallel.schedule=1f1b and parallel.stages_per_rank=1"
    return (
        f"parallel.pp={wanted.pp} x parallel.stages_per_rank={wanted.stages_per_rank} are {stages} stages for "
        f"model.num_hidden_layers={layers}: {advice} does"
    )


@REFUSALS.entry(
    "query groups",
    "model.num_attention_heads that is no multiple of model.num_key_value_heads",
    "query heads share kv heads evenly",
)
def _query_groups(start: Start) -> str | None:
    heads, kv_heads = start.config.model.num_attention_heads, start.config.model.num_key_value_heads
    if not kv_heads or min(heads, kv_heads) < 1 or heads % kv_heads == 0:
        return None
    return (
        f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads={heads}: "
        f"model.num_key_value_heads={either(around(kv_heads, divisors(heads)))} does"
    )


@REFUSALS.entry(
    "width of a head",
    "model.hidden_size that does not split into heads of an even width, with head_dim null",
    "rotary embeddings rotate pairs of channels",
)
def _head_width(start: Start) -> str | None:
    model = start.config.model
    heads = model.num_attention_heads
    if model.head_dim is not None or model.kv_lora_rank is not None or min(heads, model.hidden_size) < 1:
        return None
    if model.hidden_size % (2 * heads) == 0:
        return None
    return (
        f"model.hidden_size={model.hidden_size} does not split into num_attention_heads={heads} of an even width: "
        f"model.hidden_size={either(multiples_around(model.hidden_size, 2 * heads))} does, or set model.head_dim"
    )


@REFUSALS.entry(
    "rotary scaling",
    "values of model.rope_parameters that its rope_type lacks or does not use",
    "another model would be trained than the one described",
)
def _scaling_without_a_use(start: Start) -> str | None:
    rope = start.config.model.rope_parameters
    needed = _NEEDED.get(rope.rope_type)  # an unknown one has a separate message
    if needed is None:
        return None
    known = (*needed, *(_OF_YARN if rope.rope_type == "yarn" else ()))
    unused = [key for key in _SCALING if key not in known and getattr(rope, key) is not None]
    if unused:
        shown = ", ".join(f"{key}={getattr(rope, key)}" for key in unused)
        without = " ".join(f"model.rope_parameters.{key}=null" for key in unused)
        words = " ".join(["model.rope_parameters.rope_type=llama3", *_published(rope, "llama3")])
        return (
            f"model.rope_parameters: {shown} have no effect with rope_type={rope.rope_type}: {without} works, or as "
            f"Llama 3.1 {words}"
        )
    missing = [key for key in needed if getattr(rope, key) is None]
    if missing:
        words, kind = " ".join(_published(rope, rope.rope_type)), rope.rope_type
        return f"model.rope_parameters: rope_type={kind} needs {', '.join(missing)}; {_PUBLISHED[kind]} has {words}"
    return None


def _published(rope: RopeParameters, kind: str) -> list[str]:
    """The settings of a published model, for the keys that are not set."""
    values = _NEEDED[kind].items()
    return [f"model.rope_parameters.{key}={value}" for key, value in values if getattr(rope, key) is None]


@REFUSALS.entry(
    "context extension",
    "model.rope_parameters whose frequency factors are not in order",
    "the scaling divides by their difference",
)
def _frequency_factors(start: Start) -> str | None:
    rope: RopeParameters = start.config.model.rope_parameters
    slow, fast = rope.beta_slow or SLOW, rope.beta_fast or FAST
    if rope.rope_type == "yarn" and slow >= fast > 0:
        return (
            f"model.rope_parameters: beta_slow={slow} must be below beta_fast={fast}: "
            "model.rope_parameters.beta_slow=null model.rope_parameters.beta_fast=null works"
        )
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if low is None or high is None or 0 < low < high:
        return None
    return (
        f"model.rope_parameters: low_freq_factor={low} must be above 0 and below high_freq_factor={high}; "
        "Llama 3.1 has model.rope_parameters.low_freq_factor=1.0 model.rope_parameters.high_freq_factor=4.0"
    )


@REFUSALS.entry(
    "layers without rotary embedding", "model.nope_layers with a number that no layer has", "it would have no effect"
)
def _nope_layers(start: Start) -> str | None:
    layers, nope = start.config.model.num_hidden_layers, start.config.model.nope_layers
    foreign = [number for number in nope if not 0 <= number < layers]
    if not foreign:
        return None
    return (
        f"model.nope_layers={nope}: there is no layer {foreign[0]}, layers are 0 to {layers - 1}: "
        f"model.nope_layers={[number for number in nope if number not in foreign]} works"
    )


@REFUSALS.entry(
    "span of no norm", "model.qk_norm_over=projection with model.qk_norm=false", "there is no norm that it changes"
)
def _span_of_no_norm(start: Start) -> str | None:
    model = start.config.model
    if model.qk_norm or model.qk_norm_over == "head":
        return None
    return f"model.qk_norm_over={model.qk_norm_over} with model.qk_norm=false: model.qk_norm=true works"


@REFUSALS.entry("settings of no adapter", "keys of the adapter section with adapter=none", "they would have no effect")
def _settings_of_no_adapter(start: Start) -> str | None:
    adapter, default = start.config.adapter, AdapterConfig()
    if adapter.name != default.name:
        return None
    changed = [f"adapter.{key}={value}" for key, value in vars(adapter).items() if value != getattr(default, key)]
    if not changed:
        return None
    return f"{', '.join(changed)} with adapter=none: adapter=lora trains an adapter"


@REFUSALS.entry(
    "frozen parameters of an adapter run", "model.freeze with an adapter", "an adapter freezes the whole model already"
)
def _frozen_with_adapter(start: Start) -> str | None:
    freeze, adapter = start.config.model.freeze, start.config.adapter
    if not freeze or adapter.name == "none":
        return None
    return (
        f"model.freeze={freeze} with adapter={adapter.name}, which trains nothing of the model but "
        "adapter.modules_to_save: model.freeze=[] works, or adapter=none"
    )


@REFUSALS.entry("a base to keep", "adapter.keep_base without model.init_from", "there are no weights to keep")
def _base_to_keep(start: Start) -> str | None:
    if not start.config.adapter.keep_base or start.config.model.init_from is not None:
        return None
    return "adapter.keep_base=true without model.init_from: adapter.keep_base=false works"


@REFUSALS.entry(
    "packed bases",
    "adapter.base=nf4 with adapter=dora or precision=fp8",
    "lengths of rows, and float8, need the weights themselves",
)
def _packed_base(start: Start) -> str | None:
    adapter, precision = start.config.adapter, start.config.precision
    if adapter.base is None or adapter.name == "none" or (adapter.name != "dora" and precision != "fp8"):
        return None
    works = [
        *(["adapter=lora"] if adapter.name == "dora" else []),
        *(["precision=bf16"] if precision == "fp8" else []),
    ]
    return (
        f"adapter.base={adapter.base} with adapter={adapter.name} and precision={precision}: {' and '.join(works)} "
        "works, or adapter.base=null"
    )


@REFUSALS.entry(
    "dropout of DoRA",
    "adapter.dropout with adapter=dora",
    "peft applies its dropout to the base's share too, by a second product with each weight",
)
def _dropout_of_dora(start: Start) -> str | None:
    adapter = start.config.adapter
    if adapter.name != "dora" or not adapter.dropout:
        return None
    return f"adapter.dropout={adapter.dropout} with adapter=dora: adapter.dropout=0 works, or adapter=lora"


@REFUSALS.entry(
    "DoRA under DeepSpeed",
    "adapter=dora with parallel.engine=deepspeed in another precision than fp32",
    "lengths of rows compute in fp32, and DeepSpeed keeps parameters of one dtype, flattened together",
)
def _dora_under_deepspeed(start: Start) -> str | None:
    precision = start.config.precision
    if start.config.adapter.name != "dora" or start.config.parallel.engine != "deepspeed" or precision == "fp32":
        return None
    return (
        f"adapter=dora with parallel.engine=deepspeed and precision={precision}: parallel.engine=fsdp works, or "
        "adapter=lora, or precision=fp32"
    )
