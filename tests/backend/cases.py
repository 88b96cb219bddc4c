"""Launches to try: for each op a builder of random operands, and a list of shapes off every grid.

IS: inputs only; rows at or beyond the valid ones, and positions nobody has written, are NaN.
IS NOT: expected values, see tests/reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType
from flashrt.ops.table import ATTENTION_BLOCK, CURSOR_WORDS, STOP_WORDS, Seen
from tests.backend.runner import Case, bf16_bits, from_bf16, rng_for

Array = NDArray[Any]
ROWS = ((1, 1), (3, 2), (7, 7), (64, 33), (64, 64))  # rows of the launch, valid ones
EPS = 1e-6
# Operands that are written at will.
WORKSPACE = frozenset({"partials", "work", "groups", "members", "products"})
KV = {"bf16": DType.BF16, "f32": DType.F32}


def cursor(position: int, rows: int) -> NDArray[np.int32]:
    words = np.zeros(CURSOR_WORDS, np.int32)
    words[:3] = position, rows, 7
    return words


def randn(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def weights(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Values that bfloat16 can hold."""
    return from_bf16(bf16_bits(randn(rng, *shape)))


def valid(array: Array, n: int) -> Array:
    """The same rows, those from n on replaced by NaN."""
    array[n:] = np.nan
    return array


def read_if(is_read: int, array: Array) -> Array:
    """An operand that stands in where an attribute says that it is not read: NaN there."""
    return array if is_read else np.full_like(array, np.nan)


def embed(T: int, n: int, V: int, H: int, position: int, S: int) -> Case:
    rng = rng_for("embed", T, n, V, H)
    tokens = rng.integers(0, V, T).astype(np.int32)
    tokens[n:] = -(2**31)
    operands = {
        "tokens": tokens, "table": weights(rng, V, H), "cursor": cursor(position, n),
        "journal": (1, S, 1), "x": (T, H),
    }  # fmt: skip
    return Case("embed", operands)


def embed_seen(T: int, n: int, V: int, H: int, position: int, S: int) -> Case:
    """Every third row is no token."""
    case = embed(T, n, V, H, position, S)
    tokens = np.array(case.operands["tokens"])
    tokens[::3] += np.int32(1 << 30)
    seen = valid(randn(rng_for("embed_seen", T, n, H), T, H), n)
    return Case("embed_seen", {**case.operands, "tokens": tokens, "seen": seen})


def place_rows(T: int, n: int, given: int) -> Case:
    rng = rng_for("place_rows", T, n)
    offsets = rng.integers(-9, 9, (T, 3)).astype(np.int32)
    offsets[n:] = -(2**31)
    operands = {
        "offsets": offsets, "growth": np.array([-7], np.int32), "cursor": cursor(40, n),
        "delta": np.array([-12], np.int32), "places": np.full((T, 3), -1, np.int32),
    }  # fmt: skip
    return Case("place_rows", operands, {"given": given}, label=f"place_rows-{n}/{T}-{given}")


def wide(name: str, is_wide: bool) -> dict[str, DType]:
    """An activation operand as a pair, where the backend has bfloat16 for the others."""
    return {name: DType.ACT_WIDE} if is_wide else {}


def rmsnorm(T: int, n: int, H: int, is_wide: bool = False) -> Case:
    rng = rng_for("rmsnorm", T, n, H)
    x = randn(rng, T, H) * np.logspace(-4, 1, T, dtype=np.float32)[:, None]
    operands = {"x": valid(x, n), "w": 1 + randn(rng, H), "cursor": cursor(5, n), "y": (T, H)}
    return Case("rmsnorm", operands, {"eps": EPS}, wide("y", is_wide))


def add_rmsnorm(T: int, n: int, H: int, is_wide: bool = False) -> Case:
    rng = rng_for("add_rmsnorm", T, n, H)
    operands = {
        "x": valid(randn(rng, T, H), n), "r": valid(randn(rng, T, H), n), "w": 1 + randn(rng, H),
        "cursor": cursor(5, n), "y": (T, H),
    }  # fmt: skip
    return Case("add_rmsnorm", operands, {"eps": EPS}, wide("y", is_wide))


def adaptive_rmsnorm(T: int, n: int, H: int, added: int = 1) -> Case:
    rng = rng_for("adaptive_rmsnorm", T, n, H)
    x, r = (valid(randn(rng, T, H), n) for _ in range(2))
    gate, scale, shift = (randn(rng, H) for _ in range(3))
    operands = {
        "x": x, "r": read_if(added, r), "gate": read_if(added, gate), "scale": scale,
        "shift": shift, "cursor": cursor(5, n), "y": (T, H),
    }  # fmt: skip
    return Case("adaptive_rmsnorm", operands, {"eps": EPS, "added": added})


