"""Output that a page prints, compared with output that is seen: all but speeds, times, sizes, paths and small rounding.

A comment above a block says what a test does with it:

    <!-- replay: long -->                    in the long tests
    <!-- replay: long; varies: REGEX -->     and text that fits REGEX may be other text
    <!-- replay: only the status: REASON --> and the output is not compared
    <!-- not replayed: REASON -->            never

A line `...` stands for any lines. Numbers with a point, such as losses, may differ by two percent: other processors
round differently. Numbers below 1e-4 are rounding, and may be any such number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.pages import Block

LANGUAGES = ("python", "yaml", "json", "sh", "text")  # of files, commands, and drawings
STARTED = re.compile(r"(stoker|torchrun|python|make|sbatch|export|eval|docker) ")
GAP = "..."
TOLERANCE = 0.02  # relative
ROUNDING = 1e-4
# In this order; each is written over what it stands for.
MASKS = {
    "<rate>": r"[\d,.]+ (?:tokens|tok)/s|[\d,.]+ [kMGT]?B/s",
    "<date>": r"\d{4}-\d\d-\d\d(?: \d\d:\d\d(?::\d\d)?)?",
    "<time>": r"(?:\d+d )?(?:\d+h )?\d+m \d\ds|\d+h \d\dm|\d+d \d\dh|[\d.]+ m?s\b|\b\d+s\b",
    "<size>": r"[\d,.]+ [kMGT]?B\b",
    "<share>": r"(?<=data )\d+%",
    "<path>": r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*",
}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def unclear(block: Block) -> str | None:
    """Why it is not clear what a test has to do with a block, or None."""
    if block.mark.startswith(("not replayed: ", "replay: ")):
        return None if block.commands() or block.mark.startswith("not") else "a replay of no command"
    if block.mark:
        return f"the comment <!-- {block.mark} --> is none of those of tests/transcripts.py"
    if block.commands() or block.language in LANGUAGES:
        return None
    others = [line for line in _whole_lines(block.lines) if not STARTED.match(line)]
    return f"no output of a command with $, no language, and no comment: {others[0]!r}" if others else None


def is_replayed(block: Block) -> bool:
    shown = any(command.output for command in block.commands())
    return bool(block.commands()) and not block.mark.startswith("not replayed") and (shown or bool(block.mark))


def is_long(block: Block) -> bool:
    return block.mark.startswith("replay: long")


def is_compared(block: Block) -> bool:
    return "only the status: " not in block.mark


def varies(block: Block) -> str | None:
    return block.mark.partition("varies: ")[2] or None


def difference(printed: Sequence[str], seen: Sequence[str], varying: str | None = None) -> str | None:
    """The first line of a page that was not seen in its place, or None. `varying` is a pattern of what may differ."""
    chunks: list[list[str]] = [[]]
    for line in printed:
        if line.strip() == GAP:
            chunks.append([])
        else:
            chunks[-1].append(line)
    left = list(seen)
    if len(chunks) == 1:
        return _unequal(chunks[0], left, varying)
    first, *between, last = chunks
    if problem := _unequal(first, left[: len(first)], varying):
        return problem
    del left[: len(first)]
    for chunk in between:
        while _unequal(chunk, left[: len(chunk)], varying):
            if len(left) <= len(chunk):
                return f"not seen: {chunk[0]!r}"
            del left[0]
        del left[: len(chunk)]
    return _unequal(last, left[len(left) - len(last) :] if last else [], varying)


def _unequal(printed: Sequence[str], seen: Sequence[str], varying: str | None) -> str | None:
    for number in range(max(len(printed), len(seen))):
        one, other = ([*lines, None][min(number, len(lines))] for lines in (printed, seen))
        if one is None or other is None or not same(one, other, varying):
            return f"printed {one!r}, seen {other!r}"
    return None


def same(printed: str, seen: str, varying: str | None = None) -> bool:
    """Whether two lines are the same, as far as they must be."""
    one, other = (_masked(line, varying) for line in (printed, seen))
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    return all(_close(a, b) for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True))


def _masked(line: str, varying: str | None) -> str:
    if varying:
        line = re.sub(varying, "<varies>", line)
    for name, pattern in MASKS.items():
        line = re.sub(pattern, name, line)
    return " ".join(line.split())


def _close(printed: str, seen: str) -> bool:
    if printed == seen:
        return True
    if "." not in printed and "e" not in printed:
        return False
    a, b = (float(text.replace(",", "")) for text in (printed, seen))
    return max(abs(a), abs(b)) < ROUNDING or abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _whole_lines(lines: Sequence[str]) -> list[str]:
    """Without blank lines, comments, and lines that continue the one before."""
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
