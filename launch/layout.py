"""`stoker config --layout`: the place of every rank, for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stoker.parallel.layout import AXES, BatchPlan, Layout

TOGETHER = {
    "pp": "hold the stages of one model",
    "dp_replicate": "hold the same, and sum their gradients",
    "dp_shard": "hold one copy of what ZeRO shards",
    "cp": "share the tokens of every row",
    "tp": "hold a part of every layer",
}


def lines_of(layout: Layout, plan: BatchPlan, width: int) -> Iterator[str]:
    """The axes, the rows of a rank, and the members of every group of every axis, in lines of about `width`."""
    yield f"{layout.world:,} ranks: {layout}" if layout.world > 1 else str(layout)
    micro_batches = _counted(plan.micro_batches, "micro-batch", "micro-batches")
    over = f"{_counted(layout.dp, 'data-parallel rank')}: {plan.rank_rows:,} each, in {micro_batches}"
    yield f"{_counted(plan.rows, 'row')} a step over {over} of {_counted(plan.micro_rows, 'row')}"
    yield ""
    yield f"{'axis':<14}{'size':>7}{'stride':>8}{'groups':>8}  ranks of a group"
    for axis, size in zip(AXES, layout.sizes(), strict=True):
        groups = layout.world // size
        yield f"{axis:<14}{size:>7,}{layout.stride(axis):>8,}{groups:>8,}  {TOGETHER[axis]}"
    for axis in AXES:
        yield ""
        yield from _groups_of(axis, layout, width)
    if layout.ep > 1:
        together = layout.expert_groups()
        yield ""
        yield f"ep: {_counted(len(together), 'group')} of {layout.ep:,}, which hold the experts together; no axis"
        yield from _table("  ", [ranks_in_words(group) for group in together], width)


def _groups_of(axis: str, layout: Layout, width: int) -> Iterator[str]:
    """A line for each place on the other axes but the innermost, along which the groups of the line follow."""
    size = getattr(layout, axis)
    if size == 1:
        yield f"{axis}: no groups, size 1"
        return
    groups = layout.groups(axis)
    others = [other for other in AXES if other != axis and getattr(layout, other) > 1]
    along = others.pop() if others else None
    head = f"{axis}: {_counted(len(groups), 'group')} of {size:,}, stride {layout.stride(axis):,}"
    yield head + (f"; along a line, {along} from 0 to {getattr(layout, along) - 1:,}" if along else "")
    in_words = [ranks_in_words(group) for group in groups]
    widest = max(map(len, in_words))
    per_line = getattr(layout, along) if along else 1
    for start in range(0, len(groups), per_line):
        label = f"  {_place(layout, groups[start][0], others)}"
        words = (text.ljust(widest) for text in in_words[start : start + per_line])
        yield from _table(label, list(words), width)


def _place(layout: Layout, rank: int, axes: Sequence[str]) -> str:
    at = layout.coordinate(rank)
    digits = {axis: len(str(getattr(layout, axis) - 1)) for axis in axes}
    return "".join(f"{axis} {getattr(at, axis):<{digits[axis]}}  " for axis in axes)


def _table(label: str, cells: Sequence[str], width: int) -> Iterator[str]:
    """`label` and beside it `cells`, in columns as wide as the widest, in as many lines as they need."""
    cells = [cell.ljust(max(map(len, cells))) for cell in cells]
    columns = max(1, (width - len(label)) // (len(cells[0]) + 2))
    for start in range(0, len(cells), columns):
        yield (label + "  ".join(cells[start : start + columns])).rstrip()
        label = " " * len(label)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ranks at equal distances in a few characters: `5`, `0-7`, `0,8`, `0,8,16`, `0,8,...,56`."""
    first, last = ranks[0], ranks[-1]
    if len(ranks) == 1:
        return str(first)
    if last - first == len(ranks) - 1:
        return f"{first}-{last}"
    if len(ranks) <= 3:
        return ",".join(map(str, ranks))
    return f"{first},{ranks[1]},...,{last}"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
