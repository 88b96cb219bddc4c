"""Quantities as text: bytes, seconds, rates, counts.

IS: formatting, decimal prefixes (1 MB = 10^6 bytes), three significant digits. IS NOT: arithmetic.
"""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def significant(value: float, digits: int = 3) -> str:
    """A number with about `digits` significant digits, never in exponent form; large ones whole."""
    if not math.isfinite(value):
        return str(value)
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 9.996 is 10.0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def bytes_text(nbytes: float) -> str:
    """E.g. `9.44 MB`."""
    scaled, unit = float(nbytes), 0
    while abs(scaled) >= 999.5 and unit + 1 < len(_BYTE_UNITS):
        scaled, unit = scaled / 1000, unit + 1
    return f"{int(nbytes)} B" if unit == 0 else f"{significant(scaled)} {_BYTE_UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """E.g. `37.1 ms`."""
    for scale, unit in _TIME_UNITS:
        if abs(seconds) >= 0.9995 * scale:  # as it reads when rounded
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds / 1e-9)} ns" if seconds else "0 s"


def rate_text(bytes_per_second: float) -> str:
    """E.g. `18.2 GB/s`."""
    return f"{bytes_text(bytes_per_second)}/s"


def percent_text(fraction: float) -> str:
    """E.g. `78%`."""
    return f"{100 * fraction:.0f}%"
