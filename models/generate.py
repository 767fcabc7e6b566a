"""Sampling one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from stoker.models.cache import Cache


def generate(
    model: nn.Module,
    prompt: list[int],
    *,
    limit: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int = 0,
    stop: Collection[int] = (),
    context: int,
) -> Iterator[int]:
    """The tokens with which `model` continues `prompt`, each as soon as it is sampled.

    At most `limit` of them, none after one of the tokens `stop`, which is not yielded. `greedy` takes the likeliest;
    else one is drawn with `seed` from the `top_k` likeliest, cut down to the smallest set whose probability reaches
    `top_p`. The model gets at most `context` tokens; when they are full, it continues from the last half of them.

    Raises ValueError, before any token, for values out of range and for a model that lacks `next_logits`.
    """
    if not hasattr(model, "next_logits"):
        raise ValueError(
            f"{type(model).__name__} cannot generate: it has no next_logits(tokens, cache), as models.decoder has"
        )
    if not prompt:
        raise ValueError("the prompt is empty: at least one token is needed to continue from")
    if limit < 0:
        raise ValueError(f"limit={limit}: the number of tokens to generate cannot be negative")
    if context < 2:
        raise ValueError(f"context={context}: the model needs at least 2 tokens")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: has to be above 0 (for the likeliest tokens use greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: at least 1 token has to be kept")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: has to be above 0 and at most 1")

    def choose(logits: Tensor) -> int:
        if greedy:
            return int(logits.argmax())
        return int(torch.multinomial(_probabilities(logits, temperature, top_k, top_p), 1, generator=generator))

    def stream() -> Iterator[int]:
        tokens = prompt[-context:]
        unseen, cache = tokens, Cache(context)
        for _ in range(limit):
            if cache.length + len(unseen) > context:
                tokens = tokens[-(context // 2) :]
                unseen, cache = tokens, Cache(context)
            with torch.inference_mode():
                logits = model.next_logits(torch.tensor([unseen], device=device), cache)  # type: ignore[operator]
            token = choose(logits[0].cpu())
            if token in stop:
                return
            yield token
            unseen = [token]
            tokens = [*tokens, token]

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    return stream()


def _probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The distribution to draw from, `[vocab]`; it need not sum to 1."""
    probabilities = (logits / temperature).softmax(-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        ranked[top_k:] = 0.0
    if top_p is not None:
        ranked = ranked / ranked.sum()
        reached_before = ranked.cumsum(-1) - ranked >= top_p
        ranked[reached_before] = 0.0
    return torch.zeros_like(probabilities).scatter_(0, order, ranked)
