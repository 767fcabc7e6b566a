"""The first number that is not finite is found in what a model computes, not in a mask, whose infinities are meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stoker.trainer.replay import FirstNotFinite


class Mask(nn.Module):
    def forward(self, documents: Tensor) -> Tensor:
        other = documents[:, None] != documents[None, :]
        return torch.zeros(other.shape).masked_fill(other, -torch.inf)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask, self.linear, self.scores = Mask(), nn.Linear(4, 4), Scores()

    def forward(self, x: Tensor, broken: bool) -> Tensor:
        attention = self.mask(torch.tensor([0, 0, 1, 1])).softmax(-1) @ self.linear(x)
        return self.scores(attention) if broken else attention


@pytest.mark.parametrize(("broken", "found"), [(False, None), (True, "scores (micro-batch 1)")])
def test_infinities_of_a_mask_are_meant(broken: bool, found: str | None) -> None:
    with FirstNotFinite() as watch:
        Model()(torch.ones(4, 4), broken)
    assert watch.output == found


def test_a_weight_that_is_not_finite_is_found_though_the_module_is_given_integers() -> None:
    embedding = nn.Embedding(2, 4)
    with torch.no_grad():
        embedding.weight[1] = torch.nan
    with FirstNotFinite() as watch:
        embedding(torch.tensor([1]))
    assert watch.output is not None
