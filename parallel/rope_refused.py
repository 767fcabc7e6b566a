"""Rotary embeddings that the decoder cannot compute, for `stoker.parallel.refusals`."""

from __future__ import annotations

from stoker.conf.schema import RopeParameters
from stoker.parallel.start import Start

# What each rope_type needs beside rope_theta; nothing else may be set with it. (Llama 3.1's values, for the message.)
_NEEDED = {
    "default": {},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _scaling_without_a_use(start: Start) -> str | None:
    rope = start.config.model.rope_parameters
    needed = _NEEDED.get(rope.rope_type)  # an unknown one has a message of its own
    if not start.built_in_model or needed is None:
        return None
    unused = [f"{key}={getattr(rope, key)}" for key in _SCALING if key not in needed and getattr(rope, key) is not None]
    if unused:
        return (
            f"model.rope_parameters: {', '.join(unused)} have no effect with rope_type={rope.rope_type}: set "
            "model.rope_parameters.rope_type=llama3, or leave them null"
        )
    missing = [key for key in needed if getattr(rope, key) is None]
    if missing:
        words = " ".join(f"model.rope_parameters.{key}={needed[key]}" for key in missing)
        return f"model.rope_parameters: rope_type={rope.rope_type} needs {', '.join(missing)}; Llama 3.1 has {words}"
    return None


def _frequency_factors(start: Start) -> str | None:
    rope: RopeParameters = start.config.model.rope_parameters
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if not start.built_in_model or low is None or high is None or 0 < low < high:
        return None
    return (
        f"model.rope_parameters: low_freq_factor={low} must be above 0 and below high_freq_factor={high}; "
        "Llama 3.1 has 1 and 4"
    )


ENTRIES = (
    (
        "rotary scaling",
        "values of model.rope_parameters that its rope_type lacks or does not use",
        "another model would be trained than the one described",
        _scaling_without_a_use,
    ),
    (
        "context extension",
        "model.rope_parameters whose frequency factors are not in order",
        "it divides by their distance",
        _frequency_factors,
    ),
)