def linear(T: int, n: int, K: int, N: int, is_wide: bool = False) -> Case:
    rng = rng_for("linear", T, n, K, N)
    operands = {
        "x": valid(randn(rng, T, K), n), "w": weights(rng, N, K),
        "cursor": cursor(5, n), "y": (T, N),
    }  # fmt: skip
    return Case("linear", operands, dtypes=wide("x", is_wide))


def conv_window(T: int, n: int, C: int, W: int, margin: tuple[int, int]) -> Case:
    rng = rng_for("conv_window", T, n, C, W)
    operands = {
        "u": valid(randn(rng, T, C), n), "w": randn(rng, W + 1, C), "window": randn(rng, W, C),
        "cursor": cursor(5, n), "y": (T, C),
    }  # fmt: skip
    return Case("conv_window", operands, margin=margin)


def gated_conv(T: int, n: int, C: int, W: int, biased: int = 0, is_wide: bool = False) -> Case:
    rng = rng_for("gated_conv", T, n, C, W)
    operands = {
        "u": valid(randn(rng, T, 3 * C), n), "w": randn(rng, W + 1, C),
        "bias": read_if(biased, randn(rng, C)), "window": randn(rng, W, C), "cursor": cursor(5, n),
        "y": (T, C),
    }  # fmt: skip
    return Case("gated_conv", operands, {"biased": biased}, wide("y", is_wide))


def delta_gates(
    T: int, n: int, heads: tuple[int, int], size: tuple[int, int], margin: tuple[int, int]
) -> Case:
    (Hk, Hv), (dk, dv) = heads, size
    rng = rng_for("delta_gates", T, n, heads, size)
    y = randn(rng, T, 2 * Hk * dk + Hv * dv) * np.logspace(-4, 0, T, dtype=np.float32)[:, None]
    operands = {
        "y": valid(y, n), "a": valid(randn(rng, T, Hv, scale=9), n),
        "b": valid(randn(rng, T, Hv, scale=9), n), "a_log": randn(rng, Hv),
        "dt_bias": randn(rng, Hv), "cursor": cursor(5, n), "decay": (T, Hv), "beta": (T, Hv),
    }  # fmt: skip
    return Case("delta_gates", operands, {"key_heads": Hk, "key_dim": dk}, margin=margin)


def delta_rule(T: int, n: int, heads: tuple[int, int], size: tuple[int, int]) -> Case:
    (Hk, Hv), (dk, dv) = heads, size
    rng = rng_for("delta_rule", T, n, heads, size)
    qk = randn(rng, T, 2, Hk, dk)
    qk /= np.linalg.norm(qk, axis=-1, keepdims=True)
    y = np.concatenate([qk.reshape(T, -1), randn(rng, T, Hv * dv)], axis=1)
    operands = {
        "y": valid(y, n), "decay": valid(rng.random((T, Hv), np.float32), n),
        "beta": valid(rng.random((T, Hv), np.float32), n), "state": randn(rng, Hv, dk, dv),
        "cursor": cursor(5, n), "o": (T, Hv * dv),
    }  # fmt: skip
    return Case("delta_rule", operands, {"key_heads": Hk})


def conv_biased(T: int, n: int, C: int, W: int, margin: tuple[int, int]) -> Case:
    plain = conv_window(T, n, C, W, margin)
    bias = {"b": randn(rng_for("conv_biased", C), C)}
    return replace(plain, op="conv_biased", operands=dict(plain.operands) | bias)


def ssm(
    T: int,
    n: int,
    heads: tuple[int, int],
    size: tuple[int, int],
    margin: tuple[int, int],
    limits: tuple[float, float] = (0.0, np.inf),
) -> Case:
    (groups, Hv), (dk, dv) = heads, size
    rng = rng_for("ssm", T, n, heads, size)
    operands = {
        "y": valid(randn(rng, T, Hv * dv + 2 * groups * dk), n),
        "dt": valid(randn(rng, T, Hv, scale=3), n), "a_log": randn(rng, Hv),
        "dt_bias": randn(rng, Hv), "d": randn(rng, Hv), "state": randn(rng, Hv, dk, dv),
        "cursor": cursor(5, n), "o": (T, Hv * dv),
    }  # fmt: skip
    attrs = {"groups": groups, "dt_min": limits[0], "dt_max": limits[1]}
    return Case("ssm", operands, attrs, margin=margin)


