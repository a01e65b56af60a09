"""The tables of frequencies that the format fixes: two families of 63 spreads, a fourth of an octave apart.

Family 0 is Gaussian, family 1 Laplacian. They are computed with whole numbers only: every platform has the same.
"""

from functools import cache
from math import isqrt
from typing import Any

import numpy as np

from graftllm.compression.entropy import FREQUENCIES, low_bits, perfect_model

SILENT = 0  # the table of a row that is all zeros: nothing is coded
LOUDEST = 63
FAMILIES = 2
CLASSES = 4 * 31 - 4  # those of folded values below 2 ** 31
_ONE = 1 << 64
_NUMBERS = np.arange(CLASSES)
_OPEN = np.array([low_bits(number) if number >= 8 else 0 for number in range(CLASSES)])  # bits that a class leaves open
SIZES = (1 << _OPEN).astype(np.int32)  # how many folded values each class holds
STARTS = np.where(_NUMBERS < 8, _NUMBERS, 4 + _NUMBERS % 4 << _OPEN).astype(np.int32)  # the least of them
# 2 ** 64 * 2 ** -(2 ** (i / 4)) for i = 0 to 3, rounded
_ROOTS = (9223372036854775808, 8089705464700925726, 6921480822830546630, 5749758898252946309)


def table_frequencies(family: int, table: int, classes: int) -> np.ndarray:
    """Return a table's frequencies: whole numbers of at least 1 that sum to 2 ** 16.

    With magnitude q and spread s, class weights are its number of values times exp(-q^2 / 2 s^2) (family 0)
    or exp(-sqrt(2) q / s) (family 1), s close to 2 ** ((table - 17) / 4).

    Args:
        family: 0 or 1.
        table: 1 to 63.
        classes: how many of the first classes there are.
    """
    weights = np.array(_weights(family, table, classes), dtype=object)
    frequencies = np.maximum(1, weights * FREQUENCIES // weights.sum()).astype(np.int64)
    frequencies[np.argmax(frequencies)] += FREQUENCIES - frequencies.sum()
    return frequencies


@cache
def table_model(family: int, table: int, classes: int) -> Any:
    """Return the coder's model of a table."""
    return perfect_model(table_frequencies(family, table, classes))


@cache
def table_bits(family: int, classes: int) -> np.ndarray:
    """Return the bits that a value of each class takes under each table but silence, shape (63, classes)."""
    frequencies = [table_frequencies(family, table, classes) for table in range(1, LOUDEST + 1)]
    return np.log2(FREQUENCIES) - np.log2(np.stack(frequencies)) + _OPEN[:classes]


@cache
def _weights(family: int, table: int, classes: int) -> list[int]:
    """Return class weights in units of 2 ** -64; w = rho ** (m ** 2) or rho ** m, m four times the magnitude."""
    rho = _root(16 - 2 * table) if family == 0 else _root(13 - table)
    weights = []
    for number in range(classes):
        low, width = int(STARTS[number]), int(SIZES[number])
        m = 4 * ((number + 1) // 2) if number < 8 else 2 * low + width
        weights.append(width * _power(rho, m * m if family == 0 else m))
    return weights


@cache
def _root(quarters: int) -> int:
    """Return 2 ** -(2 ** (quarters / 4)) in units of 2 ** -64: four constants, squared or their whole square roots."""
    if quarters > 3:
        return _root(quarters - 4) ** 2 >> 64
    if quarters < 0:
        return isqrt(_root(quarters + 4) << 64)
    return _ROOTS[quarters]


def _power(rho: int, exponent: int) -> int:
    """Return rho ** exponent, both in units of 2 ** -64, truncated at every step."""
    power = _ONE
    while exponent and power:
        if exponent & 1:
            power = power * rho >> 64
        rho = rho * rho >> 64
        exponent >>= 1
    return power
