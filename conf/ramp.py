"""Batch-size ramps: how many sequences each step has, as a function of the step alone.

`batch.ramp=[[8, 1e6], [16, 4e6]]` with `batch.size=32` means 8 sequences a step until a step begins at or behind a
million tokens, then 16 until four million, then 32. Tokens are positions of sequences (`seq_len` each), whether or not
they carry a loss: so no layout, skipped step or resume changes when the batch grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from stoker.conf.schema import Config


@dataclass(frozen=True)
class Ramp:
    """The size of every step, from 1 on."""

    stages: tuple[tuple[int, float], ...]  # sequences a step, and the tokens up to which; the last has no end
    seq_len: int

    @cached_property
    def starts(self) -> list[tuple[int, int, int]]:
        """For each stage its first step, the sequences before it, and its size."""
        found, step, rows = [], 1, 0
        for size, tokens in self.stages:
            found.append((step, rows, size))
            if tokens < math.inf:
                count = max(0, math.ceil((math.ceil(tokens / self.seq_len) - rows) / size))
                step, rows = step + count, rows + count * size
        return found

    @property
    def unit(self) -> int:
        """Sequences of which every step has a multiple."""
        return math.gcd(*(size for size, _ in self.stages))

    def size(self, step: int) -> int:
        """Sequences of step `step`."""
        return next(size for first, _, size in reversed(self.starts) if first <= step)

    def rows_before(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        first, rows, size = next(start for start in reversed(self.starts) if start[0] <= step)
        return rows + (step - first) * size

    def steps_of(self, rows: int) -> int:
        """Steps that so many sequences fill."""
        first, before, size = next(start for start in reversed(self.starts) if start[1] <= rows)
        return first - 1 + (rows - before) // size


def ramp_of(config: Config) -> Ramp:
    """The ramp of `config`; without one every step has `batch.size` sequences."""
    stages = [(int(size), float(tokens)) for size, tokens in config.batch.ramp]
    return Ramp((*stages, (config.batch.size, math.inf)), config.seq_len)


def sizes_of(config: Config) -> list[int]:
    """The sequences that steps of `config` have, each number once, the smallest first."""
    return sorted({size for size, _ in ramp_of(config).stages})


def unit_rows(config: Config) -> int:
    """Sequences of which every step of `config` has a multiple."""
    return ramp_of(config).unit if config.batch.ramp else config.batch.size
