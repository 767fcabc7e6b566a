"""Update rules on whole parameters in one process, written from their papers: what the product's are compared with.

Which parameter has which rule is decided here once more, from names, and the matrices of fused projections by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stoker.conf.schema import OptimConfig

Change = Callable[[str, Tensor, Tensor, dict[str, Tensor], float], None]  # name, w, g, state, decay


def newton_schulz(g: Tensor) -> Tensor:
    """Jordan et al. 2024, the code in the text, in fp32."""
    x = g.T if g.size(0) > g.size(1) else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.size(0) > g.size(1) else x


class Plain:
    """`step(named, lr)` over whole parameters, whose `grad` is clipped already."""

    def __init__(
        self,
        config: OptimConfig,
        rule_of: Callable[[str, Tensor], tuple[str, float, float]] | None = None,
        matrices_of: Callable[[str, Tensor], list[Tensor]] | None = None,
    ) -> None:
        """`rule_of` gives the rule of a parameter, what its rate is multiplied by, and its decay."""
        self._config = config
        self._rule_of, self._matrices_of = rule_of or self._by_default, matrices_of or (lambda _, tensor: [tensor])
        self._state: dict[str, dict[str, Tensor]] = {}
        self._steps = 0

    def _by_default(self, name: str, tensor: Tensor) -> tuple[str, float, float]:
        embedding, head = name.startswith("embedding"), name.startswith("head")
        decay = self._config.weight_decay if tensor.dim() > 1 and not embedding else 0.0
        rule = self._config.name
        if rule == "muon" and (tensor.dim() < 2 or embedding or head):
            rule = "adamw"
        return rule, 1.0, decay

    @torch.no_grad()
    def step(self, named: list[tuple[str, nn.Parameter]], lr: float) -> None:
        self._steps += 1
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None
            self._state.setdefault(name, {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)})
            rule, rate, decay = self._rule_of(name, parameter)
            getattr(self, f"_{rule}")(name, parameter, parameter.grad, self._state[name], lr * rate, decay)

    def _adam(self, g: Tensor, s: dict[str, Tensor]) -> Tensor:
        beta1, beta2 = self._config.betas
        s["m"] = beta1 * s["m"] + (1 - beta1) * g
        s["v"] = beta2 * s["v"] + (1 - beta2) * g * g
        return (s["m"] / (1 - beta1**self._steps)) / ((s["v"] / (1 - beta2**self._steps)).sqrt() + self._config.eps)

    def _adamw(self, name: str, w: Tensor, g: Tensor, s: dict[str, Tensor], lr: float, decay: float) -> None:
        w *= 1 - lr * decay
        w -= lr * self._adam(g, s)

    def _lamb(self, name: str, w: Tensor, g: Tensor, s: dict[str, Tensor], lr: float, decay: float) -> None:
        u = self._adam(g, s) + decay * w
        ratio = w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0
        w -= lr * ratio * u

    def _lion(self, name: str, w: Tensor, g: Tensor, s: dict[str, Tensor], lr: float, decay: float) -> None:
        beta1, beta2 = self._config.betas
        c = beta1 * s["m"] + (1 - beta1) * g
        w *= 1 - lr * decay
        w -= lr * c.sign()
        s["m"] = beta2 * s["m"] + (1 - beta2) * g

    def _muon(self, name: str, w: Tensor, g: Tensor, s: dict[str, Tensor], lr: float, decay: float) -> None:
        momentum = self._config.momentum
        s["m"] = momentum * s["m"] + g
        u = g + momentum * s["m"]
        w *= 1 - lr * decay
        for part, change in zip(self._matrices_of(name, w), self._matrices_of(name, u), strict=True):
            part -= lr * 0.2 * max(change.shape) ** 0.5 * newton_schulz(change)
