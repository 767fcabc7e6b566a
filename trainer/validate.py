"""Validation of a start: limits of single values, and the refusals of all rooms, before a rank is spawned.

`stoker.conf.limits` checks each value separately. Each room refuses combinations of its values, with the number of
ranks and GPUs (`refusals.py` in models, data, parallel and trainer). Every message names the values and the nearest
that work. docs/refusals.md is printed from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable

from stoker.conf.limits import LIMITS
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data.refusals import REFUSALS as OF_DATA
from stoker.models.refusals import REFUSALS as OF_MODELS
from stoker.parallel.refusals import REFUSALS as OF_LAYOUTS
from stoker.parallel.start import Start
from stoker.trainer.refusals import REFUSALS as OF_RUNS

REFUSALS = (*OF_LAYOUTS, *OF_MODELS, *OF_DATA, *OF_RUNS)


def validate(config: Config, world: int, gpus: int) -> None:
    """Raises ConfigError with everything that forbids this start, one line each.

    `world` counts the ranks, `gpus` the GPUs that they may use, both over all machines.
    """
    start = Start(config, world, gpus)
    found = [
        *(limit.broken(config) for limit in LIMITS),
        *(refusal.check(start) for refusal in REFUSALS),
    ]
    messages = [message for message in found if message is not None]
    if messages:
        raise ConfigError("\n".join(messages))


def table_markdown() -> str:
    """The whole table, as docs/refusals.md prints it."""
    together = ((entry.name, entry.what, entry.why) for entry in REFUSALS)
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
