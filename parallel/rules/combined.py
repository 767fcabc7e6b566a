"""All rules of a run as one optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from stoker.conf.schema import OptimConfig
from stoker.parallel.mesh import Mesh
from stoker.parallel.optimizer import LocalOptimizer
from stoker.parallel.optimizer_needs import needs_wholes
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.rules.lamb import Lamb
from stoker.parallel.rules.lion import Lion
from stoker.parallel.rules.muon import Muon
from stoker.parallel.rules.settings import RULES, TARGET, Settings, rules_of, settings_of
from stoker.parallel.rules.user_wholes import UserWholes
from stoker.parallel.shards import Shard

NS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class UpdateRule(Protocol):
    """One rule over this rank's parts of the parameters that have it. Its state is made when it is built."""

    def begin(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Start the update with `gradients / divisor` (float32 parts, by name), which is left out where `found_inf`
        is 1. Messages that it starts are in flight until `finish`."""
        ...

    def finish(self) -> None:
        """Wait for them, and complete the update of the parts."""
        ...

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """State shaped as this rank's part of a parameter: (its name, key, live tensor)."""
        ...

    def scalars(self) -> dict[str, float]:
        """State that is one number for all parameters, equal on all ranks and for all rules that have it."""
        ...

    def load_scalars(self, values: dict[str, float]) -> None:
        """The inverse of `scalars`."""
        ...


class Optimizer:
    """The rules of `config` over `parts`: this rank's part of every trained parameter by name, some of them empty.

    A collective: every rank makes every rule, whether or not it holds a parameter of it, as it takes part in its
    messages.
    """

    def __init__(
        self,
        config: OptimConfig,
        mesh: Mesh,
        registry: Registry,
        held: Mapping[str, LocalShard],
        parts: Mapping[str, Tensor],
    ) -> None:
        entries = registry.entries
        settings = {n: settings_of(config, n, entries[n].role, entries[n].matrix_dims) for n in parts}
        self._whole: UserWholes | None = None
        self._rules: list[UpdateRule] = []
        wanted = rules_of(config)
        for rule in ("muon", "lamb", TARGET, *RULES[:3]):  # those whose messages the others' work overlaps come first
            own = {name: part for name, part in parts.items() if settings[name].rule == rule}
            if rule not in wanted:
                assert not own, rule
                continue
            present = {name: part for name, part in own.items() if part.numel()}
            if rule == "muon":
                self._rules.append(Muon(mesh, registry, held, own, settings, NS_DTYPES[config.ns_dtype]))
            elif rule == "lamb":
                self._rules.append(Lamb(mesh, registry, held, sorted(own), present, settings))
            elif rule == "lion":
                self._rules.append(Lion(present, settings))
            elif rule == TARGET and needs_wholes(config, mesh.layout):
                self._whole = UserWholes(config, mesh, registry, held, own, settings)
                self._rules.append(self._whole)
            else:
                self._rules.append(LocalOptimizer(config, own, registry.roles(), settings))

    def step(self, gradients: Mapping[str, Tensor], lr: float, divisor: Tensor, found_inf: Tensor) -> None:
        """Update with `gradients / divisor` (float32, by name), or leave everything as it is where found_inf is 1."""
        for rule in self._rules:
            rule.begin(gradients, lr, divisor, found_inf)
        for rule in self._rules:
            rule.finish()

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """State of this rank's parts: (parameter's name, key, live tensor)."""
        for rule in self._rules:
            yield from rule.tensors()

    def owned(self) -> list[Shard]:
        """State of whole parameters that this rank owns."""
        return [] if self._whole is None else self._whole.shards()

    def scalars(self) -> dict[str, float]:
        return {key: value for rule in self._rules for key, value in rule.scalars().items()}

    def load_scalars(self, values: dict[str, float]) -> None:
        for rule in self._rules:
            rule.load_scalars(values)


def settings_by_name(config: OptimConfig, registry: Registry) -> dict[str, Settings]:
    """The settings of every trained parameter of `registry`."""
    return {
        name: settings_of(config, name, registry.entries[name].role, registry.entries[name].matrix_dims)
        for name in registry.trainable()
    }
