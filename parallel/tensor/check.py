"""Whether a model that is cut enters and leaves its regions as it must: found in its autograd graph, before any step.

A region that is entered and never left, or an unmarked replicated layer inside one, changes no loss: the ranks compute
the same twice, and gradients are too large or too small by the number of ranks. But the graph of one forward on the
meta device contains every path from a parameter to the output. Outputs lie outside all regions; going back
from them, what leaves a region leads inside, what enters one leads outside, and every parameter must be found on its
own side.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stoker.parallel.registry import Registry
from stoker.parallel.tensor.regions import ENTERS, LEAVES

LAYERS = "the layers of stoker.parallel.tensor.layers"


def refuse_open_regions(model: nn.Module, registry: Registry, output: Tensor, x: Tensor | None) -> None:
    """Raises ValueError, naming a parameter or module, where `output` of the cut `model` shows a region left open.

    `x` are the activations that the model was called with, None for tokens. `output` has its graph; `registry` marks
    the parameters that belong inside.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    walk: list[tuple[Any, bool, str | None]] = [(output.grad_fn, False, None)]  # node, inside?, last parameter's name
    seen: set[tuple[Any, bool]] = set()
    while walk:
        node, inside, near = walk.pop()
        if node is None or (node, inside) in seen:
            continue
        seen.add((node, inside))
        border = getattr(node, "border", None)
        if border in (ENTERS, LEAVES) and (border == LEAVES) == inside:
            raise ValueError(_crossing(model, border, near))
        inside = inside if border is None else border == LEAVES
        following = [child for child, _ in node.next_functions if child is not None]
        for leaf in [child.variable for child in following if hasattr(child, "variable")]:
            if leaf is x and inside:
                raise ValueError(
                    f"{_kind(model)} uses its input inside a region without CopyToTensorParallel; parallel.tp=1 works"
                )
            if leaf in names:
                _check_side(names[leaf], registry, inside)
                near = names[leaf]
        walk += [(child, inside, near) for child in following]


def _check_side(name: str, registry: Registry, inside: bool) -> None:
    entry = registry.entries[name]
    if inside and not entry.inside:
        raise ValueError(
            f"{name} is used inside a tensor-parallel region, where each rank has a share of the channels, and its "
            f"gradient is not summed over them: make its layer one of {LAYERS}, or mix in ReplicatedInTensorParallel; "
            "parallel.tp=1 works"
        )
    if entry.inside and not inside:
        raise ValueError(
            f"{name} is cut over tensor-parallel ranks, but what it computes is used without being summed over them: "
            f"a RowLinear (or `leave`) must end the region; parallel.tp=1 works"
        )


def _crossing(model: nn.Module, border: str, near: str | None) -> str:
    where = f"{_kind(model)}, before {near}" if near else _kind(model)
    if border == ENTERS:
        return (
            f"{where}: a tensor-parallel region is entered (CopyToTensorParallel) and never left, or entered twice: "
            "every rank computes the same, and gradients are summed once too often; end it by a RowLinear (or "
            "`leave`), "
            "or remove CopyToTensorParallel; parallel.tp=1 works"
        )
    return (
        f"{where}: a tensor-parallel layer takes its input without CopyToTensorParallel, so that its gradient is not "
        "summed over the ranks; parallel.tp=1 works"
    )


def _kind(model: nn.Module) -> str:
    return type(model).__name__
