"""Promise: `linear` on cuda adds in the order that linear.cuh states, however blocks share K.

IS: that order restated in numpy, to the bit, and every division of K among blocks against one block
per tile. IS NOT: which division is chosen, see tests/unit/test_occupancy.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import ManyTile, Shape
from flashrt.base.errors import SealedError
from flashrt.core.groups import Scales
from flashrt.core.region import DType
from tests.backend.cases import cursor, weights
from tests.backend.runner import Case, Runner, bf16_bits, from_bf16, rng_for
from tests.backend.test_formats_simt import Bench, Format, grouped, linear, random_matrix

F32 = NDArray[np.float32]
SLICE, SUPER_SLICE = 256, 2048
FORMS = (
    Format(DType.BF16),
    grouped(DType.U5, 32, Scales.TWO_LEVEL_MIN, 256),
    grouped(DType.E2M1, 16, Scales.E4M3_OVER),  # scales of rows, which come last
    pytest.param(Format(DType.F32), marks=pytest.mark.slow),
    pytest.param(grouped(DType.U6, 16, Scales.TWO_LEVEL, 256), marks=pytest.mark.slow),
    pytest.param(grouped(DType.I8, 64, Scales.F32), marks=pytest.mark.slow),
)


def folded(terms: F32) -> F32:
    """((0 + t0) + t1) + ... over the first axis, each sum rounded."""
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total = total + term
    return total


@pytest.mark.only_on("simt", "simt-high", "cuda", "cuda-high")
@pytest.mark.parametrize("k", [2048, 2048 + 40, 2 * 2048, 3 * 2048 + 300])
@pytest.mark.parametrize("t", [3, 20, 40])
def test_sums_are_folded_by_super_slices(runner: Runner, k: int, t: int) -> None:
    """A slice has one product that is not 0, so that its sum is known whatever a mma does.

    Red: a fold of one level, super-slices of another length, or a last one that is not folded.
    """
    rng = rng_for("super-slices", k, t)
    n, n_slices = 33, -(-k // SLICE)
    at = np.minimum(SLICE * np.arange(n_slices) + rng.integers(0, SLICE, n_slices), k - 1)
    x, w = np.zeros((t, k), np.float32), np.zeros((n, k), np.float32)
    x[:, at] = from_bf16(bf16_bits(rng.standard_normal((t, n_slices))))
    w[:, at] = weights(rng, n, n_slices)
    slices = np.stack([x[:, [i]] * w[:, i] for i in at])  # exact: 8 bits times 8
    supers = [folded(slices[i : i + 8]) for i in range(0, n_slices, 8)]
    wanted = folded(np.stack(supers))
    y = runner.run(Case("linear", {"x": x, "w": w, "cursor": cursor(0, t), "y": (t, n)}))["y"]
    assert (y == wanted).all()
    assert (wanted != folded(slices)).any() == (k > SUPER_SLICE + SLICE)


# ---- divisions of K


def divide(monkeypatch: pytest.MonkeyPatch, tile: ManyTile, parts: int) -> None:
    """From now on `linear` has a tile and K in so many parts, whatever the rows."""
    monkeypatch.setattr(kernels, "many_choice", lambda s: (tile, parts))
    monkeypatch.setattr(kernels, "few_cost", lambda s: np.inf)
    monkeypatch.setattr(kernels, "FEW_TOKENS", 0)


def tiles_of(form: Format) -> tuple[ManyTile, ...]:
    """The largest tile and the smallest."""
    groups = {} if form.groups is None else {"w": form.groups}
    dims = {"T": 40, "N": 150, "K": 1}
    tiles = kernels.many_tiles(Shape("linear", dims, {"w": form.dtype}, {}, DType.BF16, 16, groups))
    return tiles[0], tiles[-1]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "k", [2 * 2048 + 1024, pytest.param(8 * 2048 + 301, marks=pytest.mark.slow)]
)
def test_bits_do_not_depend_on_the_division_of_k(
    monkeypatch: pytest.MonkeyPatch, form: Format, k: int
) -> None:
    """Under random schedules. Red: planes that are folded in the order in which blocks end, a tile
    folded before its last part is done, a counter that is not set back, a part that starts at the
    wrong k or scale, a plane of another tile.
    """
    n = 33 if k > 8192 else 70
    stored, rng = random_matrix(form, n, k), rng_for("divided", str(form))
    x = rng.standard_normal((70, k)).astype(np.float32)
    bench = Bench("bfloat16", seed=7)
    first, last = tiles_of(form)
    wanted = linear(bench, DType.ACT_WIDE, form, stored, x[:20])  # linear_few
    for tile in (first, last):
        for parts in (1, 2, 3) if k < 8192 else (1, 5, 9):
            divide(monkeypatch, tile, parts)
            for t, rows in ((70, 69), (20, 1)):
                y = linear(bench, DType.ACT_WIDE, form, stored, _dead(x[:t], rows), rows)
                assert y[: min(rows, 20)].tobytes() == wanted[:rows].tobytes(), (tile, parts, t)
                if rows > 20:
                    assert np.isfinite(y[:rows]).all()
                assert (np.ascontiguousarray(y[rows:]).view(np.uint32) == 0xFFFFFFFF).all()
    bench.device.close()


def _dead(x: F32, rows: int) -> F32:
    """Rows that are not valid, NaN."""
    copy = x.copy()
    copy[rows:] = np.nan
    return copy


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_shared_sums_are_free_of_races(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Red: a verdict on the last part that threads read while it is written."""
    form = Format(DType.BF16)
    stored, x = random_matrix(form, 33, 4400), rng_for("races").standard_normal((40, 4400))
    bench = Bench("bfloat16", seed=5, is_watched=True)
    divide(monkeypatch, tiles_of(form)[-1], parts)
    y = linear(bench, DType.ACT, form, stored, x.astype(np.float32))
    assert np.isfinite(y).all()
    bench.device.close()


def test_one_workspace_serves_all_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red: an allocation per launch, or one after `seal`."""
    form = Format(DType.BF16)
    stored, x = random_matrix(form, 33, 4400), np.ones((40, 4400), np.float32)
    bench = Bench("bfloat16")
    tile, before = tiles_of(form)[-1], bench.device.counters.allocations
    for parts in (1, 2, 3):
        divide(monkeypatch, tile, parts)
        linear(bench, DType.ACT, form, stored, x)
        assert bench.device.counters.allocations == before + (parts > 1)
    bench.device.close()
    sealed = Bench("bfloat16")
    divide(monkeypatch, tile, 1)
    linear(sealed, DType.ACT, form, stored, x)  # the kernel is compiled
    sealed.device.seal()
    divide(monkeypatch, tile, 2)
    with pytest.raises(SealedError, match="workspace"):
        linear(sealed, DType.ACT, form, stored, x)
    sealed.device.close()
