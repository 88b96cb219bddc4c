"""SigLIP towers alone against transformers, and images put before them against LeRobot.

Cameras of several sizes, pixel shuffle or none, as tools/siglip_golden.py recorded them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.choose import open_backend
from tests.backend.runner import Case, Runner
from tests.golden.expected import assert_close
from tests.siglip_towers import SETS, TowerEngine, images_of

GOLDEN = json.loads((Path(__file__).parent / "siglip.json").read_text())
SEED = 1
IMAGE_TOLERANCE = 1e-6  # of pixels in -3 .. 1


@pytest.fixture(scope="module", params=SETS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TowerEngine]:
    with TowerEngine.of(name, tmp_path_factory.mktemp(name), open_backend("cpu")) as made:
        yield made


def seen_of(name: str) -> NDArray[np.float32]:
    return np.array(GOLDEN[name]["seen"], np.float32)


def test_embeddings_of_all_cameras(name: str, engine: TowerEngine) -> None:
    """Fault: an order of patches, a place, a bias or a norm is another one."""
    assert_close(engine.see(images_of(SETS[name], SEED)), seen_of(name), name)


def test_a_camera_knows_nothing_of_the_others(name: str, engine: TowerEngine) -> None:
    """Fault: a row attends to another camera's, or a sum's order follows the number of rows."""
    images = images_of(SETS[name], SEED)
    together, alone = engine.see(images), engine.see(images[:1])
    assert np.array_equal(together[:1].view(np.uint32), alone.view(np.uint32))


def test_images_are_resized_as_lerobot_does(name: str) -> None:
    """Fault: another place of the image, colour around it, or weight of a neighbour."""
    made, image = SETS[name], images_of(SETS[name], SEED)[0]
    fit, c = made.fits[0], made.config
    attrs = {
        "side": c.side, "patch": c.side, "group": 1, "height": fit.height, "width": fit.width,
        "top": fit.top, "left": fit.left, "fill": fit.fill,
    }  # fmt: skip
    case = Case("image_patches", {"x": image, "y": (1, 3 * c.side**2)}, attrs)
    found = Runner(open_backend("cpu")).run(case)["y"].reshape(3, c.side, c.side)
    wanted = np.array(GOLDEN[name]["square"])
    assert np.abs(found.transpose(1, 2, 0) - wanted).max() <= IMAGE_TOLERANCE


def test_on_the_cuda_kernels(name: str, tmp_path: Path) -> None:
    """The first camera, in precision high."""
    with TowerEngine.of(name, tmp_path, open_backend("simt", "high")) as engine:
        found = engine.see(images_of(SETS[name], SEED)[:1])
    assert_close(found, seen_of(name)[:1], name)
