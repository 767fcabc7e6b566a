"""Differences between two runs of a few steps, and the limits that rounding explains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """The largest relative differences that rounding explains."""

    loss: float  # of every step
    grad_norm: float
    gradient: float  # of the first step, normwise
    parameter: float | None  # after the last step, normwise; None: not compared


# fp32 is the contract. In fewer bits a rounding is 2**-9 (bf16) or 2**-12 (fp16) of a number, and AdamW, which divides
# small gradients by small gradients, amplifies it: there norms are compared in the first step, from identical
# parameters, and parameters not at all. tests/parallel/test_precision.py holds the layouts to the same limits.
LIMITS = {
    "fp32": Limits(1e-5, 1e-5, 1e-5, 1e-4),
    "bf16": Limits(2e-2, 5e-3, 2e-2, None),
    "fp8": Limits(2e-2, 2e-2, 6e-2, None),
    "fp16": Limits(5e-3, 1e-3, 5e-3, None),
}
# A gradient that is zero in exact arithmetic is noise in floating point: below this share of the norm of all gradients
# together, a difference is measured against that share.
SMALL_GRADIENT = 1e-3


@dataclass(frozen=True)
class Difference:
    """One line of the table: the worst of its kind."""

    what: str
    where: str
    one: float | None
    other: float | None
    relative: float
    limit: float

    @property
    def sound(self) -> bool:
        return self.relative <= self.limit  # nan is not


def worst_number(what: str, one: list[float], other: list[float], limit: float) -> Difference:
    found = [
        Difference(what, f"step {step}", a, b, _relative(abs(a - b), abs(a)), limit)
        for step, (a, b) in enumerate(zip(one, other, strict=True), 1)
    ]
    return worst(found)


def worst_tensor(
    what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], limit: float, small: float
) -> Difference:
    """Normwise: |a - b| / |a|, or / (`small` times the norm of all of `ours`) where that is larger."""
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        return Difference(what, f"{odd[0]} is in only one of them", None, None, float("inf"), limit)
    least = small * _norm(ours.values())
    found = []
    for name, value in ours.items():
        difference = float((value.double() - theirs[name].double()).norm())
        norm = float(value.double().norm())
        found.append(
            Difference(
                what, name, norm, float(theirs[name].double().norm()), _relative(difference, max(norm, least)), limit
            )
        )
    return worst(found)


def worst(found: list[Difference]) -> Difference:
    """The largest relative difference; nan counts as the largest."""
    return max(found, key=lambda difference: (difference.relative != difference.relative, difference.relative))


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def show(one: str, other: str, precision: str, differences: list[Difference]) -> None:
    """Print the table of `differences` between two runs that are described so."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.6g}"

    right = [Column(name, justify="right", no_wrap=True) for name in ("A", "B", "differs by", "limit")]
    where = Column("worst at", overflow="fold")
    table = Table(Column(no_wrap=True), where, *right, Column(no_wrap=True), box=None, pad_edge=False)
    for line in differences:
        verdict = "[green]same" if line.sound else "[red]differs"
        numbers = (number(line.one), number(line.other), f"{line.relative:.1e}", f"{line.limit:.0e}")
        table.add_row(line.what, line.where, *numbers, verdict)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(f"A  {one}\nB  {other}\n")
    console.print(table)
    if all(line.sound for line in differences):
        console.print(f"\n[green]the same run[/green], within the rounding of {precision}")
    else:
        console.print("\n[red]not the same run")
