"""Users' optimizers: some work on any part of a parameter, others need more and declare it, or do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) without bias correction: the step is as long as the whole parameter. Declares nothing."""

    def __init__(self, groups: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 0.1)
                state["square"].lerp_(parameter.grad.square(), 0.05)
                change = state["mean"] / (state["square"].sqrt() + 1e-6) + group["weight_decay"] * parameter
                ratio: Tensor | float = parameter.norm() / change.norm()
                parameter.sub_(change, alpha=float(group["lr"] * (ratio if bool(ratio > 0) else 1.0)))


class DeclaredLamb(Lamb):
    needs = "norms"


def muon(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """torch's Muon for matrices only, which orthogonalises them whole. Declares nothing."""
    groups = [group | {"params": [p for p in group["params"] if p.dim() == 2]} for group in groups]
    return torch.optim.Muon([group for group in groups if group["params"]], lr=lr)


def declared_muon(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return muon(groups, lr)


declared_muon.needs = "matrix"  # type: ignore[attr-defined]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): signs, element by element, and so it declares."""

    needs = "elementwise"

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(torch.sign(velocity.lerp(parameter.grad, 0.1)), alpha=group["lr"])
                velocity.lerp_(parameter.grad, 0.01)


class NotAnOption(Lion):
    needs = "luck"


class OwnAdam(torch.optim.AdamW):
    """A class that inherits may do anything."""


def rprop(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """A function whose optimizer is one of torch's."""
    for group in groups:
        group.pop("weight_decay")
    return torch.optim.Rprop(groups, lr=lr)


# Of test_refusals: overrides, ranks, GPUs, and words of the message.
OF_OPTIMIZERS = {
    "optimizer": [
        (["optim.target=tests.parallel.optimizers:Lamb"], 2, 0, "parallel.zero=1 divides the parameters"),
        (["optim.target=tests.parallel.optimizers:muon", "parallel.tp=2"], 2, 0, "parallel.tp=1 works"),
        (["optim.needs=norms"], 2, 0, "leave optim.needs out, it is for optim.target"),
    ],
    "parameter groups": [
        (["optim.groups=[{role: head, rate: 1}]"], 1, 0, "unknown key 'rate'"),
        (["optim.groups=[{lr: 1e-3}]"], 1, 0, "needs either role"),
        (["optim.groups=[{role: heads}]"], 1, 0, "role=heads: choose from"),
        (["optim.groups=[{pattern: '*', name: adam}]"], 1, 0, "name=adam: choose from"),
        (["optim.groups=[{role: embedding, name: muon}]"], 1, 0, "muon orthogonalises matrices"),
        (["optim.groups=[{pattern: '*', betas: [0.9]}]"], 1, 0, "betas are two numbers"),
    ],
}
