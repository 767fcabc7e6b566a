"""The declared layer: only in one of its kind may a token of a sequence depend on another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stoker.parallel.sequence.axis import SequenceAxis


class SequenceLayer(nn.Module):
    """A layer in which the tokens of a sequence meet: with an axis it holds a share of them, else all.

    It gets activations and positions of this rank's tokens, which need not be neighbours, and exchanges what it needs
    by `stoker.parallel.sequence.regions`.
    """

    sequence: SequenceAxis | None = None  # None until the model is parallelized


def parallelize_sequence(model: nn.Module, stages: Sequence[nn.Module], axis: SequenceAxis) -> None:
    """Let the tokens of `stages` of the whole `model` meet over `axis`.

    Raises ValueError for a model without a declared layer.
    """
    if not any(isinstance(module, SequenceLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} cannot share sequences over {axis.size} context-parallel ranks: its tokens meet "
            "in no layer of stoker.parallel.sequence.SequenceLayer (such as stoker.models.attention.CoreAttention); "
            "parallel.cp=1 works"
        )
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, SequenceLayer):
                module.sequence = axis
