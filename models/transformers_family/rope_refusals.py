"""Rotary embeddings of transformers' models that go by the longest document of whatever is computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stoker.models.transformers_family.anatomy import parsed_config
from stoker.models.transformers_family.refusals import REFUSALS, is_masked
from stoker.models.transformers_family.values import values_of
from stoker.parallel.start import Start


@REFUSALS.entry(
    "rotary factors of a batch",
    "a model of transformers with rope_type=longrope and seq_len above its original_max_position_embeddings, with "
    "documents apart or parallel.cp above 1",
    "its class chooses the factors by the highest position of a micro-batch, which depends on the layout",
)
def _factors_of_a_batch(start: Start) -> str | None:
    try:
        config = parsed_config(values_of(start.config.model)).get_text_config()
    except ValueError:
        return None  # another refusal names it
    seq_len, cp = start.config.seq_len, start.config.parallel.cp
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        limit = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        if limit is None or seq_len <= limit:
            continue
        words = [
            *(["data.document_mask=false"] if is_masked(start) else []),
            *([f"parallel.cp=1 (now {cp})"] if cp > 1 else []),
        ]
        if words:
            return (
                f"seq_len={seq_len} with rope_type=longrope: above {limit} positions its factors go by the longest "
                f"document of a micro-batch: seq_len={limit} works, or {' with '.join(words)}"
            )
    return None


def _ropes(given: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings of a config: one, or one for each kind of layer."""
    if not isinstance(given, Mapping):
        return
    yield given
    yield from (value for value in given.values() if isinstance(value, Mapping))
