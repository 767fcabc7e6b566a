"""Facts that a run finds when it opens its data, kept beside the settled config, which does not change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from stoker.conf.schema import Config
from stoker.data import vocabulary


@dataclass(frozen=True)
class Facts:
    """The values of the keys that a config may leave open."""

    vocab_size: int  # `model.vocab_size`
    document_mask: bool  # `data.document_mask`

    def complete(self, config: Config) -> Config:
        """`config` with these keys set: the input for models and engines."""
        model = dataclasses.replace(config.model, vocab_size=self.vocab_size)
        data = dataclasses.replace(config.data, document_mask=self.document_mask)
        return dataclasses.replace(config, model=model, data=data)


def vocabulary_of(config: Config, kept: Path | None = None) -> int:
    """The token ids of the model: the tokenizer's, or `model.vocab_size` if that is larger.

    `kept`: the folder in which a run keeps its tokenizer. Raises ValueError for a `model.vocab_size` below the
    tokenizer's.
    """
    needed, given = vocabulary(config, kept), config.model.vocab_size
    if given is not None and given < needed:
        raise ValueError(f"model.vocab_size={given}, but the tokenizer has {needed} tokens")
    return given or needed


def with_vocabulary(config: Config, kept: Path | None = None) -> Config:
    """`config` with `model.vocab_size` set, for commands that build a model and open no data."""
    model = dataclasses.replace(config.model, vocab_size=vocabulary_of(config, kept))
    return dataclasses.replace(config, model=model)
