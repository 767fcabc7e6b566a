"""Validation of a start: limits of single values, and the refusals of all rooms, before a rank is spawned.

`stoker.conf.limits` checks each value separately. Each room refuses combinations of its values, with the number of
ranks and GPUs (`refusals.py` in data, parallel and trainer), and each model family those of its own. Every message
names the values and the nearest that work. docs/refusals.md is printed from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable

from stoker.conf.limits import LIMITS
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data.refusals import REFUSALS as OF_DATA
from stoker.models.family import built_in, family_of
from stoker.models.objectives.refusals import REFUSALS as OF_OBJECTIVES
from stoker.parallel.refusals import REFUSALS as OF_LAYOUTS
from stoker.parallel.start import Refusal, Start
from stoker.trainer.refusals import REFUSALS as OF_RUNS

OF_ROOMS = (*OF_LAYOUTS, *OF_DATA, *OF_OBJECTIVES, *OF_RUNS)


def entries_for(config: Config) -> tuple[Refusal, ...]:
    """The entries that apply to a config: those of all rooms and of its model's family."""
    try:
        return (*OF_ROOMS, *family_of(config.model).refusals)
    except ValueError:  # it cannot be imported, which a stage before refuses
        return OF_ROOMS


def validate(config: Config, world: int, gpus: int, here: int | None = None, one_each: bool = False) -> None:
    """Raises ConfigError with everything that forbids this start, one line each.

    On how many ranks and GPUs: see `stoker.parallel.start.Ranks`.
    """
    start = Start(config, world, gpus, here, one_each)
    found = [
        *(limit.broken(config) for limit in LIMITS),
        *(refusal.check(start) for refusal in entries_for(config)),
    ]
    messages = [message for message in found if message is not None]
    if messages:
        raise ConfigError("\n".join(messages))


def table_markdown() -> str:
    """The whole table, as docs/refusals.md prints it."""
    together = [(entry.name, entry.what, entry.why) for entry in OF_ROOMS]
    for name, family in built_in().items():
        together += [(f"{name}: {entry.name}", entry.what, entry.why) for entry in family.refusals]
    single = ((f"`{limit.key}`", limit.rule, limit.why) for limit in LIMITS)
    return "\n".join(
        [
            "# What Stoker refuses to start",
            "",
            "Printed by `python -m stoker.trainer.validate`. All checks run before any rank is spawned;",
            "each message names the values it saw and the nearest that work.",
            "",
            "## Values that do not go together",
            "",
            *_table(("", "refused", "why"), together),
            "",
            "## Limits of single values",
            "",
            *_table(("key", "must be", "why"), single),
            "",
        ]
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    print(table_markdown(), end="")
