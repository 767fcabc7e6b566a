"""What would work, for the messages of refusals: the nearest numbers, and a few of many names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def divisors(number: int) -> list[int]:
    """Every divisor of a number above 0, in order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def around(number: int, candidates: Iterable[int]) -> list[int]:
    """The candidate next below or at `number` and the one next above, where there are."""
    ordered = sorted(candidates)
    below = [n for n in ordered if n <= number][-1:]
    above = [n for n in ordered if n > number][:1]
    return below + above


def multiples_around(number: int, unit: int) -> list[int]:
    """The multiples of `unit`, above 0, next below or at `number` and next above."""
    below = number // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def either(numbers: Iterable[int]) -> str:
    """`8 or 12`."""
    return " or ".join(map(str, numbers))


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
