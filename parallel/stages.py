"""Which layers a pipeline stage holds and which stages a rank: arithmetic on the costs of a model's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from stoker.parallel.model import ParallelizableModel, Part

# An embedding does no arithmetic, but its gradient, as large as a head's matrix, is written for every micro-batch.
EMBEDDING_SHARE = 0.05


@dataclass(frozen=True)
class Costs:
    """The relative time that one micro-batch takes in each layer, before them and after them."""

    layers: tuple[float, ...]
    embedding: float
    head: float


def costs_of(
    whole: ParallelizableModel,
    build: Callable[[Part], nn.Module],
    layer_cost: Callable[[nn.Module], float] | None = None,
) -> Costs:
    """Costs by counting parameters: each takes part in one multiplication per token, forward and twice backward.

    `whole` is the uncut model and `build` makes a part of it, both on the meta device. What the parts with embedding
    and head hold beside their layers is what comes before and after; so tied embeddings count where they are used.
    `layer_cost` counts a layer in another way.
    """
    layers = [_numel(block) for block in whole.blocks().values()]
    first = build(Part(range(1), embedding=True, head=False))
    last = build(Part(range(len(layers) - 1, len(layers)), embedding=False, head=True))
    costs = tuple(map(layer_cost, whole.blocks().values())) if layer_cost is not None else tuple(layers)
    return Costs(costs, EMBEDDING_SHARE * (_numel(first) - layers[0]), _numel(last) - layers[-1])


def parts(costs: Costs, stages: int) -> list[Part]:
    """The model cut into `stages`, in the order of the pipeline. Raises ValueError for more stages than layers."""
    return [
        Part(layers, embedding=number == 0, head=number == stages - 1)
        for number, layers in enumerate(split_layers(costs.layers, costs.embedding, costs.head, stages))
    ]


def split_layers(costs: Sequence[float], embedding: float, head: float, stages: int) -> list[range]:
    """Cut layers of these costs into contiguous ranges, one or more layers each, so that the largest is least.

    `embedding` comes on top of the first, `head` on top of the last. Among the equally good the most even cut is
    taken (least sum of squares), then the one with fewer layers early: a stage keeps the activations of as many
    micro-batches as stages come after it. Raises ValueError for more stages than layers.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{stages} pipeline stages for a model of {layers} layers: 1 to {layers} stages work")
    exact = _as_integers([*costs, embedding, head])
    weights, (before, after) = exact[:-2], exact[-2:]
    weights[0] += before
    weights[-1] += after
    limit = _least_limit(weights, stages)
    # The best way to cut the first so many layers: sum of squares, layers whose activations wait, where stages end
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for waiting in range(stages, 0, -1):
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (squares, kept, ends) in best.items():
            cost = 0
            for end in range(start + 1, layers + 1):
                cost += weights[end - 1]
                if cost > limit:
                    break
                candidate = squares + cost**2, kept + (end - start) * waiting, (*ends, end)
                longer[end] = min(candidate, longer.get(end, candidate))
        best = longer
    ends = best[layers][2]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def stages_of(pp: int, pp_size: int, stages_per_rank: int) -> list[int]:
    """The stages of the rank at `pp`: stage `pp` and every `ranks`-th stage after it."""
    return [pp + turn * pp_size for turn in range(stages_per_rank)]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _as_integers(values: Sequence[float]) -> list[int]:
    """`values` in a common unit in which they are whole, so that sums do not depend on the order."""
    fractions = [Fraction(value) for value in values]
    unit = max(fraction.denominator for fraction in fractions)  # of floats: a power of two
    assert min(fractions) >= 0
    return [int(fraction * unit) for fraction in fractions]


def _least_limit(weights: Sequence[int], stages: int) -> int:
    """The least sum that no stage need exceed."""
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if _stages_within(weights, middle) <= stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_within(weights: Sequence[int], limit: int) -> int:
    """How few stages hold all layers when none may exceed `limit`."""
    stages, room = 0, 0
    for weight in weights:
        if not stages or weight > room:
            stages, room = stages + 1, limit
        room -= weight
    return stages
