"""Few layers and micro-batches stand for all: what is extrapolated is what a rehearsal of every one finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stoker.conf.schema import BatchConfig, Config
from stoker.parallel.layout import layout_of
from stoker.trainer.rehearsal import Rehearsal, rehearse
from stoker.trainer.rehearsal.extrapolate import NotAlikeError, more_layers
from stoker.trainer.rehearsal.layers import kinds_of, shortened
from stoker.trainer.rehearsal.memory import Category, Mark, Peak, Span
from tests.extent import some
from tests.trainer.rehearsed import config_of


def deep(layers: int, rows: int = 32, **changes: object) -> Config:
    config = config_of("bf16", seq_len=32, layers=layers, **changes)
    config.batch = BatchConfig(size=rows, micro_size=16)
    return config


def unlike(config: Config, ranks: int, rank: int) -> list[str]:
    """What the two kinds of rehearsal of a rank do not agree on."""
    layout = layout_of(config, ranks)
    few, every = (rehearse(config, layout, rank, "cuda", every=every) for every in (False, True))
    found = [name for name in ("step", "evaluation", "held", "passes", "update") if not _same(few, every, name)]
    if abs(few.build.bytes / every.build.bytes - 1) > 0.005:
        found.append(f"build {few.build.bytes:,} of {every.build.bytes:,}")
    if abs(few.staged / every.staged - 1) > 0.001:  # tensors begin at round places of a file
        found.append(f"staged {few.staged:,} of {every.staged:,}")
    return found


def _same(few: Rehearsal, every: Rehearsal, name: str) -> bool:
    one, other = getattr(few, name), getattr(every, name)
    if isinstance(one, Peak):
        return one.bytes == other.bytes and one.categories == other.categories
    return bool(one == other)


@pytest.mark.long
def test_a_deep_model_needs_to_the_byte_what_is_extrapolated_from_two_and_three_layers() -> None:
    assert unlike(deep(7, zero=3), 2, 1) == []


LONG = [
    (1, 0, {"zero": 0}),
    (2, 0, {"zero": 1}),
    (2, 1, {"tp": 2, "zero": 0}),
    (2, 1, {"zero": 3, "activation_checkpointing": "full"}),
    (2, 0, {"zero": 2, "activation_checkpointing": "selective"}),
    (4, 0, {"zero": 3, "dp_replicate": 2}),
    (2, 0, {"pp": 2, "zero": 0, "layers": 13}),
    (2, 1, {"pp": 2, "zero": 0, "schedule": "gpipe", "layers": 13}),
    (2, 1, {"pp": 2, "zero": 0, "schedule": "interleaved", "stages_per_rank": 2, "layers": 25}),
    (2, 0, {"pp": 2, "zero": 0, "rows": 144}),
    (1, 0, {"zero": 0, "offload": "cpu"}),
    (2, 0, {"pp": 2, "zero": 0, "schedule": "gpipe", "rows": 144}),
    (2, 1, {"pp": 2, "zero": 0, "schedule": "interleaved", "stages_per_rank": 2, "layers": 4, "rows": 192}),
    (1, 0, {"zero": 0, "document_mask": True}),
]


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "rank", "changes"), some(LONG, 6), ids=str)
def test_extrapolated_is_rehearsed_on_every_layout(ranks: int, rank: int, changes: dict[str, object]) -> None:
    changes = dict(changes)
    layers, rows = changes.pop("layers", 3 if "rows" in changes else 7), changes.pop("rows", 32)
    assert isinstance(layers, int) and isinstance(rows, int)
    assert unlike(deep(layers, rows, **changes), ranks, rank) == []


def test_layers_of_a_pattern_are_left_out_by_whole_periods_and_odd_ones_at_the_beginning_stay() -> None:
    config = deep(30, zero=0)
    config.model = replace(config.model, nope_layers=[0, *range(5, 30, 4)])  # at 5, 9, ..., 29; and the first
    short = shortened(config, layout_of(config, 1), 0)
    assert short is not None and short.period == 4
    (shorter,), (longer,) = short.shorter, short.longer
    assert (30 - len(longer.layers)) == 4 * short.missing and len(longer.layers) - len(shorter.layers) == 4
    assert len(shorter.layers) >= 2 * 4 + 1 and shorter.embedding and shorter.head


def test_single_layers_with_settings_of_their_own_are_all_rehearsed() -> None:
    config = deep(12, zero=0)
    config.fp32_modules = ["layers.3"]
    assert shortened(config, layout_of(config, 1), 0) is None
    assert shortened(deep(3, zero=0), layout_of(config, 1), 0) is None, "as fast as two rehearsals"


class Toy(nn.Module):
    def __init__(self, number: int, width: int = 4, rule: object = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.number, self.rule = number, rule


def test_blocks_are_alike_but_for_their_number_and_unlike_by_shape_training_or_attributes() -> None:
    def kinds(*blocks: Toy) -> list[bool]:
        found = kinds_of(blocks)
        return [kind == found[0] for kind in found]

    rule = object()
    frozen = Toy(3).requires_grad_(False)
    assert kinds(Toy(0), Toy(1), Toy(2), frozen) == [True, True, True, False]
    assert kinds(Toy(0), Toy(1, width=5)) == [True, False]
    assert kinds(Toy(0, rule=rule), Toy(1, rule=rule), Toy(2, rule=torch.relu)) == [True, True, False]
    assert kinds(Toy(0), Toy(7), Toy(2)) == [True, False, False], "what is no number of the layer counts"


def test_other_marks_in_the_longer_rehearsal_are_not_extrapolated() -> None:
    def span(block: int, size: int) -> Span:
        return Span(Mark("forward", 0, block), Peak(size, "forward", {Category.OTHER: size}))

    shorter = [span(0, 10), span(1, 20), span(2, 5)]
    longer = [span(0, 10), span(1, 20), span(2, 30), span(3, 6)]
    made = more_layers(shorter, longer, 1, {0: 1}, 2)
    assert [each.peak.bytes for each in made] == [10, 20, 30, 40, 50, 8]
    with pytest.raises(NotAlikeError):
        more_layers(shorter[:-1], longer, 1, {0: 1}, 2)
    with pytest.raises(NotAlikeError):
        more_layers([*shorter, span(0, 1)], longer, 1, {0: 1}, 2)
