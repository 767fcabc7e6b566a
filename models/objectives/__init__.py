"""What a run minimises: `objective=NAME`, or a user's own (docs/extending.md).

next_token          the cross entropy of each label                              stoker.parallel.objective
distill             the distance from a teacher's predictions                    distill.py
dpo ipo simpo orpo  preferences, pairs of an answer chosen and one rejected       preference.py
kto and             answers that are rated one by one                             unpaired.py
apo_zero_unpaired

`teaching.py` is what a teacher computes for `stoker teach`.
"""

from __future__ import annotations

from collections.abc import Callable

from stoker.conf.schema import ObjectiveConfig
from stoker.conf.targets import import_target
from stoker.models.objectives.distill import Distill
from stoker.models.objectives.preference import FORMULAS, Preference
from stoker.models.objectives.unpaired import UNPAIRED
from stoker.parallel.objective import NEXT_TOKEN, NextToken, Objective

# The keys of the config that each uses.
USES = {
    "next_token": ("z_loss",),
    "distill": ("teacher", "temperature", "mix"),
    **{name: formula.uses for name, formula in FORMULAS.items()},
    **dict.fromkeys(UNPAIRED, ("beta", "desirable_weight", "undesirable_weight", "teacher")),
}


def objective_of(config: ObjectiveConfig) -> Objective:
    """The objective that `config` names. Raises ValueError for an `objective.target` that cannot be imported."""
    if config.target is not None:
        build: Callable[[ObjectiveConfig], Objective] = import_target(config.target)
        return build(config)
    if config.name == "next_token":
        return NextToken(config.z_loss) if config.z_loss else NEXT_TOKEN
    if config.name == "distill":
        return Distill(config)
    if config.name in UNPAIRED:
        return UNPAIRED[config.name](config)
    return Preference(FORMULAS[config.name], config)
