"""Objectives whose settings, data or model do not go with them, with what works."""

from __future__ import annotations

from stoker.conf.schema import ObjectiveConfig
from stoker.models.objectives import USES
from stoker.models.objectives.preference import FORMULAS
from stoker.models.objectives.unpaired import UNPAIRED
from stoker.parallel.start import Refusals, Start

REFUSALS = Refusals()

_OF_ANSWERS = (*FORMULAS, *UNPAIRED)
_WITH_REFERENCE = (*(name for name, formula in FORMULAS.items() if formula.reference), *UNPAIRED)


@REFUSALS.entry(
    "settings of other objectives", "keys of the objective section that its objective does not use", "no effect"
)
def _unused(start: Start) -> str | None:
    objective, default = start.config.objective, ObjectiveConfig()
    used = vars(objective) if objective.target is not None else ("name", *USES.get(objective.name, vars(objective)))
    unused = [key for key, value in vars(objective).items() if key not in used and value != getattr(default, key)]
    if not unused:
        return None
    others = [name for name, keys in USES.items() if set(unused) <= set(keys)]
    return (
        f"{_settings(unused, objective)} with objective={objective.name}, which does not use it: "
        f"{_settings(unused, default)} works" + (f", or another objective ({', '.join(others)})" if others else "")
    )


@REFUSALS.entry(
    "objectives of whole answers",
    "parallel.cp above 1 with an objective of answers",
    "an answer's tokens are on several ranks, and the objective needs their sum",
)
def _of_answers(start: Start) -> str | None:
    objective, cp = start.config.objective, start.config.parallel.cp
    if objective.target is not None or objective.name not in _OF_ANSWERS or cp <= 1:
        return None
    return (
        f"objective={objective.name} with parallel.cp={cp}: answers are compared by the sum over all their tokens, "
        "which several ranks hold: parallel.cp=1 works"
    )


def _settings(keys: list[str], objective: ObjectiveConfig) -> str:
    return " and ".join(f"objective.{key}={getattr(objective, key)}" for key in keys)


@REFUSALS.entry(
    "the reference of an objective",
    "objective=dpo, ipo, kto or apo_zero_unpaired without objective.teacher, and without an adapter or with "
    "adapter.modules_to_save",
    "the reference is the model with its adapter off: no second model is held",
)
def _reference(start: Start) -> str | None:
    objective, adapter = start.config.objective, start.config.adapter
    if objective.target is not None or objective.name not in _WITH_REFERENCE or objective.teacher is not None:
        return None
    free = ", ".join(name for name, other in FORMULAS.items() if not other.reference)
    if adapter.name == "none":
        return (
            f"objective={objective.name} compares with the model without its adapter, and adapter=none: adapter=lora "
            f"works, or objective.teacher=FOLDER of `stoker teach`, or an objective without a reference ({free})"
        )
    if adapter.modules_to_save:
        return (
            f"objective={objective.name} compares with the model without its adapter, and "
            f"adapter.modules_to_save={adapter.modules_to_save} changes the model itself: adapter.modules_to_save=[] "
            f"works, or an objective without a reference ({free})"
        )
    return None


@REFUSALS.entry(
    "distillation without a teacher", "objective=distill without objective.teacher", "it is what the student learns"
)
def _teacher(start: Start) -> str | None:
    objective = start.config.objective
    if objective.target is not None or objective.name != "distill" or objective.teacher is not None:
        return None
    return (
        "objective=distill learns a teacher's predictions, and objective.teacher names none: objective=next_token "
        "works, or objective.teacher=FOLDER that `stoker teach` wrote for these data"
    )


@REFUSALS.entry(
    "predictions of a teacher for a stream",
    "objective.teacher with data.mode=streaming",
    "they are stored by the numbers of rows, which only indexed data have",
)
def _streamed(start: Start) -> str | None:
    teacher, mode = start.config.objective.teacher, start.config.data.mode
    if teacher is None or mode != "streaming":
        return None
    return (
        f"objective.teacher={teacher} with data.mode=streaming: predictions are stored by the numbers of rows: "
        "data.mode=indexed works"
    )


@REFUSALS.entry(
    "pairs of answers",
    "an objective of answers with documents that are cut, or that attend to each other",
    "the two answers of a pair, or a rated answer and its mismatched one, are whole, in one row, and apart",
)
def _pairs(start: Start) -> str | None:
    objective, data = start.config.objective, start.config.data
    if objective.target is not None or objective.name not in _OF_ANSWERS:
        return None
    broken = [
        ("data.mode=streaming", "data.mode=indexed", data.mode == "streaming"),
        ("data.packing=concatenated", "data.packing=best_fit", data.packing == "concatenated"),
        ("data.document_mask=false", "data.document_mask=true", data.document_mask is False),
        ("data.validation_by=position", "data.validation_by=documents", data.validation_by == "position"),
    ]
    found = [(said, works) for said, works, is_so in broken if is_so]
    if not found:
        return None
    return (
        f"objective={objective.name} with {', '.join(said for said, _ in found)}: pairs of answers need "
        f"{' and '.join(works for _, works in found)}"
    )
