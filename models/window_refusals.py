"""Settings of windows, rotary channels, activations and norms that do not go together, with what works."""

from __future__ import annotations

from stoker.models.attention import rotary_channels
from stoker.models.hugging_face_families import family_of, is_fused
from stoker.models.latent_refusals import REFUSALS
from stoker.parallel.start import Start


@REFUSALS.entry(
    "windows of attention",
    "model.full_attention_layers or sliding_rope_theta with model.sliding_window=null, or full_attention_layers with a "
    "number that no layer has",
    "they would have no effect",
)
def _windows(start: Start) -> str | None:
    model = start.config.model
    if model.sliding_window is None:
        given = {"full_attention_layers": model.full_attention_layers, "sliding_rope_theta": model.sliding_rope_theta}
        given = {key: value for key, value in given.items() if value}
        shown = ", ".join(f"model.{key}={value}" for key, value in given.items())
        return f"{shown} with model.sliding_window=null: model.sliding_window=1024 has windows" if given else None
    layers, full = model.num_hidden_layers, model.full_attention_layers
    foreign = [number for number in full if not 0 <= number < layers]
    if not foreign:
        return None
    return (
        f"model.full_attention_layers={full}: there is no layer {foreign[0]}, layers are 0 to {layers - 1}: "
        f"model.full_attention_layers={[number for number in full if number not in foreign]} works"
    )


@REFUSALS.entry(
    "rotary channels",
    "model.partial_rotary_factor that makes an odd number of a head's channels, or none",
    "rotary embeddings rotate pairs of channels",
)
def _rotary_channels(start: Start) -> str | None:
    model = start.config.model
    if min(model.num_attention_heads, model.hidden_size) < 1 or not 0 < model.partial_rotary_factor < 1:
        return None
    channels, heads = rotary_channels(model), model.head_dim or model.hidden_size // model.num_attention_heads
    if (channels and channels % 2 == 0) or heads < 2:
        return None
    return (
        f"model.partial_rotary_factor={model.partial_rotary_factor} of a head's {heads} channels are {channels}: "
        f"model.partial_rotary_factor={(channels + 1) / heads if channels else 2 / heads} makes an even number"
    )


@REFUSALS.entry(
    "factors of longrope",
    "model.rope_parameters.rope_type=longrope without as many values of short_factor as pairs of rotary channels, or "
    "with seq_len above original_max_position_embeddings; short_factor with another type",
    "each pair has a factor, and beyond the original context others are chosen by the longest document of a batch",
)
def _longrope(start: Start) -> str | None:
    model, rope = start.config.model, start.config.model.rope_parameters
    original, factors = rope.original_max_position_embeddings, rope.short_factor
    if rope.rope_type != "longrope":
        works = "model.rope_parameters.short_factor=[] works"
        return f"model.rope_parameters.short_factor with rope_type={rope.rope_type}: {works}" if factors else None
    if original is None or rope.attention_factor is None or min(model.num_attention_heads, model.hidden_size) < 1:
        return None
    pairs = rotary_channels(model) // 2
    if len(factors) != pairs:
        return (
            f"model.rope_parameters.short_factor has {len(factors)} values for {pairs} pairs of rotary channels, which "
            "model.init_from of a Phi-3 sets: "
            f"model.rope_parameters.short_factor=[{','.join(['1.0'] * pairs)}] works"
        )
    if start.config.seq_len <= original:
        return None
    native = " or model.native=false" if model.init_from is not None else ""
    return (
        f"seq_len={start.config.seq_len} with rope_type=longrope and original_max_position_embeddings={original}: "
        f"seq_len={original} works{native}"
    )


@REFUSALS.entry(
    "activation of experts",
    "model.hidden_act=gelu_pytorch_tanh with model.num_experts",
    "experts are SwiGLU networks",
)
def _activation_of_experts(start: Start) -> str | None:
    model = start.config.model
    if model.num_experts < 1 or model.hidden_act == "silu":
        return None
    return f"model.hidden_act={model.hidden_act} with {model.num_experts} experts: model.hidden_act=silu works"


@REFUSALS.entry(
    "norms of projections around zero",
    "model.zero_centered_norm with model.qk_norm_over=projection",
    "norms over whole projections have weights around one",
)
def _projections_around_zero(start: Start) -> str | None:
    model = start.config.model
    if not model.zero_centered_norm or model.qk_norm_over != "projection":
        return None
    return "model.zero_centered_norm=true with model.qk_norm_over=projection: model.qk_norm_over=head works"


@REFUSALS.entry(
    "adapters of fused projections",
    "an adapter with a decoder of the family phi3",
    "peft adapts its matrix of queries, keys and values as one, which the decoder holds apart, and the layers that "
    "divide it in transformers' modules take no adapter",
)
def _adapters_of_fused(start: Start) -> str | None:
    adapter, model = start.config.adapter, start.config.model
    if adapter.name == "none" or not is_fused(model):
        return None
    return f"adapter={adapter.name} with a model of the family {family_of(model)}: adapter=none works"
