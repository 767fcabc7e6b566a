"""Which tokens of a source train and which validate, where its documents do not decide that one by one.

By default each document falls on one side by its hash (`stoker.data.keys.is_validation`), and of token files without
splits the last documents validate. A source of one document has its last tokens for validation instead.
"""

from __future__ import annotations

import numpy as np

from stoker.conf.schema import DataConfig
from stoker.data.tokens import Array, Tokens, View, join

POSITION = "position"


def by_position(config: DataConfig, documents: int, whole_documents: bool) -> bool:
    """Whether the last tokens of a source validate, rather than some of its documents.

    `whole_documents`: its documents, such as conversations, are cut only if `data.validation_by` asks for it.
    """
    if not 0 < config.validation < 1:
        return False
    if config.validation_by is not None:
        return config.validation_by == POSITION
    return documents == 1 and not whole_documents


def part_by_position(whole: Tokens, split: str, share: float) -> Tokens:
    """The last `share` of the tokens for `validation`, those before for `train`. A document may be cut in two."""
    end = len(whole.ids)
    cut = end - int(end * share)
    begin, end = (0, cut) if split == "train" else (cut, end)
    starts = whole.starts[(whole.starts > begin) & (whole.starts < end)] - begin
    if end > begin:
        starts = np.concatenate([np.zeros(1, np.int64), starts])

    def part(values: Array) -> Array:
        return View(values, begin, end)

    learned, weights = (None if values is None else part(values) for values in (whole.learned, whole.weights))
    return Tokens(part(whole.ids), starts, learned, weights, whole.documents_together)


def joined(parts: list[Tokens]) -> Tokens:
    """The documents of all `parts`, one after the other."""
    held = [part for part in parts if len(part.ids)] or parts[:1]
    firsts = np.cumsum([0, *(len(part.ids) for part in held)])
    starts = np.concatenate([part.starts + first for part, first in zip(held, firsts, strict=False)])
    learned = [part.learned for part in held if part.learned is not None]
    weights = [part.weights for part in held if part.weights is not None]
    return Tokens(
        join([part.ids for part in held]),
        starts,
        join(learned) if learned else None,
        join(weights) if weights else None,
        parts[0].documents_together,
    )
