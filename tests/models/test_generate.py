"""Generation: the same tokens as without a cache, and correct sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stoker.models.cache import Cache
from stoker.models.decoder import Decoder
from stoker.models.generate import generate
from tests.models.tiny import decoder, shape


def recomputed(model: Decoder, prompt: list[int], limit: int) -> list[int]:
    """Greedy tokens, each from a forward pass over everything before it."""
    tokens = list(prompt)
    for _ in range(limit):
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_word_embeddings": True, "num_key_value_heads": None}])
def test_greedy_with_a_cache_is_greedy_without_one(changes: dict[str, Any]) -> None:
    model = decoder(shape(**changes), seed=2)
    prompt = [5, 17, 40, 2]
    tokens = list(generate(model, prompt, limit=30, greedy=True, context=64))
    assert len(set(tokens)) > 5, "a model that repeats itself proves little"
    assert tokens == recomputed(model, prompt, 30)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_tokens_fed_in_pieces_give_the_logits_of_one_pass_in_every_row(dtype: torch.dtype, tolerance: float) -> None:
    model = decoder(shape()).to(dtype)
    tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = Cache(12)
    for piece in tokens.split([5, 1, 4, 2], 1):
        logits = model.next_logits(piece, cache)
    whole = model(tokens, torch.arange(12).expand(2, 12), None).view(2, 12, -1)
    torch.testing.assert_close(logits, whole[:, -1], rtol=tolerance, atol=tolerance)


def test_a_full_context_continues_from_its_last_half() -> None:
    model = decoder(shape(), seed=2)
    prompt = [5, 17, 40, 2]
    tokens = list(generate(model, prompt, limit=14, greedy=True, context=8))
    seen = recomputed(model, prompt, 5)
    assert tokens[:5] == seen, "until 8 tokens are seen"
    assert tokens[5:10] == recomputed(model, (prompt + seen)[-4:], 5)
    assert len(tokens) == 14


def test_a_prompt_longer_than_the_context_is_seen_from_its_end() -> None:
    model = decoder(shape(), seed=2)
    prompt = list(range(20))
    assert list(generate(model, prompt, limit=1, greedy=True, context=8)) == recomputed(model, prompt[-8:], 1)


def test_a_seed_repeats_itself_and_another_differs() -> None:
    model = decoder(shape())

    def sample(seed: int) -> list[int]:
        return list(generate(model, [1], limit=20, seed=seed, context=32))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generation_ends_at_the_stop_token_without_giving_it_out() -> None:
    model = decoder(shape(), seed=2)
    tokens = list(generate(model, [5, 17], limit=12, greedy=True, context=32))
    stop = tokens[6]
    expected = tokens[: tokens.index(stop)]
    assert list(generate(model, [5, 17], limit=12, greedy=True, context=32, stop=[stop])) == expected


class Fixed(nn.Module):
    """Always the same next-token probabilities."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def next_logits(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self.logits[None]


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.45}, {1, 3}),
        ({"top_p": 0.75}, {1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),
        ({"temperature": 0.01}, {1}),
        ({"greedy": True}, {1}),
    ],
)
def test_sampling_draws_from_the_tokens_of_top_k_and_top_p(options: dict[str, Any], possible: set[int]) -> None:
    model = Fixed([0.1, 0.41, 0.19, 0.3])
    assert set(generate(model, [0], limit=300, context=1000, **options)) == possible


def test_sampling_follows_the_probabilities_and_the_temperature() -> None:
    model = Fixed([0.2, 0.8])
    ones = sum(generate(model, [0], limit=3000, context=10000))
    assert ones / 3000 == pytest.approx(0.8, abs=0.03)
    cooler = sum(generate(model, [0], limit=3000, context=10000, temperature=0.5))
    assert cooler / 3000 == pytest.approx(0.64 / 0.68, abs=0.03)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": []}, "prompt"),
        ({"limit": -1}, "limit=-1"),
        ({"context": 1}, "context=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"model": nn.Linear(1, 1)}, "Linear cannot generate"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_first_token(options: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"model": Fixed([0.5, 0.5]), "prompt": [0], "limit": 1, "context": 8}
    with pytest.raises(ValueError, match=says) as error:
        generate(**(arguments | options))
    assert "\n" not in str(error.value)
