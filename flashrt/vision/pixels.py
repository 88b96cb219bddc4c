"""Pictures -> pixels: files, bytes and arrays, resized as transformers' processor does it.

IS: decoding and the bicubic resampling of Pillow, an optional dependency; which files are taken. IS
NOT: a request to the network, or what a model makes of pixels (models/qwen35/patches).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.base.files import read_file

# A path, the bytes of a file, or an array [height, width, 3] of 0 to 255.
Picture = str | os.PathLike[str] | bytes | NDArray[np.uint8]
_MOST_FILE_NBYTES = 256 << 20
_ORIENTATION, _UPRIGHT = 0x0112, 1  # of EXIF: how a camera was held


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which files are taken. most_pixels: what a decoder may be asked to unfold. formats: by the
    names that Pillow has for them; None is all that it reads.
    """

    most_pixels: int = 1 << 27
    formats: tuple[str, ...] | None = None


ANY = Bounds()


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
    picture: bytes | NDArray[np.uint8],
    size: Callable[[int, int], tuple[int, int]],
    bounds: Bounds = ANY,
) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] of a file or an array, in the size that `size(height, width)` says:
    the first frame, turned as its camera noted.

    Raises ImageError for what is no picture, is beyond the bounds, or cannot be read.
    """
    image_module = _pillow()
    image = _opened(image_module, picture, bounds)
    if image.width * image.height > bounds.most_pixels:
        raise ImageError(
            f"the image has {image.width} x {image.height} pixels, more than "
            f"{bounds.most_pixels:,}: scale it down"
        )
    try:
        image.load()
        image = _turned(image)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders of some thirty formats: damaged files raise anything
        raise ImageError(f"the image cannot be decoded: {_reason(error)}") from error
    height, width = size(image.height, image.width)
    return np.asarray(rgb.resize((width, height), image_module.Resampling.BICUBIC), np.uint8)


def _turned(image: Any) -> Any:
    """Upright: cameras note how they were held, and store rows as the sensor has them."""
    from PIL import ImageOps

    try:
        is_upright = image.getexif().get(_ORIENTATION, _UPRIGHT) == _UPRIGHT
    except Exception:  # a note that cannot be read turns nothing
        return image
    return image if is_upright else ImageOps.exif_transpose(image)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImageError("images need Pillow: pip install 'flashrt[vision]'") from error
    return Image


def _opened(image_module: Any, picture: bytes | NDArray[np.uint8], bounds: Bounds) -> Any:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ImageError(
                f"an image of {picture.dtype} {picture.shape}, expected uint8 (height, width, 3)"
            )
        if not picture.size:
            raise ImageError(f"an image of no pixels, {picture.shape}")
        return image_module.fromarray(np.ascontiguousarray(picture))
    try:
        return image_module.open(io.BytesIO(picture), formats=bounds.formats)
    except image_module.DecompressionBombError as error:
        raise ImageError(f"the image has too many pixels: scale it down ({error})") from error
    except Exception as error:  # as above
        kinds = "" if bounds.formats is None else f" in {', '.join(bounds.formats)}"
        raise ImageError(
            f"{len(picture):,} bytes cannot be read as an image{kinds}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What a decoder says; not where its buffer lies in memory."""
    return "no format that is known" if "<_io" in str(error) else f"{error}" or repr(error)
