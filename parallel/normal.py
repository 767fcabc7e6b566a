"""Normal numbers that are the same to the last bit on every processor.

`torch.normal_` calls logarithms and cosines whose last bits depend on the processor's vector instructions. Here the
random bits are integers of a counter-based generator, Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), and a table lookup, one multiplication and one addition in float32 turn them into normal numbers;
IEEE 754 prescribes the rounding of each.

The table is the inverse of the normal distribution function, linear between points that lie 128 to each power of two of
the probability (the hierarchical segments of Cheung, Lee, Luk and Villasenor 2007, "Hardware generation of arbitrary
random number distributions from uniform distributions via the inversion method"). So the sixteen leading bits of a
float32 are the number of its segment. Errors of the interpolation are below 1e-5 standard deviations; the largest
number is 6.2 of them.
"""

from __future__ import annotations

import functools
import math
from decimal import Context, Decimal

import numpy as np
import torch
from torch import Tensor

SEGMENTS = 128  # of each power of two: as many as the bits of a float32 below its exponent, in its upper half, count
OCTAVES = 31  # powers of two from the least probability, 2**-32, to one half
BIAS = 127  # of the exponent of a float32


def normal(count: int, key: int) -> Tensor:
    """`count` independent numbers of the standard normal distribution, float32: a function of the 128-bit `key`."""
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8", copy=False)
    # Odd integers of both signs: their magnitudes over 2**32 are probabilities up to one half, none of them 0.
    uniform = torch.from_numpy(words.view("<i4")[:count]).bitwise_or_(1).to(torch.float32)
    segment = uniform.view(torch.uint16)[1::2].to(torch.int32)  # little-endian: the upper half comes second
    start, slope = (values.index_select(0, segment) for values in _table())
    return uniform.mul_(slope).add_(start)


@functools.cache
def _table() -> tuple[Tensor, Tensor]:
    """For the sixteen leading bits of a float32 x, a and b such that a + b x is normal if x is uniform.

    x is a signed probability times 2**32.
    """
    context = Context(prec=28)
    fractions = [1.0 + n / SEGMENTS for n in range(SEGMENTS)]
    logarithms = [context.ln(Decimal(fraction)) for fraction in fractions]
    points, values = [], []
    for octave in range(OCTAVES):
        for fraction, logarithm in zip(fractions, logarithms, strict=True):
            points.append(2.0**octave * fraction)
            values.append(-quantile(points[-1] / 2.0**32, float(context.ln(Decimal(2)) * (octave - 32) + logarithm)))
    points.append(2.0**OCTAVES)
    values.append(0.0)  # half of all numbers are below it
    start, slope = (np.zeros(1 << 16, dtype=np.float32) for _ in range(2))
    negative = 1 << 15
    for n in range(len(points) - 1):
        rise = (values[n + 1] - values[n]) / (points[n + 1] - points[n])
        place = BIAS * SEGMENTS + n
        slope[place] = slope[place | negative] = rise
        start[place] = values[n] - rise * points[n]
        start[place | negative] = -start[place]
    return torch.from_numpy(start), torch.from_numpy(slope)


def quantile(p: float, logarithm: float) -> float:
    """The number that a normal one is below with probability `p`, at most one half, of the given `logarithm`.

    To 1e-15, by Wichura 1988, algorithm AS 241 (PPND16). The square root is one that IEEE 754 prescribes; logarithms
    are not, so the caller takes them in decimal arithmetic, which is software and rounds alike everywhere.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * _polynomial(_A, r) / _polynomial(_B, r)
    r = math.sqrt(-logarithm)
    if r <= 5.0:
        return -_polynomial(_C, r - 1.6) / _polynomial(_D, r - 1.6)
    return -_polynomial(_E, r - 5.0) / _polynomial(_F, r - 5.0)


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """By Horner's rule; the coefficients of the highest power come first."""
    return functools.reduce(lambda value, coefficient: value * x + coefficient, coefficients, 0.0)


# fmt: off
_A = (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
      13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608)
_B = (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
      5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0)
_C = (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
      3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734)
_D = (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
      0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0)
_E = (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
      0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772)
_F = (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
      0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0)
# fmt: on