def silu_rmsnorm(
    T: int, n: int, C: int, groups: int, margin: tuple[int, int], is_wide: bool = False
) -> Case:
    rng = rng_for("silu_rmsnorm", T, n, C, groups)
    o = randn(rng, T, C) * np.logspace(-4, 0, T, dtype=np.float32)[:, None]
    operands = {
        "o": valid(o, n), "z": valid(randn(rng, T, C, scale=4), n), "w": 1 + randn(rng, C),
        "cursor": cursor(5, n), "y": (T, C),
    }  # fmt: skip
    attrs = {"groups": groups, "eps": EPS}
    return Case("silu_rmsnorm", operands, attrs, wide("y", is_wide), margin=margin)


def scale_rows(T: int, n: int, N: int, factor: float) -> Case:
    x = valid(randn(rng_for("scale_rows", T, n, N), T, N), n)
    return Case("scale_rows", {"x": x, "cursor": cursor(5, n)}, {"factor": factor})


def gated_rmsnorm(
    T: int, n: int, heads: int, dv: int, margin: tuple[int, int], is_wide: bool = False
) -> Case:
    rng = rng_for("gated_rmsnorm", T, n, heads, dv)
    o = randn(rng, T, heads * dv) * np.logspace(-4, 0, T, dtype=np.float32)[:, None]
    operands = {
        "o": valid(o, n), "z": valid(randn(rng, T, heads * dv, scale=3), n), "w": randn(rng, dv),
        "cursor": cursor(5, n), "y": (T, heads * dv),
    }  # fmt: skip
    return Case("gated_rmsnorm", operands, {"eps": EPS}, wide("y", is_wide), margin=margin)


def inverse_frequencies(R2: int, theta: float = 1e7) -> NDArray[np.float32]:
    return (theta ** (-np.arange(R2) / R2)).astype(np.float32)


def rope_append(
    T: int,
    n: int,
    heads: tuple[int, int],
    D: int,
    R2: int,
    position: int,
    S: int,
    kv: str,
    shift: int = 0,
    form: tuple[int, int, float] = (1, 1, 1.0),
) -> Case:
    """`form`: gated, normed, magnitude."""
    Nq, Nk = heads
    gated, normed, magnitude = form
    rng = rng_for("rope_append", T, n, heads, D, position)
    operands = {
        "u": valid(randn(rng, T, ((1 + gated) * Nq + 2 * Nk) * D), n),
        "q_norm": read_if(normed, 1 + randn(rng, D)), "k_norm": read_if(normed, 1 + randn(rng, D)),
        "inv_freq": inverse_frequencies(R2),
        "cursor": cursor(position, n), "q": (T, Nq, D), "keys": (Nk, S, D), "values": (Nk, S, D),
        "key_scales": (Nk, S, 1), "value_scales": (Nk, S, 1),
    }  # fmt: skip
    dtypes = {"keys": KV[kv], "values": KV[kv]}
    attrs = {
        "eps": EPS, "shift": shift, "gated": gated, "normed": normed, "magnitude": magnitude,
    }  # fmt: skip
    return Case("rope_append", operands, attrs, dtypes)


def rope_placed(
    T: int,
    n: int,
    heads: tuple[int, int],
    D: int,
    R2: int,
    sections: tuple[int, int],
    S: int,
    kv: str,
) -> Case:
    """At position 3; `sections`: pairs by rows and by columns."""
    case = rope_append(T, n, heads, D, R2, 3, S, kv)
    places = rng_for("rope_placed", T, n).integers(0, 90, (T, 3)).astype(np.int32)
    places[n:] = -(2**31)
    attrs = {**case.attrs, "by_rows": sections[0], "by_columns": sections[1]}
    return Case("rope_placed", {**case.operands, "places": places}, attrs, case.dtypes)


