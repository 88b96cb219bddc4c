"""Resizing: to the bit of torch's, as LeRobot's server does it; digests are recorded."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from flashrt.policy_server.images import resized
from tests.policy_files import uniform
from tests.policy_server.payloads import EXPECTED


@pytest.mark.parametrize("case", EXPECTED["resized"], ids=str)
def test_images_are_torchs(case: list[int]) -> None:
    """Smaller, larger, of odd sizes, of one pixel. Fault: a weight or a rounding."""
    *size, digest = case
    image = ((uniform("image", (*size[:2], 3), sum(size)) + 1) * 128).astype(np.uint8)
    assert zlib.crc32(resized(image, *size[2:]).tobytes()) == digest
