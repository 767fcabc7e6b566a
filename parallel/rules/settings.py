"""Which rule, learning rate and decay each parameter has: a function of the config, and of its name, role and shape."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.conf.schema import OptimConfig
from stoker.parallel.model import Role

RULES = ("adamw", "sgd", "lion", "lamb", "muon")
TARGET = "target"  # the rule that `optim.target` builds
DECAYED = (Role.MATRIX, Role.HEAD)  # by default: not vectors (norms, biases) and embeddings
_KEYS = {"role": str, "pattern": str, "name": str, "lr": float, "weight_decay": float, "betas": list, "eps": float,
         "momentum": float}  # fmt: skip
# Of a group whose rule is another than the run's own: what the rule's authors recommend.
_RECOMMENDED: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.9, 0.95], "eps": 1e-8},
    "sgd": {"momentum": 0.9},
    "lion": {"betas": [0.9, 0.99]},
    "lamb": {"betas": [0.9, 0.999], "eps": 1e-6},
    "muon": {"momentum": 0.95},
}


@dataclass(frozen=True)
class Settings:
    """What one parameter is updated with. Equal ones are updated together."""

    rule: str  # one of RULES, or TARGET
    rate: float  # the step's learning rate is multiplied by it
    decay: float  # decoupled: share of learning rate x weight taken off per step
    betas: tuple[float, float]
    eps: float
    momentum: float


def settings_of(config: OptimConfig, name: str, role: Role, dims: int) -> Settings:
    """The settings of the parameter of this global name: those of the first group that it is in, else the run's own.

    Under `muon` what is no matrix (embeddings, head, vectors, what has other than two `dims`) is AdamW's; `dims` of a
    declared stack of matrices are two (`Entry.matrix_dims`).
    """
    group = next((group for group in config.groups if _in(group, name, role)), {})
    own = TARGET if config.target is not None else config.name
    rule = group.get("name", own)
    values: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "momentum": config.momentum}
    if rule != own:
        values |= _RECOMMENDED[rule]
    values |= {key: group[key] for key in values if key in group}
    if rule == "muon" and not (role is Role.MATRIX and dims == 2):
        rule = "adamw"
    decayed = config.decay_all or role in DECAYED
    return Settings(
        rule,
        group["lr"] / config.lr if "lr" in group else 1.0,
        group.get("weight_decay", config.weight_decay if decayed else 0.0),
        (values["betas"][0], values["betas"][1]),
        values["eps"],
        values["momentum"],
    )


def rules_of(config: OptimConfig) -> set[str]:
    """All rules that parameters of this config may have, so that every rank takes part in their messages."""
    named = {TARGET if config.target is not None else config.name, *(group.get("name") for group in config.groups)}
    return {rule for rule in named if rule is not None} | ({"adamw"} if "muon" in named else set())


def groups_problem(config: OptimConfig) -> str | None:
    """What is wrong with `optim.groups`, whatever the model, with what would work."""
    for number, group in enumerate(config.groups):
        where = f"optim.groups[{number}]"
        for key, value in group.items():
            if key not in _KEYS:
                return f"{where}: unknown key {key!r}: choose from {', '.join(_KEYS)}"
            kind = (int, float) if _KEYS[key] is float else _KEYS[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"{where}: {key}={value!r}: expected {_KEYS[key].__name__}"
        if ("role" in group) == ("pattern" in group):
            return f"{where} needs either role (one of {', '.join(Role)}) or pattern (of names: layers.*.mlp.*)"
        if group.get("role", Role.MATRIX) not in tuple(Role):
            return f"{where}: role={group['role']}: choose from {', '.join(Role)}"
        if group.get("name", RULES[0]) not in RULES:
            return f"{where}: name={group['name']}: choose from {', '.join(RULES)}"
        if group.get("name") == "muon" and group.get("role", Role.MATRIX) != Role.MATRIX:
            return f"{where}: muon orthogonalises matrices, not role={group['role']}: name=adamw works"
        if not group.get("lr", 1.0) > 0 or not group.get("weight_decay", 0.0) >= 0 or not group.get("eps", 1.0) > 0:
            return f"{where}: lr and eps must be above 0, and weight_decay at least 0"
        betas = [*group.get("betas", [0.0, 0.0]), group.get("momentum", 0.0)]
        if len(betas) != 3 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
            return f"{where}: betas are two numbers, and they and momentum are from 0 up to but not including 1"
    return None


def unused_group(config: OptimConfig, roles: Mapping[str, Role]) -> str | None:
    """Why a group of the config is of no use: no parameter of `roles` (the whole model's trained ones) is in it."""
    for number, group in enumerate(config.groups):
        if not any(_in(group, name, role) for name, role in roles.items()):
            near = ", ".join(list(roles)[:3])
            return f"optim.groups[{number}]={group}: no trained parameter is in it; names are such as {near}"
        earlier = config.groups[:number]
        if all(any(_in(e, n, r) for e in earlier) for n, r in roles.items() if _in(group, n, r)):
            return f"optim.groups[{number}]={group}: every parameter in it is in an earlier group; put it first"
    return None


def _in(group: Mapping[str, Any], name: str, role: Role) -> bool:
    return group["role"] == role if "role" in group else fnmatch.fnmatchcase(name, group["pattern"])
