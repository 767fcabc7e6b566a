"""Which part of a parameter an optimizer needs, and the layouts that give it less.

ZeRO and tensor parallelism divide parameters over ranks, and a pipeline divides the set of them; the optimizer of a
rank gets what the rank holds. That is enough for one that treats each element separately. One that takes norms of whole
tensors (LAMB, LARS) or multiplies whole matrices (Muon, Shampoo) would train another model without an error: if it
declares that, it gets whole parameters (`stoker.parallel.rules.user_wholes`); if it declares nothing it is refused.
"""

from __future__ import annotations

from typing import Any

from stoker.conf.schema import Config, OptimConfig, lookup
from stoker.conf.targets import import_target
from stoker.conf.values import ConfigError
from stoker.parallel.layout import Layout
from stoker.parallel.rules.settings import groups_problem
from stoker.parallel.start import Start

ELEMENTWISE, NORMS, MATRIX = "elementwise", "norms", "matrix"
NEEDS = {
    ELEMENTWISE: "treats each element of a parameter separately",
    NORMS: "needs norms of whole parameters",
    MATRIX: "needs whole matrices",
}
_UNDIVIDED = {
    "parallel.zero": "parallel.zero=0",
    "parallel.tp": "parallel.tp=1",
    "parallel.engine": "parallel.engine=fsdp",
    "parallel.pp": "parallel.pp=1",
}
# Classes whose update of an element depends on that element's history and on numbers equal for all, by package.
_KNOWN_ELEMENTWISE = {
    "torch.optim": (
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    ),
    "deepspeed.ops": ("DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion"),
}  # fmt: skip


def declared_needs(config: OptimConfig) -> str | None:
    """What the optimizer of `config` needs, a key of NEEDS; None for a user's own that declares nothing.

    `optim.needs` counts first, then the attribute `needs` of what `optim.target` names and of the optimizer that it
    builds. Elementwise classes of torch and DeepSpeed are known; a class that inherits from them is not.

    Raises ConfigError for a target that cannot be imported or called, and for a declaration that is none of NEEDS.
    """
    if config.target is None:
        return ELEMENTWISE
    if config.needs is not None:
        return config.needs
    build = import_target(config.target)
    found = getattr(build, "needs", None)
    if found is None:
        built = build if isinstance(build, type) else _build_one(build, config)
        found = getattr(built, "needs", None)
        if found is None and _is_known_elementwise(built if isinstance(built, type) else type(built)):
            return ELEMENTWISE
    if found is not None and found not in NEEDS:
        raise ConfigError(f"optim.target={config.target}: needs={found!r} is none of {', '.join(NEEDS)}")
    return found


def undeclared(config: Config, layout: Layout) -> str | None:
    """Why the optimizer of `config` cannot be used where `layout` divides parameters, with what would work, or None.

    Raises ConfigError as `declared_needs`.
    """
    divided = _divided(layout)
    if config.optim.target is None or not divided or declared_needs(config.optim) is not None:
        return None
    more = layout.zero > 0 and layout.shards == 1 and layout.world > 1  # ranks that shard once they share no layers
    undivided = " ".join(_UNDIVIDED[axis] for axis in (["parallel.zero"] if more else []) + divided)
    where = " and ".join(f"{axis}={lookup(config, axis)}" for axis in divided)
    verb = "divides" if len(divided) == 1 else "divide"
    kinds = ", ".join(f"{name} ({meaning})" for name, meaning in NEEDS.items())
    return (
        f"optim.target={config.optim.target} does not declare what it needs, and {where} {verb} the parameters: "
        f"{undivided} works; or declare it by optim.needs=..., or by an attribute `needs` of the class or function: "
        f"{kinds}"
    )


def needs_wholes(config: OptimConfig, layout: Layout) -> bool:
    """Whether `optim.target` must be given whole parameters, because it declares so and `layout` divides them."""
    divided = any(key != "parallel.pp" for key in _divided(layout))  # a stage has its parameters whole
    return divided and config.target is not None and declared_needs(config) in (NORMS, MATRIX)


def _divided(layout: Layout) -> list[str]:
    """The keys by which `layout` divides the parameters of a model, or the set of them."""
    divided = {
        "parallel.zero": layout.zero > 0 and layout.shards > 1,
        "parallel.tp": layout.tp > 1,
        "parallel.engine": layout.engine == "deepspeed",  # it keeps flat vectors at every stage
        "parallel.pp": layout.pp > 1,
    }
    return [key for key, divides in divided.items() if divides]


def _build_one(build: Any, config: OptimConfig) -> Any:
    """The optimizer over a single small matrix, to read its attributes."""
    import torch  # a second, for the launcher, that only a user's own optimizer needs

    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": config.weight_decay}
    try:
        return build([group], lr=config.lr, **config.args)
    except Exception as error:
        raise ConfigError(f"optim.target={config.target} cannot be built: {type(error).__name__}: {error}") from error


def _is_known_elementwise(kind: type) -> bool:
    return any(
        kind.__module__.startswith(f"{package}.") and kind.__name__ in names
        for package, names in _KNOWN_ELEMENTWISE.items()
    )


def _refused(start: Start) -> str | None:
    optim = start.config.optim
    if optim.needs is not None and optim.target is None:
        return (
            f"optim.needs={optim.needs} with optim.name={optim.name}: the needs of that "
            "optimizer are known; leave optim.needs out, it is for optim.target"
        )
    if start.layout is None:
        return None
    try:
        return undeclared(start.config, start.layout)
    except ValueError as error:
        return str(error)


def _refused_group(start: Start) -> str | None:
    return groups_problem(start.config.optim)


ENTRIES = (
    (
        "optimizer",
        "an optim.target that declares nothing where ZeRO, DeepSpeed, parallel.tp or parallel.pp divide parameters; "
        "optim.needs without optim.target",
        "the optimizer of a rank gets what it declares that it needs",
        _refused,
    ),
    (
        "parameter groups",
        "entries of optim.groups with unknown keys, without exactly one of role and pattern, with values outside "
        "their limits, or with muon for other roles than matrix",
        "a group that means nothing would leave its parameters to the run's own rule",
        _refused_group,
    ),
)
