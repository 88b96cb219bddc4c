"""Launches of the ops on images and rows of features, at sizes off every grid.

IS: inputs only, as in cases.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flashrt.ops.table import CURSOR_WORDS, IDENTITY, RELU, SILU
from tests.backend.cases import cursor, place_rows, randn, valid
from tests.backend.policy_cases import SEED, words
from tests.backend.runner import Case, rng_for

# Images, height, width, channels, outputs; taps, stride, padding, dilation.
CONVOLUTIONS = (
    ((1, 1, 1, 1, 1), (1, 1), 1, 0, 1),
    ((2, 9, 7, 3, 33), (7, 7), 2, 3, 1),  # a stem
    ((1, 5, 13, 40, 70), (3, 3), 1, 1, 1),
    ((3, 6, 5, 8, 5), (3, 3), 2, 1, 1),
    ((1, 8, 8, 6, 9), (3, 3), 1, 2, 2),  # stride replaced by dilation
    ((2, 7, 9, 16, 12), (1, 1), 2, 0, 1),  # a shortcut
    ((1, 3, 4, 1100, 3), (3, 1), 1, 1, 1),  # more channels than zeros lie ready for
)
ROWS = ((1, 7, 3), (13, 33, 65), (29, 64, 96), (130, 40, 136))  # rows, K, N of dense layers


def conv2d(
    size: tuple[int, int, int, int, int],
    taps: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    activation: int = IDENTITY,
) -> Case:
    B, H, W, C, N = size
    rng = rng_for("conv2d", size, taps)
    K = taps[0] * taps[1] * C
    Y, X = (
        (n + 2 * padding - dilation * (t - 1) - 1) // stride + 1
        for n, t in zip((H, W), taps, strict=True)
    )
    operands = {
        "x": randn(rng, B, H, W, C), "w": randn(rng, N, K, scale=K**-0.5), "b": randn(rng, N),
        "y": (B, Y, X, N),
    }  # fmt: skip
    attrs = {
        "taps_y": taps[0], "taps_x": taps[1], "stride": stride, "padding": padding,
        "dilation": dilation, "activation": activation,
    }  # fmt: skip
    return Case("conv2d", operands, attrs, label=f"conv2d-{size}-{taps}-{activation}")


def added(case: Case) -> Case:
    """The same, added to a y."""
    shape = case.operands["y"]
    assert isinstance(shape, tuple)
    y = randn(rng_for("conv2d_add", shape), *shape)
    return replace(case.but(y=y), op="conv2d_add", label=case.label.replace("2d", "2d_add"))


def rows(T: int, K: int, N: int, activation: int = IDENTITY) -> Case:
    return conv2d((1, T, 1, K, N), (1, 1), activation=activation)


def max_pool(
    B: int, H: int, W: int, C: int, taps: int = 3, stride: int = 2, padding: int = 1
) -> Case:
    Y, X = ((n + 2 * padding - taps) // stride + 1 for n in (H, W))
    x = randn(rng_for("max_pool", H, W, C), B, H, W, C)
    attrs = {"taps": taps, "stride": stride, "padding": padding}
    return Case("max_pool", {"x": x, "y": (B, Y, X, C)}, attrs)


def layer_norm(T: int, C: int) -> Case:
    rng = rng_for("layer_norm", T, C)
    x = randn(rng, T, C) * np.logspace(-1, 2, T, dtype=np.float32)[:, None] + 1
    operands = {"x": x, "w": 1 + randn(rng, C), "b": randn(rng, C), "y": (T, C)}
    return Case("layer_norm", operands, {"eps": 1e-5})


def add_rows(T: int, C: int) -> Case:
    rng = rng_for("add_rows", T, C)
    return Case("add_rows", {"x": randn(rng, T, C), "r": randn(rng, T, C), "y": (T, C)})


def normalize(T: int, C: int, shift: float) -> Case:
    rng = rng_for("normalize", T, C)
    operands = {
        "x": randn(rng, T, C), "mean": randn(rng, C), "std": 0.1 + np.abs(randn(rng, C)),
        "y": (T, C),
    }  # fmt: skip
    return Case("normalize", operands, {"shift": shift})


def attend(T: int, S: int, heads: int, D: int, margin: tuple[int, int] = (0, 0)) -> Case:
    rng = rng_for("attend", T, S, heads, D)
    operands = {
        "q": randn(rng, T, heads * D, scale=2), "k": randn(rng, S, heads * D),
        "v": randn(rng, S, heads * D), "y": (T, heads * D),
    }  # fmt: skip
    return Case("attend", operands, {"heads": heads}, margin=margin)


def attend_patches(T: int, n: int, heads: int, D: int, margin: tuple[int, int] = (0, 0)) -> Case:
    """Rows from n on are NaN: neither asked nor seen."""
    rng = rng_for("attend_patches", n, heads, D)
    rows = (valid(randn(rng, T, heads * D, scale=2), n) for _ in "qkv")
    operands = dict(zip("qkv", rows, strict=True)) | {"cursor": cursor(0, n), "y": (T, heads * D)}
    return Case(
        "attend_patches", operands, {"heads": heads}, margin=margin,
        label=f"attend_patches-{n}/{T}-{heads}x{D}",
    )  # fmt: skip


def image_patches(
    size: tuple[int, int], side: int, patch: int, group: int = 1, *, is_centred: bool = False
) -> Case:
    """A picture fitted into a square, at its right lower corner or in the middle."""
    H, W = size
    ratio = max(W / side, H / side)
    height, width = int(H / ratio), int(W / ratio)
    down, right = side - height, side - width
    attrs: dict[str, int | float] = {
        "side": side, "patch": patch, "group": group, "height": height, "width": width,
        "top": down // 2 if is_centred else down, "left": right // 2 if is_centred else right,
        "fill": -1.0 if is_centred else 0.0,
    }  # fmt: skip
    x = rng_for("image_patches", size, side).random((H, W, 3), np.float32)
    y = ((side // patch) ** 2, 3 * patch**2)
    return Case("image_patches", {"x": x, "y": y}, attrs, label=f"image_patches-{size}-{side}")


def all_rows(rows: int) -> Case:
    return Case("all_rows", {"all": (CURSOR_WORDS,)}, {"rows": rows})


def vision_cases() -> list[Case]:
    """All of them."""
    convolutions = [conv2d(*c, activation=RELU * (i % 2)) for i, c in enumerate(CONVOLUTIONS)]
    convolutions += [rows(*size, activation=a) for size in ROWS for a in (RELU, SILU)]
    return [
        *convolutions, *map(added, convolutions),
        max_pool(2, 7, 9, 5), max_pool(1, 8, 8, 33), max_pool(1, 1, 1, 1),
        layer_norm(1, 1), layer_norm(3, 33), layer_norm(5, 64), layer_norm(2, 1100),
        add_rows(1, 1), add_rows(7, 300), normalize(1, 1, 0.0), normalize(9, 33, 1.0),
        attend(1, 1, 1, 1), attend(9, 33, 2, 5), attend(17, 300, 3, 40, (3, 5)),
        attend(4, 128, 1, 64), attend(3, 70, 2, 160),
        attend_patches(1, 1, 1, 4), attend_patches(64, 33, 2, 8), attend_patches(16, 0, 1, 8),
        attend_patches(96, 70, 1, 72, (4, 8)),
        *(place_rows(T, n, given) for T, n in ((1, 1), (64, 33), (8, 0)) for given in (0, 1)),
        image_patches((24, 32), 16, 4, 2), image_patches((37, 20), 24, 4, is_centred=True),
        image_patches((5, 3), 18, 3, 3), image_patches((16, 16), 16, 8, is_centred=True),
        image_patches((1, 1), 4, 4), image_patches((333, 61), 40, 5, 4), all_rows(0), all_rows(70),
        Case("see", {"cursor": words(tick=9, observed=3, **SEED)}),
    ]  # fmt: skip
