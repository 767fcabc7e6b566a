"""Adapters: which parameters of a model are trained, and the low-rank layers beside its linear ones.

`plan_of` reads the config against the whole model, once; `apply` changes any part of it accordingly, before it is
parallelized. Neither knows the family of the model: it has blocks, named modules, and linear layers that take adapters
(`stoker.parallel.tensor.low_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from stoker.conf.schema import AdapterConfig, Config
from stoker.models.family import family_of
from stoker.models.objectives.teaching import TARGET
from stoker.parallel.model import ParallelizableModel
from stoker.parallel.suggestions import shortened
from stoker.parallel.tensor.dropout import Dropout, TokenNumbers
from stoker.parallel.tensor.low_rank import SLOT, AdaptedLinear, LowRank, WeightDecomposed, takes_adapters
from stoker.parallel.tensor.nf4 import WANTED

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterPlan:
    """What is trained: the adapters of these linear layers, of these ranks, and these parameters of the base.

    All by global names. `saved_whole` are the modules that hold those parameters, as `modules_to_save` found them.
    """

    ranks: Mapping[str, int]
    trained: frozenset[str]
    saved_whole: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # linear layers, and experts, that all-linear leaves without an adapter
    packed: frozenset[str] = frozenset()  # linear layers whose weights are held in four bits
    magnitudes: bool = False  # whether the lengths of the rows of adapted weights are trained apart (DoRA)


def scale_of(adapter: AdapterConfig, rank: int) -> float:
    """The factor of the product of two thin matrices of this rank (rsLoRA: Kalajdzievski 2023)."""
    return adapter.alpha / (math.sqrt(rank) if adapter.rslora else rank)


def plan_of(whole: nn.Module, config: Config) -> AdapterPlan | None:
    """The plan for the `whole` model that `config` names; None where all that the model itself trains is trained.

    Raises ValueError, naming key and value, for names and patterns that fit nothing, and for layers that cannot have
    an adapter.
    """
    names = Names(whole, config)
    if config.adapter.name != "none":
        return _of_adapter(whole, config.adapter, names)
    if not config.model.freeze:
        return None
    frozen = {
        name
        for pattern in config.model.freeze
        for name in names.required("model.freeze", pattern, [*names.parameters, *names.modules])
    }
    modules = tuple(f"{name}." for name in frozen)
    trained = frozenset(
        name
        for name, parameter in whole.named_parameters()
        if parameter.requires_grad and name not in frozen and not name.startswith(modules)
    )
    if not trained and config.objective.target != TARGET:
        raise ValueError(f"model.freeze={config.model.freeze} leaves nothing to train: name fewer")
    return AdapterPlan({}, trained)


def apply(part: nn.Module, plan: AdapterPlan | None, config: Config) -> nn.Module:
    """`part` of the model, changed in place: only what `plan` names is trained, and its adapters are there."""
    adapter, tokens = config.adapter, TokenNumbers()
    if plan is None:
        return part
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(name in plan.trained)
    for name, module in list(part.named_modules()):
        if name in plan.packed:
            if type(module) is nn.Linear:
                module.__class__ = AdaptedLinear
            setattr(module, WANTED, True)
        if (rank := plan.ranks.get(name)) is not None:
            assert isinstance(module, nn.Linear)
            if type(module) is nn.Linear:
                module.__class__ = AdaptedLinear
            dropout = None
            if adapter.dropout:
                dropout = Dropout(adapter.dropout, config.run.seed, name, tokens, range(module.in_features))
            shape = module.in_features, module.out_features, rank, scale_of(adapter, rank)
            low_rank = WeightDecomposed(*shape) if plan.magnitudes else LowRank(*shape, dropout)
            module.add_module(SLOT, low_rank.to(module.weight.device))
    return part


class Names:
    """The modules and parameters of a whole model by what a user may call them."""

    def __init__(self, whole: nn.Module, config: Config) -> None:
        self._family = family_of(config.model)
        self.modules = [name for name, _ in whole.named_modules() if name]
        self.parameters = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
        parallelizable: ParallelizableModel = whole  # type: ignore[assignment]
        called = {id(module): name for name, module in whole.named_modules()}
        self.blocks = {number: f"{called[id(block)]}." for number, block in parallelizable.blocks().items()}

    def matching(self, pattern: str, among: Iterable[str]) -> list[str]:
        """Those of `among` that `pattern` is a name of, the end of a name of, or a pattern for."""
        return [
            name
            for name in among
            if any(f".{known}".endswith(f".{pattern}") or fnmatchcase(known, pattern) for known in self.of(name))
        ]

    def of(self, name: str) -> tuple[str, str]:
        """Stoker's name and that of Hugging Face's model."""
        return name, self._family.reference_name(name)

    def required(self, key: str, pattern: str, among: Sequence[str]) -> list[str]:
        """As `matching`. Raises ValueError where nothing matches."""
        found = self.matching(pattern, among)
        if not found:
            ends = dict.fromkeys(known.rpartition(".")[2] for name in among for known in self.of(name))
            raise ValueError(
                f"{key}: {pattern} fits none of the model's: {shortened(among)}; the end of a name is enough "
                f"({shortened(list(ends))}), * stands for any characters"
            )
        return found


def _of_adapter(whole: nn.Module, adapter: AdapterConfig, names: Names) -> AdapterPlan:
    modules = dict(whole.named_modules())
    linear = [name for name in names.modules if isinstance(modules[name], nn.Linear)]
    inside = list(_in_blocks(adapter, names, linear))
    targets: dict[str, None] = {}
    for pattern in adapter.target_modules:
        everything = pattern == ALL_LINEAR
        found = inside if everything else names.required("adapter.target_modules", pattern, inside)
        targets |= dict.fromkeys(name for name in found if not everything or takes_adapters(modules[name]))
    for name in targets:
        if not takes_adapters(modules[name]):
            raise ValueError(
                f"adapter.target_modules: {name} is {type(modules[name]).__name__}, which takes no adapter; "
                f"adapter.target_modules=[{ALL_LINEAR}] leaves such layers out"
            )
    if not targets:
        raise ValueError(
            f"adapter.target_modules={adapter.target_modules} leaves no layer to adapt: {type(whole).__name__} has "
            "no linear layer that takes an adapter; adapter=none trains all of it"
        )
    ranks = dict.fromkeys(targets, adapter.rank)
    for pattern, rank in adapter.rank_pattern.items():
        ranks |= dict.fromkeys(names.required("adapter.rank_pattern", pattern, list(targets)), rank)
    saved = {
        name: None
        for pattern in adapter.modules_to_save
        for name in names.required("adapter.modules_to_save", pattern, names.modules)
    }
    for name in saved:
        both = [target for target in targets if f"{target}.".startswith(f"{name}.")]
        if both:
            raise ValueError(
                f"adapter.modules_to_save: {name} is trained whole, and {both[0]} in it has an adapter: take one of "
                "them out"
            )
    once = {id(parameter): name for name, parameter in reversed(list(whole.named_parameters()))}
    trained = {once[id(parameter)] for name in saved for parameter in modules[name].parameters()}
    stacks = [name for name in names.modules if any(p.dim() == 3 for p in modules[name].parameters(recurse=False))]
    without = [name for name in (*inside, *_in_blocks(adapter, names, stacks)) if name not in targets]
    left_out = tuple(without) if ALL_LINEAR in adapter.target_modules else ()
    packed: frozenset[str] = frozenset()
    if adapter.base == "nf4":
        blocks, apart = tuple(names.blocks.values()), tuple(f"{name}." for name in saved)
        those = (name for name in linear if name.startswith(blocks) and not f"{name}.".startswith(apart))
        packed = frozenset(name for name in those if takes_adapters(modules[name]))
    return AdapterPlan(ranks, frozenset(trained), tuple(saved), left_out, packed, adapter.name == "dora")


def _in_blocks(adapter: AdapterConfig, names: Names, linear: Sequence[str]) -> Iterator[str]:
    """The linear layers of the blocks that may have adapters."""
    unknown = [number for number in adapter.layers_to_transform if str(number) not in names.blocks]
    if unknown:
        raise ValueError(
            f"adapter.layers_to_transform={adapter.layers_to_transform}: the model has no layer {unknown[0]}; it has "
            f"0 to {len(names.blocks) - 1}"
        )
    chosen = [str(number) for number in adapter.layers_to_transform] or list(names.blocks)
    starts = tuple(names.blocks[number] for number in chosen)
    return (name for name in linear if f"{name}.".startswith(starts))
