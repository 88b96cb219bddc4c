"""Arguments of callers: whether a value is a whole number, or a number, and as which Python number.

IS: the one rule about numbers that all public verbs share: numpy's scalars are numbers, bools and
text are not, a float is no integer. IS NOT: ranges; the caller knows them and words the error.
Without it a `top_k=1.0` or a numpy seed would fail deep inside, after the state has changed.
"""

from __future__ import annotations

import numbers
import operator

import numpy as np


def as_integer(value: object) -> int | None:
    """The whole number as Python's int; None for anything else, floats and bools included."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: object) -> float | None:
    """The number as Python's float, perhaps NaN or infinite; None for anything else."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def shown(value: object) -> str:
    """A value as an error quotes it: its repr, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
