"""When a finite loss or gradient norm counts as a spike.

The rule: above median + k x 1.4826 x MAD of the last `window` steps that were sound, where MAD is the median absolute
deviation and 1.4826 makes it a standard deviation for normal numbers (Leys et al. 2013, "Detecting outliers: do not use
standard deviation around the mean, use absolute deviation around the median"). Spikes in the window hardly move it. All
ranks have the same steps, so they compute the same ceilings; a step that exceeds them is left out on the device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEAST_STEPS = 20  # fewer steps give no ceiling
LEAST_SPREAD = 0.01  # of the median: noise on a plateau is no spike

Seen = tuple[int, float, float]  # step, loss, gradient norm


def ceilings(seen: Sequence[Sequence[float]], step: int, k: float | None, window: int) -> tuple[float, float]:
    """The largest loss and gradient norm that `step` may have; infinity while there are too few steps, or without `k`.

    Step - 1 is never used: whether its result has been read depends on when the run was saved.
    """
    known = [entry for entry in seen if entry[0] <= step - 2][-window:]
    if k is None or len(known) < LEAST_STEPS:
        return math.inf, math.inf
    loss, norm = (_ceiling([entry[column] for entry in known], k) for column in (1, 2))
    return loss, norm


def _ceiling(values: list[float], k: float) -> float:
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return median + k * max(deviation, LEAST_SPREAD * abs(median))
