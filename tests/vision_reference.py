"""Ops on images and rows of features as plain numpy in float64.

IS: written from the formulas of ops/vision. IS NOT: fast, or exact to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashrt.ops.cursor import CursorWord
from tests.policy_reference import words
from tests.reference import Array, Operands, Results, silu

_ACTIVATIONS: tuple[Callable[[Array], Array], ...] = (
    lambda y: y,
    silu,
    lambda y: np.maximum(y, 0),
)


def windows(x: Array, outside: float, taps: tuple[int, int], shape: tuple[int, int], stride: int,
            padding: int, dilation: int = 1) -> Array:  # fmt: skip
    """[B, Y, X, taps_y, taps_x, C]: what each output sees, `outside` beyond the border."""
    reach = [(n - 1) * dilation + 1 for n in taps]
    wide = np.pad(
        x,
        ((0, 0), (padding, padding + reach[0]), (padding, padding + reach[1]), (0, 0)),
        constant_values=outside,
    )
    rows = np.arange(shape[0])[:, None] * stride + np.arange(taps[0]) * dilation
    columns = np.arange(shape[1])[:, None] * stride + np.arange(taps[1]) * dilation
    return wide[:, rows[:, None, :, None], columns[None, :, None, :], :]


def convolved(o: Operands) -> Array:
    _, Y, X, _ = o["y"].shape
    taps = int(o.attrs["taps_y"]), int(o.attrs["taps_x"])
    geometry = (int(o.attrs[name]) for name in ("stride", "padding", "dilation"))
    seen = windows(o["x"], 0.0, taps, (Y, X), *geometry)
    return seen.reshape(*seen.shape[:3], -1) @ o["w"].T + o["b"]


def conv2d(o: Operands) -> Results:
    return {"y": _ACTIVATIONS[int(o.attrs["activation"])](convolved(o))}


def conv2d_add(o: Operands) -> Results:
    return {"y": _ACTIVATIONS[int(o.attrs["activation"])](o["y"] + convolved(o))}


def max_pool(o: Operands) -> Results:
    _, Y, X, _ = o["y"].shape
    taps, stride, padding = (int(o.attrs[name]) for name in ("taps", "stride", "padding"))
    return {"y": windows(o["x"], -np.inf, (taps, taps), (Y, X), stride, padding).max((3, 4))}


def layer_norm(o: Operands) -> Results:
    centred = o["x"] - o["x"].mean(1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + o.attrs["eps"])
    return {"y": centred * scale * o["w"] + o["b"]}


def add_rows(o: Operands) -> Results:
    return {"y": o["x"] + o["r"]}


def normalize(o: Operands) -> Results:
    return {"y": (o["x"] - o["mean"]) / o["std"] - o.attrs["shift"]}


def attend(o: Operands) -> Results:
    heads = int(o.attrs["heads"])
    q, k, v = (o[name].reshape(len(o[name]), heads, -1).swapaxes(0, 1) for name in "qkv")
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    p = np.exp(scores - scores.max(2, keepdims=True))
    y = (p / p.sum(2, keepdims=True)) @ v
    return {"y": y.swapaxes(0, 1).reshape(o["q"].shape)}


def resized(x: Array, height: int, width: int) -> Array:
    """The four pixels around each point, rounded as torch rounds it: an fma of float32."""
    for axis, size in enumerate((height, width)):
        n = x.shape[axis]
        scale = np.float64(np.float32(n) / np.float32(size))
        place = ((np.arange(size) + 0.5) * scale - 0.5).astype(np.float32).clip(0)
        low = np.minimum(place.astype(int), n - 1)
        share = (place - low).astype(float).reshape([-1 if i == axis else 1 for i in range(3)])
        high = np.minimum(low + 1, n - 1)
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def image_patches(o: Operands) -> Results:
    side, patch, group, height, width, top, left = (
        int(o.attrs[name]) for name in ("side", "patch", "group", "height", "width", "top", "left")
    )
    image = np.full((side, side, 3), float(o.attrs["fill"]))
    image[top : top + height, left : left + width] = resized(o["x"], height, width)
    across = side // patch // group
    squares = (2 * image - 1).reshape(across, group, patch, across, group, patch, 3)
    return {"y": squares.transpose(0, 3, 1, 4, 6, 2, 5).reshape(o["y"].shape)}


def all_rows(o: Operands) -> Results:
    cursor = np.zeros(o["all"].shape)
    cursor[CursorWord.ROWS] = o.attrs["rows"]
    return {"all": cursor}


def see(o: Operands) -> Results:
    return {"cursor": words(observed=int(o["cursor"][0]))}


VISION_REFERENCE: dict[str, Callable[[Operands], Results]] = {
    f.__name__: f
    for f in (
        conv2d, conv2d_add, max_pool, layer_norm, add_rows, normalize, attend, see,
        image_patches, all_rows,
    )
}  # fmt: skip
