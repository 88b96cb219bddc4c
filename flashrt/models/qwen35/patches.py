"""What an image is made into for Qwen3.5's tower: patches, and where they lie.

IS: the arithmetic of transformers' processor (Qwen2VLImageProcessorPil) from resized pixels on, the
size that it resizes to, and the positions of patches as Qwen3_5VisionModel takes them. IS NOT: the
resizing itself, or reading of image files (vision/pixels). Patches that are merged into a token
follow one another: blocks by rows, in a block by rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.models.qwen35.vision_config import VisionConfig

F32 = NDArray[np.float32]
_MOST_ASPECT = 200


@dataclass(frozen=True, slots=True)
class Patches:
    """An image as the tower takes it, of n patches."""

    height: int  # of the image, in tokens
    width: int
    values: F32  # [n, columns]
    places: NDArray[np.int32]  # [n, 2]: row and column of the patch
    rows: NDArray[np.int32]  # [n, 4]: of the learned positions that its own is mixed of
    weights: F32  # [n, 4]


def fitted(c: VisionConfig, height: int, width: int, most_pixels: int) -> tuple[int, int]:
    """(height, width) to resize an image to: multiples of a token's side, about as many pixels as
    it has, within the limits; of `most_pixels` where that is less than the config's.

    Raises ImageError for an image that is 200 times as long as wide, or so long that the least size
    has too many pixels.
    """
    if max(height, width) > _MOST_ASPECT * min(height, width):
        raise ImageError(
            f"the image has {width} x {height} pixels; one side may be {_MOST_ASPECT} times the "
            "other: cut it"
        )
    unit, most = c.patch * c.merge, min(c.most_pixels, most_pixels)
    tall, wide = (round(n / unit) * unit for n in (height, width))
    if tall * wide > most:
        shrink = math.sqrt(height * width / most)
        tall, wide = (max(unit, math.floor(n / shrink / unit) * unit) for n in (height, width))
    elif tall * wide < c.least_pixels:
        grow = math.sqrt(c.least_pixels / (height * width))
        tall, wide = (math.ceil(n * grow / unit) * unit for n in (height, width))
    if tall * wide > most_pixels:
        raise ImageError(
            f"the image has {width} x {height} pixels and would take {tall * wide // unit**2} "
            f"tokens, of {most_pixels // unit**2} that it may have; cut it, or load with a larger "
            "max_positions"
        )
    return tall, wide


def patches_of(c: VisionConfig, pixels: NDArray[np.uint8]) -> Patches:
    """Of resized pixels, [height, width, channels]."""
    height, width, channels = pixels.shape
    tall, wide = height // c.patch, width // c.patch
    level = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    levels = (level - np.array(c.mean, np.float32)) / np.array(c.std, np.float32)
    values = np.stack([levels[pixels[:, :, i], i] for i in range(channels)])
    blocks = (tall // c.merge, c.merge, wide // c.merge, c.merge)
    cut = values.reshape(channels, *blocks[:2], c.patch, *blocks[2:], c.patch)
    cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    cut = np.broadcast_to(cut, (*cut.shape[:5], c.frames, c.patch, c.patch))
    y, x = (
        grid.reshape(blocks).swapaxes(1, 2).reshape(-1)
        for grid in np.mgrid[0:tall, 0:wide].astype(np.int32)
    )
    rows, weights = _mixture(c.side, (y, tall), (x, wide))
    return Patches(
        tall // c.merge,
        wide // c.merge,
        np.ascontiguousarray(cut.reshape(tall * wide, c.columns)),
        np.stack([y, x], axis=1),
        rows,
        weights,
    )


def _mixture(
    side: int, y: tuple[NDArray[np.int32], int], x: tuple[NDArray[np.int32], int]
) -> tuple[NDArray[np.int32], F32]:
    """Learned positions around each patch, corners on corners, and the weights of bilinear
    interpolation. `y`, `x`: the place of each patch along an axis, and how many there are.
    """
    taps, shares = [], []
    for at, count in (y, x):
        source = at.astype(np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        floor = np.floor(source)
        part = source - floor
        first = floor.astype(np.int32)
        taps.append(np.stack([first, np.minimum(first + 1, side - 1)], axis=1))
        shares.append(np.stack([np.float32(1) - part, part], axis=1))
    rows = taps[0][:, :, None] * np.int32(side) + taps[1][:, None, :]
    weights = shares[0][:, :, None] * shares[1][:, None, :]
    return rows.reshape(-1, 4).astype(np.int32), weights.reshape(-1, 4).astype(np.float32)
