"""Pictures -> pixels: files, bytes and arrays, resized as transformers' processor does it.

IS: decoding and the bicubic resampling of Pillow, an optional dependency. IS NOT: a request to the
network, or what a model makes of pixels (models/qwen35/patches).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.base.files import read_file

# A path, the bytes of a file, or an array [height, width, 3] of 0 to 255.
Picture = str | os.PathLike[str] | bytes | NDArray[np.uint8]
_MOST_PIXELS = 1 << 27  # of a file: what a decoder may be asked to unfold
_MOST_FILE_NBYTES = 256 << 20


def file_of(picture: Picture) -> bytes | None:
    """The bytes of a picture's file; None of an array, which has none. Raises ImageError."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        return None
    if not isinstance(picture, str | os.PathLike):
        raise ImageError(
            f"an image is a path, bytes of a file or an array, not {type(picture).__name__}"
        )
    try:
        return read_file(Path(picture), _MOST_FILE_NBYTES)
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(picture)} cannot be read: {error}") from error


def pixels_of(
    picture: bytes | NDArray[np.uint8], size: Callable[[int, int], tuple[int, int]]
) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] of a file or an array, in the size that `size(height, width)` says.

    Raises ImageError for what is no picture, or cannot be read.
    """
    image_module = _pillow()
    image = _opened(image_module, picture)
    if image.width * image.height > _MOST_PIXELS:
        raise ImageError(
            f"the image has {image.width} x {image.height} pixels, more than {_MOST_PIXELS:,}: "
            "scale it down"
        )
    height, width = size(image.height, image.width)
    try:
        rgb = image.convert("RGB")
        resized = rgb.resize((width, height), image_module.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"the image cannot be decoded: {error}") from error
    return np.asarray(resized, np.uint8)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImageError("images need Pillow: pip install 'flashrt[vision]'") from error
    return Image


def _opened(image_module: Any, picture: bytes | NDArray[np.uint8]) -> Any:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(
                f"an image of {picture.dtype} {picture.shape}, expected uint8 (height, width, 3)"
            )
        if not picture.size:
            raise ImageError(f"an image of no pixels, {picture.shape}")
        return image_module.fromarray(np.ascontiguousarray(picture))
    try:
        return image_module.open(io.BytesIO(picture))
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise ImageError(f"{len(picture):,} bytes cannot be read as an image: {error}") from error