def attention(
    T: int,
    n: int,
    heads: tuple[int, int],
    D: int,
    position: int,
    S: int,
    kv: str,
    shift: int = 0,
    gated: int = 1,
    seen: int = Seen.PAST,
) -> Case:
    Nq, Nk = heads
    rng = rng_for("attention", T, n, heads, D, position)
    store = weights if kv == "bf16" else randn
    keys, values = store(rng, Nk, S, D), store(rng, Nk, S, D)
    keys[:, position + n :] = values[:, position + n :] = np.nan
    keys[:, :shift] = values[:, :shift] = np.nan
    blocks = -(-S // ATTENTION_BLOCK)
    u_columns = 2 * (Nq + Nk) * D if gated else Nq * D
    operands = {
        "q": valid(randn(rng, T, Nq, D), n),
        "u": read_if(gated, valid(randn(rng, T, u_columns), n)),
        "keys": keys, "values": values, "cursor": cursor(position, n),
        "partials": (T if T <= 8 else 1, Nq, blocks, D + 2), "y": (T, Nq * D),
        "key_scales": (Nk, S, 1), "value_scales": (Nk, S, 1),
    }  # fmt: skip
    if seen == Seen.BEFORE:
        keys[:, position:] = values[:, position:] = np.nan
    attrs = {"shift": shift, "gated": gated, "seen": seen}
    return Case("attention", operands, attrs, {"keys": KV[kv], "values": KV[kv]})


def rope_rows(
    T: int, n: int, heads: int, D: int, R2: int, placed: int, margin: tuple[int, int] = (0, 0)
) -> Case:
    x = valid(randn(rng_for("rope_rows", T, n, heads, D), T, heads * D), n)
    operands = {
        "x": x, "inv_freq": inverse_frequencies(R2), "cursor": cursor(70, n), "y": (T, heads, D),
    }  # fmt: skip
    return Case("rope_rows", operands, {"placed": placed}, margin=margin)


def append_rows(
    T: int, n: int, heads: int, D: int, position: int, S: int, kv: str,
    margin: tuple[int, int] = (0, 0),
) -> Case:  # fmt: skip
    rng = rng_for("append_rows", T, n, heads, D)
    k, v = (valid(randn(rng, T, heads * D), n) for _ in range(2))
    operands = {
        "k": k, "v": v, "cursor": cursor(position, n), "keys": (heads, S, D),
        "values": (heads, S, D),
    }  # fmt: skip
    return Case("append_rows", operands, {}, {"keys": KV[kv], "values": KV[kv]}, margin=margin)


def experts_of(rng: np.random.Generator, T: int, E: int, P: int) -> NDArray[np.int32]:
    """Picks of random experts, the last of which nobody picks; ascending, as `route` has them."""
    picks = [np.sort(rng.permutation(max(E - 1, P))[:P]) for _ in range(T)]
    return np.array(picks, np.int32)


def picked(picks: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    """The same rows, those from n on replaced by what is no expert."""
    picks[n:] = -(2**31)
    return picks


def route(
    T: int,
    n: int,
    E: int,
    P: int,
    form: tuple[int, int, int] = (0, 0, 1),
    margin: tuple[int, int] = (0, 0),
    eps: float = 0.0,
    scale: float = 1.0,
) -> Case:
    """`form`: scoring, biased, normed."""
    scoring, biased, normed = form
    rng = rng_for("route", T, n, E, P)
    operands = {
        "logits": valid(randn(rng, T, E, scale=2), n),
        "bias": read_if(biased, randn(rng, E, scale=0.3)), "cursor": cursor(5, n),
        "picks": (T, P), "gates": (T, P),
    }  # fmt: skip
    attrs = {"scoring": scoring, "biased": biased, "normed": normed, "eps": eps, "scale": scale}
    return Case("route", operands, attrs, margin=margin)


def experts_in(
    T: int,
    n: int,
    experts: tuple[int, int],
    H: int,
    I: int,  # noqa: E741
    is_wide: bool = False,
) -> Case:
    """`experts`: how many there are, and of them a row's."""
    E, P = experts
    rng = rng_for("experts_in", T, n, experts, H, I)
    operands = {
        "x": valid(randn(rng, T, H), n), "w": weights(rng, 2 * E * I, H),
        "picks": picked(experts_of(rng, T, E, P), n), "cursor": cursor(5, n), "groups": (E, 2),
        "members": (T, P, 2), "h": (T, P, I),
    }  # fmt: skip
    return Case("experts_in", operands, dtypes=wide("x", is_wide) | wide("h", is_wide))


def experts_out(
    T: int,
    n: int,
    experts: tuple[int, int],
    H: int,
    I: int,  # noqa: E741
    is_wide: bool = False,
) -> Case:
    E, P = experts
    rng = rng_for("experts_out", T, n, experts, H, I)
    operands = {
        "h": valid(randn(rng, T, P, I), n), "w": weights(rng, E * H, I),
        "picks": picked(experts_of(rng, T, E, P), n), "gates": valid(randn(rng, T, P), n),
        "cursor": cursor(5, n), "groups": (E, 2), "members": (T, P, 2), "products": (T, P, H),
        "y": (T, H),
    }  # fmt: skip
    return Case("experts_out", operands, dtypes=wide("h", is_wide))


def add_gated(T: int, n: int, H: int, gated: int, margin: tuple[int, int] = (0, 0)) -> Case:
    rng = rng_for("add_gated", T, n, H)
    operands = {
        "y": valid(randn(rng, T, H), n), "x": valid(randn(rng, T, H), n),
        "gate": read_if(gated, valid(randn(rng, T, 1, scale=3), n)), "cursor": cursor(5, n),
    }  # fmt: skip
    return Case("add_gated", operands, {"gated": gated}, margin=margin)


def silu_mul(T: int, n: int, I: int, is_wide: bool = False) -> Case:  # noqa: E741
    rng = rng_for("silu_mul", T, n, I)
    operands = {"u": valid(randn(rng, T, 2 * I, scale=4), n), "cursor": cursor(5, n), "y": (T, I)}
    return Case("silu_mul", operands, dtypes=wide("y", is_wide))


def geglu(T: int, n: int, I: int) -> Case:  # noqa: E741
    rng = rng_for("geglu", T, n, I)
    operands = {"u": valid(randn(rng, T, 2 * I, scale=3), n), "cursor": cursor(5, n), "y": (T, I)}
    return Case("geglu", operands)


def relu_squared(T: int, n: int, I: int, is_wide: bool = False) -> Case:  # noqa: E741
    rng = rng_for("relu_squared", T, n, I)
    operands = {"u": valid(randn(rng, T, I, scale=4), n), "cursor": cursor(5, n), "y": (T, I)}
    return Case("relu_squared", operands, dtypes=wide("y", is_wide))


def activations(T: int, n: int, C: int) -> Case:
    operands = {
        "x": valid(randn(rng_for("activations", T, n, C), T, C), n), "cursor": cursor(5, n),
        "y": (T, C),
    }  # fmt: skip
    return Case("activations", operands)


def mix_rows(T: int, n: int, N: int, C: int) -> Case:
    rng = rng_for("mix_rows", T, n, N, C)
    rows = rng.integers(0, N, (T, 4)).astype(np.int32)
    rows[n:] = -(2**31)
    operands = {
        "table": randn(rng, N, C), "rows": rows, "weights": valid(randn(rng, T, 4), n),
        "cursor": cursor(5, n), "y": (T, C),
    }  # fmt: skip
    return Case("mix_rows", operands)


def add_layer_norm(T: int, n: int, C: int, is_wide: bool = False) -> Case:
    rng = rng_for("add_layer_norm", T, n, C)
    operands = {
        "x": valid(randn(rng, T, C), n), "r": valid(1 + randn(rng, T, C), n),
        "w": 1 + randn(rng, C), "b": randn(rng, C), "cursor": cursor(5, n), "y": (T, C),
    }  # fmt: skip
    return Case("add_layer_norm", operands, {"eps": EPS}, wide("y", is_wide))


def gelu(T: int, n: int, I: int, tanh: int) -> Case:  # noqa: E741
    rng = rng_for("gelu", T, n, I)
    operands = {"u": valid(randn(rng, T, I, scale=3), n), "cursor": cursor(5, n), "y": (T, I)}
    return Case("gelu", operands, {"tanh": tanh})


def turn_patches(T: int, n: int, heads: int, R: int, margin: tuple[int, int]) -> Case:
    rng = rng_for("turn_patches", T, n, heads, R)
    places = rng.integers(0, 99, (T, 2)).astype(np.int32)
    places[n:] = -(2**31)
    operands = {
        "x": valid(randn(rng, T, 4 * R * heads), n), "places": places,
        "inv_freq": 10.0 ** -np.linspace(0, 4, R, dtype=np.float32), "cursor": cursor(5, n),
    }  # fmt: skip
    return Case("turn_patches", operands, margin=margin)


def add_bias(T: int, n: int, N: int) -> Case:
    rng = rng_for("add_bias", T, n, N)
    operands = {"x": valid(randn(rng, T, N), n), "b": randn(rng, N), "cursor": cursor(5, n)}
    return Case("add_bias", operands)


def last_row(T: int, n: int, H: int) -> Case:
    x = valid(randn(rng_for("last_row", T, n, H), T, H), n)
    return Case("last_row", {"x": x, "cursor": cursor(5, n), "y": (1, H)})


def last_values(T: int, n: int, C: int, margin: tuple[int, int]) -> Case:
    x = valid(randn(rng_for("last_values", T, n, C), T, C), n)
    operands = {"x": x, "cursor": cursor(5, n), "y": (1, C)}
    return Case("last_values", operands, margin=margin)


def keep_rows(T: int, n: int, H: int) -> Case:
    x = valid(randn(rng_for("keep_rows", T, n, H), T, H), n)
    return Case("keep_rows", {"x": x, "cursor": cursor(5, n), "y": (T, H)})


def keep_values(T: int, n: int, C: int, margin: tuple[int, int]) -> Case:
    x = valid(randn(rng_for("keep_values", T, n, C), T, C), n)
    operands = {"x": x, "cursor": cursor(5, n), "y": (T, C)}
    return Case("keep_values", operands, margin=margin)


def last_cursor(T: int, n: int, position: int) -> Case:
    return Case("last_cursor", {"cursor": cursor(position, n), "last": (CURSOR_WORDS,)})


def advance(position: int, n: int) -> Case:
    return Case("advance", {"cursor": cursor(position, n)})


def hold(token: int, *stops: int) -> Case:
    held = cursor(7, 1)
    held[2] = token
    words = np.full(STOP_WORDS, token, np.int32)  # beyond those that count, anything
    words[: len(stops) + 1] = len(stops), *stops
    return Case("hold", {"stops": words, "cursor": held}, label=f"hold[{token},{stops}]")


HOLDS = (hold(5), hold(5, 4, 5), hold(5, 4, 6), hold(-1), hold(3, *[9] * 14, 3), hold(0, 9))
Shapes = tuple[dict[str, Any], ...]
Grid = tuple[tuple[Callable[..., Case], Shapes], ...]

DELTA: Shapes = (
    {"heads": (2, 4), "size": (16, 16)},
    {"heads": (3, 3), "size": (32, 16)},
    {"heads": (1, 2), "size": (100, 60)},
    {"heads": (1, 2), "size": (128, 128)},
)
GRID: Grid = (
    (embed, (
        {"V": 77, "H": 96, "position": 0, "S": 70}, {"V": 500, "H": 40, "position": 31, "S": 100},
    )),
    (rmsnorm, ({"H": 96}, {"H": 1024}, {"H": 200}, {"H": 256, "is_wide": True})),
    (add_rmsnorm, ({"H": 96}, {"H": 200}, {"H": 256, "is_wide": True})),
    (linear, (
        {"K": 96, "N": 200}, {"K": 200, "N": 77}, {"K": 520, "N": 33},
        {"K": 264, "N": 40, "is_wide": True},
    )),
    (conv_window, ({"C": 240, "W": 3, "margin": (0, 0)}, {"C": 64, "W": 1, "margin": (8, 16)})),
    (delta_gates, tuple(shape | {"margin": (i, 2 * i)} for i, shape in enumerate(DELTA))),
    (delta_rule, DELTA),
    (gated_rmsnorm, (
        {"heads": 4, "dv": 16, "margin": (0, 0)}, {"heads": 3, "dv": 60, "margin": (4, 4)},
        {"heads": 2, "dv": 128, "margin": (0, 8)},
        {"heads": 3, "dv": 60, "margin": (0, 4), "is_wide": True},
    )),
    (rope_append, (
        {"heads": (4, 2), "D": 32, "R2": 4, "position": 0, "S": 77, "kv": "bf16"},
        {"heads": (6, 3), "D": 80, "R2": 10, "position": 13, "S": 77, "kv": "f32"},
        {"heads": (2, 1), "D": 256, "R2": 32, "position": 31, "S": 100, "kv": "bf16"},
        {"heads": (2, 2), "D": 80, "R2": 40, "position": 63, "S": 130, "kv": "bf16"},
        {"heads": (2, 2), "D": 32, "R2": 16, "position": 32, "S": 130, "kv": "f32"},
        {"heads": (3, 1), "D": 96, "R2": 48, "position": 3, "S": 77, "kv": "f32",
         "form": (0, 1, 1.0)},
        {"heads": (9, 3), "D": 64, "R2": 32, "position": 250, "S": 330, "kv": "bf16",
         "form": (0, 0, 1.25)},
        {"heads": (2, 1), "D": 128, "R2": 16, "position": 9, "S": 77, "kv": "f32",
         "form": (1, 0, 0.5)},
    )),
    (attention, (
        {"heads": (4, 2), "D": 32, "position": 0, "S": 77, "kv": "bf16"},
        {"heads": (6, 3), "D": 80, "position": 13, "S": 77, "kv": "f32"},
        {"heads": (2, 1), "D": 256, "position": 240, "S": 700, "kv": "bf16"},
        {"heads": (2, 2), "D": 32, "position": 600, "S": 700, "kv": "f32"},
        {"heads": (12, 1), "D": 64, "position": 250, "S": 600, "kv": "bf16"},
        {"heads": (4, 1), "D": 128, "position": 230, "S": 600, "kv": "f32"},
        {"heads": (9, 3), "D": 64, "position": 250, "S": 600, "kv": "bf16", "gated": 0},
        {"heads": (7, 1), "D": 96, "position": 300, "S": 600, "kv": "f32", "gated": 0},
        {"heads": (6, 2), "D": 64, "position": 0, "S": 600, "kv": "f32", "gated": 0,
         "seen": Seen.LAUNCH},
        {"heads": (3, 1), "D": 32, "position": 250, "S": 600, "kv": "bf16", "gated": 0,
         "seen": Seen.LAUNCH},
        {"heads": (6, 2), "D": 64, "position": 270, "S": 600, "kv": "f32", "gated": 0,
         "seen": Seen.BEFORE},
        {"heads": (4, 2), "D": 24, "position": 0, "S": 600, "kv": "bf16", "seen": Seen.BEFORE},
    )),
    (rope_rows, (
        {"heads": 3, "D": 64, "R2": 32, "placed": 0, "margin": (4, 8)},
        {"heads": 1, "D": 24, "R2": 6, "placed": 1},
    )),
    (append_rows, (
        {"heads": 2, "D": 64, "position": 30, "S": 110, "kv": "f32", "margin": (4, 8)},
        {"heads": 3, "D": 24, "position": 0, "S": 70, "kv": "bf16"},
    )),
    (silu_mul, ({"I": 200}, {"I": 1024}, {"I": 264, "is_wide": True})),
    (add_bias, ({"N": 96}, {"N": 1000})),
    (last_row, ({"H": 96}, {"H": 200})),
    (last_values, ({"C": 96, "margin": (0, 0)}, {"C": 200, "margin": (4, 8)})),
    (last_cursor, ({"position": 0}, {"position": 40})),
    (keep_rows, ({"H": 96}, {"H": 200})),
    (keep_values, ({"C": 96, "margin": (0, 0)}, {"C": 200, "margin": (4, 8)})),
    (gated_conv, (
        {"C": 200, "W": 2}, {"C": 64, "W": 3, "biased": 1}, {"C": 136, "W": 2, "is_wide": True},
    )),
    (conv_biased, ({"C": 240, "W": 3, "margin": (0, 0)}, {"C": 64, "W": 1, "margin": (8, 16)})),
    (ssm, (
        {"heads": (1, 3), "size": (16, 16), "margin": (3, 2)},
        {"heads": (2, 4), "size": (32, 64), "margin": (0, 0), "limits": (0.1, 0.5)},
        {"heads": (1, 2), "size": (256, 64), "margin": (0, 4)},
    )),
    (silu_rmsnorm, (
        {"C": 64, "groups": 1, "margin": (0, 0)}, {"C": 1100, "groups": 1, "margin": (0, 5)},
        {"C": 180, "groups": 3, "margin": (0, 4), "is_wide": True},
    )),
    (scale_rows, ({"N": 96, "factor": 12.0}, {"N": 1000, "factor": 0.3})),
    (relu_squared, ({"I": 200}, {"I": 1028, "is_wide": True})),
    (activations, ({"C": 96},)),
    (mix_rows, ({"N": 36, "C": 96},)),
    (add_layer_norm, ({"C": 96}, {"C": 1152, "is_wide": True})),
    (geglu, ({"I": 200}, {"I": 1024})),
    (adaptive_rmsnorm, ({"H": 96}, {"H": 1024}, {"H": 200, "added": 0})),
    (gelu, ({"I": 200, "tanh": 0}, {"I": 304, "tanh": 1})),
    (turn_patches, (
        {"heads": 2, "R": 16, "margin": (0, 0)}, {"heads": 3, "R": 18, "margin": (4, 8)},
    )),
    (embed_seen, ({"V": 300, "H": 96, "position": 5, "S": 75},)),
    (rope_placed, (
        {"heads": (4, 2), "D": 64, "R2": 16, "sections": (5, 5), "S": 75, "kv": "bf16"},
        {"heads": (3, 1), "D": 24, "R2": 6, "sections": (2, 1), "S": 70, "kv": "f32"},
    )),
    (route, (
        {"E": 32, "P": 4}, {"E": 256, "P": 8, "margin": (0, 1)},
        {"E": 32, "P": 4, "form": (1, 1, 1), "eps": 1e-6, "scale": 1.5},
        {"E": 512, "P": 10, "form": (0, 0, 0)}, {"E": 64, "P": 6, "form": (1, 0, 0), "scale": 2.5},
        {"E": 60, "P": 22, "form": (0, 1, 1), "margin": (3, 2)},
    )),
    (experts_in, (
        {"experts": (8, 3), "H": 96, "I": 32}, {"experts": (32, 4), "H": 200, "I": 64},
        {"experts": (4, 4), "H": 520, "I": 32, "is_wide": True},
    )),
    (experts_out, (
        {"experts": (8, 3), "H": 96, "I": 32}, {"experts": (32, 4), "H": 32, "I": 320},
        {"experts": (4, 4), "H": 160, "I": 64, "is_wide": True},
    )),
    (add_gated, ({"H": 96, "gated": 1, "margin": (1, 2)}, {"H": 1000, "gated": 0})),
)  # fmt: skip

# Sizes that are no multiple of anything, for scalar tails.
ODD: Grid = (
    (embed, ({"V": 33, "H": 7, "position": 5, "S": 75},)),
    (rmsnorm, ({"H": 7}, {"H": 251})),
    (add_rmsnorm, ({"H": 33},)),
    (linear, ({"K": 33, "N": 5},)),
    (conv_window, ({"C": 37, "W": 3, "margin": (5, 3)},)),
    (delta_gates, ({"heads": (2, 18), "size": (9, 5), "margin": (1, 0)},)),
    (delta_rule, ({"heads": (1, 3), "size": (9, 5)},)),
    (gated_rmsnorm, ({"heads": 3, "dv": 21, "margin": (1, 1)},)),
    (
        rope_append,
        (
            {"heads": (2, 1), "D": 33, "R2": 5, "position": 31, "S": 99, "kv": "bf16"},
            {
                "heads": (2, 1),
                "D": 33,
                "R2": 1,
                "position": 31,
                "S": 99,
                "kv": "bf16",
                "form": (0, 0, 2.0),
            },
        ),
    ),
    (silu_mul, ({"I": 37}, {"I": 45, "is_wide": True})),
    (add_bias, ({"N": 37},)),
    (last_row, ({"H": 33},)),
    (last_values, ({"C": 37, "margin": (1, 3)},)),
    (keep_rows, ({"H": 33},)),
    (keep_values, ({"C": 37, "margin": (1, 3)},)),
    (gated_conv, ({"C": 37, "W": 2}, {"C": 33, "W": 7, "biased": 1})),
    (conv_biased, ({"C": 37, "W": 3, "margin": (5, 3)},)),
    (ssm, ({"heads": (3, 6), "size": (9, 5), "margin": (1, 0)},)),
    (silu_rmsnorm, ({"C": 111, "groups": 3, "margin": (1, 1)},)),
    (scale_rows, ({"N": 37, "factor": -0.7},)),
    (relu_squared, ({"I": 37}, {"I": 45, "is_wide": True})),
    (activations, ({"C": 37},)),
    (mix_rows, ({"N": 5, "C": 37},)),
    (add_layer_norm, ({"C": 37},)),
    (geglu, ({"I": 45},)),
    (adaptive_rmsnorm, ({"H": 33}, {"H": 7, "added": 0})),
    (gelu, ({"I": 37, "tanh": 0}, {"I": 45, "tanh": 1})),
    (turn_patches, ({"heads": 3, "R": 5, "margin": (1, 3)},)),
    (embed_seen, ({"V": 33, "H": 7, "position": 5, "S": 75},)),
    (rope_rows, ({"heads": 2, "D": 33, "R2": 5, "placed": 1, "margin": (1, 3)},)),
    (append_rows, ({"heads": 2, "D": 33, "position": 31, "S": 99, "kv": "f32", "margin": (3, 1)},)),
    (route, ({"E": 5, "P": 5}, {"E": 37, "P": 1, "form": (1, 1, 0)})),
    (experts_in, ({"experts": (5, 2), "H": 33, "I": 32},)),
    (experts_out, ({"experts": (1, 1), "H": 32, "I": 32},)),
    (add_gated, ({"H": 37, "gated": 1},)),
)


def all_cases(grid: Grid = GRID) -> list[Case]:
    """Every shape; all row counts for the first of an op, two of them for the others."""
    cases = []
    for build, shapes in grid:
        for i, shape in enumerate(shapes):
            for T, n in ROWS if i == 0 else (ROWS[1 + i % 2], ROWS[3]):
                case = build(T, n, **shape)
                text = ",".join(f"{k}={v}" for k, v in shape.items())
                cases.append(replace(case, label=f"{case.op}[{n}/{T} rows,{text}]"))
    return cases
