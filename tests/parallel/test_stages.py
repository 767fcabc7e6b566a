"""How layers are dealt to pipeline stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stoker.conf.schema import ModelConfig
from stoker.models import decoder
from stoker.parallel.model import Part, whole_model
from stoker.parallel.stages import EMBEDDING_SHARE, Costs, costs_of, parts, split_layers, stages_of

COST = st.floats(0, 1e12, allow_nan=False)
SPLITS = st.lists(COST, min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), COST, COST, st.integers(1, len(costs)))
)


def stage_costs(costs: list[float], embedding: float, head: float, ranges: list[range]) -> list[float]:
    extra = [0.0] * len(ranges)
    extra[0] += embedding
    extra[-1] += head
    return [sum(costs[n] for n in layers) + more for layers, more in zip(ranges, extra, strict=True)]


def every_split(layers: int, stages: int) -> list[list[range]]:
    return [
        [range(start, end) for start, end in itertools.pairwise((0, *cuts, layers))]
        for cuts in itertools.combinations(range(1, layers), stages - 1)
    ]


@given(SPLITS)
def test_stages_are_contiguous_hold_a_layer_each_and_all_together(case: tuple[list[float], float, float, int]) -> None:
    costs, embedding, head, stages = case
    ranges = split_layers(costs, embedding, head, stages)
    assert len(ranges) == stages and min(map(len, ranges)) >= 1
    assert [layer for layers in ranges for layer in layers] == list(range(len(costs)))


@given(SPLITS)
def test_no_other_split_has_a_smaller_largest_stage(case: tuple[list[float], float, float, int]) -> None:
    costs, embedding, head, stages = case
    best = max(stage_costs(costs, embedding, head, split_layers(costs, embedding, head, stages)))
    least = min(max(stage_costs(costs, embedding, head, split)) for split in every_split(len(costs), stages))
    assert best == pytest.approx(least, rel=1e-12)


@given(st.integers(1, 40), st.data())
def test_equal_layers_differ_by_one_at_most_and_the_early_stages_have_the_fewer(
    layers: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, layers))
    sizes = [len(held) for held in split_layers([7.0] * layers, 0, 0, stages)]
    assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 20))
def test_ranks_with_several_stages_of_equal_layers_hold_about_as_many(turns: int, ranks: int, more: int) -> None:
    ranges = split_layers([1.0] * (turns * ranks + more), 0, 0, turns * ranks)
    held = [sum(len(ranges[stage]) for stage in stages_of(rank, ranks, turns)) for rank in range(ranks)]
    assert max(held) - min(held) <= 1


@pytest.mark.parametrize(
    ("layers", "embedding", "head", "stages", "expected"),
    [
        (8, 0, 0, 3, [2, 3, 3]),
        (12, 0, 1.5, 4, [3, 3, 4, 2]),  # three of four could be the largest: the later, the fewer activations wait
        (8, 0, 8, 2, [7, 1]),
        (8, 0.1, 1, 2, [4, 4]),
        (9, 0.1, 1, 2, [5, 4]),
        (4, 0, 0, 4, [1, 1, 1, 1]),
        (4, 100, 100, 1, [4]),
    ],
)
def test_the_split_of_common_shapes(
    layers: int, embedding: float, head: float, stages: int, expected: list[int]
) -> None:
    assert [len(held) for held in split_layers([1.0] * layers, embedding, head, stages)] == expected


def test_one_large_layer_leaves_the_others_even() -> None:
    assert [len(held) for held in split_layers([9, 1, 1, 1, 1, 1, 1], 0, 0, 4)] == [1, 2, 2, 2]


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_layers_and_none_are_refused_with_what_works(stages: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} pipeline stages for a model of 3 layers: 1 to 3 stages work"):
        split_layers([1, 1, 1], 0, 0, stages)


@given(st.integers(1, 8), st.integers(1, 4))
def test_every_stage_is_on_one_rank_and_adjacent_stages_are_on_adjacent_ranks(ranks: int, turns: int) -> None:
    owner = {stage: rank for rank in range(ranks) for stage in stages_of(rank, ranks, turns)}
    assert [owner[stage] for stage in range(ranks * turns)] == list(range(ranks)) * turns


def test_embedding_and_head_are_on_the_first_and_the_last_part() -> None:
    found = parts(Costs((1.0, 1.0, 1.0), 0.1, 0.5), 2)
    assert found == [Part(range(2), embedding=True, head=False), Part(range(2, 3), embedding=False, head=True)]
    assert parts(Costs((1.0, 1.0), 0.1, 0.5), 1) == [whole_model(2)]


def on_meta(build: Callable[[Part], nn.Module]) -> Callable[[Part], nn.Module]:
    def build_on_meta(part: Part) -> nn.Module:
        with torch.device("meta"):
            return build(part)

    return build_on_meta


@pytest.mark.parametrize("tied", [False, True])
def test_costs_of_the_decoder_are_the_parameters_that_a_token_meets(tied: bool) -> None:
    config = ModelConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    build = on_meta(lambda part: decoder.build(config, part))
    found = costs_of(build(whole_model(3)), build)  # type: ignore[arg-type]
    block = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert found.layers == (block,) * 3
    assert found.embedding == pytest.approx(EMBEDDING_SHARE * 100 * 16)
    assert found.head == 100 * 16 + 16


class TheirModel(nn.Module):
    """A user's own, whose layers differ and which does not define its parts in the order in which it uses them."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.classifier = nn.Linear(6, 50) if part.head else None
        self.layers = nn.ModuleList(nn.Linear(6, 6 + number) for number in part.layers)
        self.words = nn.Embedding(50, 6) if part.embedding else None

    def blocks(self) -> dict[str, nn.Module]:
        return dict(self.layers.named_children())


def test_costs_of_a_users_model() -> None:
    build = on_meta(TheirModel)
    found = costs_of(build(whole_model(3)), build)  # type: ignore[arg-type]
    assert found.layers == (7 * 6, 7 * 7, 7 * 8)
    assert found.embedding == pytest.approx(EMBEDDING_SHARE * 50 * 6)
    assert found.head == 7 * 50
