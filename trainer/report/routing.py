"""How tokens went to experts in a step, as numbers for `metrics.jsonl` and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stoker.conf.schema import Config

OVERLOADED = 3.0  # times the tokens of an expert on average, from where `stoker status` says so
_LOSSES = ("router_balance_loss", "router_z_loss")


def routing_metrics(routed: Sequence[float], config: Config) -> dict[str, float]:
    """Of a step whose `StepMetrics.routed` this is; nothing for a model without experts.

    `expert_load`: tokens of the busiest expert, over the mean of its layer; its layer and number. `expert_entropy`: of
    the tokens over a layer's experts, 1 where all have equally many; the mean over layers. `idle_experts`: those of all
    layers without a token; layer and number of the first. `dropped_tokens`: by how many the choices computed in any
    layer are fewer than in another. `rank_load`: as `expert_load`, of the busiest rank of an expert group.
    """
    experts, layers = config.model.num_experts, expert_tokens(routed, config)
    if not layers:
        return {}
    total = max(map(sum, layers.values()))
    mean = total / experts
    most, layer, expert = max((own[n], -number, -n) for number, own in layers.items() for n in range(experts))
    idle = [(number, n) for number, own in layers.items() for n, tokens in enumerate(own) if not tokens]
    found = {
        "expert_load": most / mean,
        "expert_load_layer": -layer,
        "expert_load_number": -expert,
        "expert_entropy": sum(_entropy(own) for own in layers.values()) / len(layers),
        "idle_experts": len(idle),
        "dropped_tokens": total - min(map(sum, layers.values())),
    }
    if idle:
        found |= {"idle_expert_layer": idle[0][0], "idle_expert_number": idle[0][1]}
    if (ep := config.parallel.ep) > 1:
        held = experts // ep
        loads = (sum(own[start : start + held]) for own in layers.values() for start in range(0, experts, held))
        found["rank_load"] = max(loads) / (mean * held)
    tokens = total / config.model.num_experts_per_tok
    sums = dict(zip(_LOSSES, routed[-len(_LOSSES) :], strict=True))
    return found | {name: value / tokens for name, value in sums.items() if value}


def expert_tokens(routed: Sequence[float], config: Config) -> dict[int, list[int]]:
    """Of `StepMetrics.routed` the tokens of each expert by layer, of the layers that have experts."""
    experts = config.model.num_experts
    counts = [list(map(int, routed[at : at + experts])) for at in range(0, len(routed) - len(_LOSSES), experts or 1)]
    return {number: own for number, own in enumerate(counts) if any(own)}


def _entropy(counts: Sequence[float]) -> float:
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts)) if len(counts) > 1 else 1.0


def in_words(step: Mapping[str, Any]) -> str | None:
    """The experts of a step of `metrics.jsonl`: which one is overloaded or without a token. None: it has none."""
    if "expert_load" not in step:
        return None
    load, idle = step["expert_load"], int(step.get("idle_experts", 0))
    where = f"expert {step['expert_load_number']:.0f} of layer {step['expert_load_layer']:.0f}"
    words = [f"entropy {step['expert_entropy']:.3f}", f"the busiest has {load:.2f} x the mean ({where})"]
    if load >= OVERLOADED:
        words[-1] += ", overloaded"
    if idle:
        first = f"expert {step['idle_expert_number']:.0f} of layer {step['idle_expert_layer']:.0f}"
        words.append(f"{idle} without a token ({first}{' first' if idle > 1 else ''})")
    if step.get("rank_load"):
        words.append(f"the busiest rank has {step['rank_load']:.2f} x the mean")
    return ", ".join(words)
