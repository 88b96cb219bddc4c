"""Images of a robot at the size that a policy takes, to the bit of LeRobot's policy server.

IS: a bilinear resize of uint8 without antialiasing, in the arithmetic of torch's `interpolate` for
uint8: columns, then rows; weights in fixed point, as many bits as 16 hold; a rounding after each.
IS NOT: for pictures that users give (vision.pixels). LeRobot's server resizes bytes before it
divides by 255, so a policy behind this one sees the numbers that it would see there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
_MOST_BITS = 22


def resized(image: Pixels, height: int, width: int) -> Pixels:
    """An image [H, W, C] as [height, width, C]."""
    columns = _along(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return np.ascontiguousarray(_along(columns, height))


def _along(x: Pixels, size: int) -> Pixels:
    """Another number of rows [n, ...] -> [size, ...]."""
    n = len(x)
    if n == size:
        return x
    at = np.maximum((n / size) * (np.arange(size) + 0.5) - 0.5, 0)
    first = np.minimum(at.astype(np.int64), n - 1)
    second = np.minimum(first + 1, n - 1)
    share = np.clip(at - first, 0, 1)
    is_edge = first == second  # there the last row has both shares
    near, far = np.where(is_edge, 1.0, 1 - share), np.where(is_edge, 0.0, share)
    bits = _bits(float(max(near.max(), far.max())))
    shape = (size, *(1 for _ in x.shape[1:]))
    near_whole, far_whole = (
        (0.5 + weights * (1 << bits)).astype(np.int32).reshape(shape) for weights in (near, far)
    )
    sums = x[first] * near_whole
    sums += x[second] * far_whole
    sums += 1 << (bits - 1)
    sums >>= bits
    whole: Pixels = np.clip(sums, 0, 255, out=sums).astype(np.uint8)
    return whole


def _bits(largest: float) -> int:
    """Of fixed-point weights: so many that the largest one is below 2**15."""
    bits = 0
    while bits < _MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits
