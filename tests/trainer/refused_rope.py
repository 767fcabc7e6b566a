"""What values of `model.rope_parameters` are refused with: entries for the table of `test_refusals`."""

from __future__ import annotations

LLAMA3 = [
    f"model.rope_parameters.{value}"
    for value in (
        "rope_type=llama3",
        "factor=8",
        "low_freq_factor=1",
        "high_freq_factor=4",
        "original_max_position_embeddings=8192",
    )
]

YARN = [
    f"model.rope_parameters.{value}"
    for value in ("rope_type=yarn", "factor=40", "original_max_position_embeddings=4096")
]

LONGROPE = [
    f"model.rope_parameters.{value}"
    for value in (
        "rope_type=longrope",
        "short_factor=[1.0,2.0]",
        "attention_factor=1.1",
        "original_max_position_embeddings=64",
    )
]

OF_ROPE: dict[str, list[tuple[list[str], int, int, str]]] = {
    "rotary scaling": [
        (
            ["model.rope_parameters.factor=8"],
            1,
            0,
            "factor=8 have no effect with rope_type=default: model.rope_parameters.factor=null works, or",
        ),
        (
            LLAMA3[:2],
            1,
            0,
            "rope_type=llama3 needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        (YARN[:2], 1, 0, "DeepSeek-V3 has model.rope_parameters.original_max_position_embeddings=4096"),
        ([*YARN, "model.rope_parameters.low_freq_factor=1"], 1, 0, "have no effect with rope_type=yarn"),
    ],
    "context extension": [
        (
            [*YARN, "model.rope_parameters.beta_slow=32"],
            1,
            0,
            "beta_slow=32 must be below beta_fast=32.0: model.rope_parameters.beta_slow=null",
        ),
        (
            [*LLAMA3, "model.rope_parameters.low_freq_factor=4"],
            1,
            0,
            "low_freq_factor=4 must be above 0 and below high_freq_factor=4",
        ),
    ],
}
