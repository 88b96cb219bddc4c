"""Runs recorded tapes in plain numpy float32: every op as its formula, slow and obvious.

IS: an independent check that a model's regions and tapes compute the model. IS NOT: exact to the
bit, or a backend. Called by: test_tapes.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.core.op import Launch
from flashrt.core.region import DType, Layout, Region, Role, View
from flashrt.core.tape import Tape
from flashrt.models import Model
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.loader import load

Array = NDArray[np.generic]
F32 = np.float32
_NUMPY = {DType.I32: np.int32, DType.U32: np.uint32}


class TapeInterpreter:
    """One lane of a model; every byte that nobody wrote is NaN, apart from a zeroed fixed band."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.memory: dict[Region, Array] = {}
        load(model.weights, checkpoint, self._store)
        for region in model.lane_regions:
            self.memory[region] = self._blank(region)
        self.lane = {r.name: self.memory[r] for r in model.lane_regions}

    def prefill(self, tokens: list[int]) -> None:
        """Feed tokens through the largest bucket, piece by piece."""
        rows = max(self.model.buckets)
        for start in range(0, len(tokens), rows):
            piece = tokens[start : start + rows]
            bucket = min(b for b in self.model.buckets if b >= len(piece))
            self.lane["tokens"][...] = -1  # rows beyond the piece must not be read
            self.lane["tokens"][: len(piece)] = piece
            self.lane["cursor"][1] = len(piece)
            self.run(self.model.record("prefill", bucket))

    def sample(self) -> NDArray[np.float32]:
        """Logits of the next position; the greedy token goes to the cursor."""
        self.run(self.model.record("sample", 1))
        return self.lane["logits"][0].copy()

    def decode(self) -> NDArray[np.float32]:
        """Feed the token sampled last; logits of the next position."""
        self.lane["cursor"][1] = 1
        self.run(self.model.record("decode", 1))
        return self.lane["logits"][0].copy()

    def run(self, tape: Tape) -> None:
        """All launches of a tape."""
        for region in tape.lifetimes():
            self.memory[region] = self._blank(region)
        for launch in tape.launches:
            operands = {
                p.name: self._array(v)
                for p, v in zip(launch.op.params, launch.operands, strict=True)
            }
            attrs = {a.name: v for a, v in zip(launch.op.attrs, launch.attrs, strict=True)}
            _KERNELS[launch.op.name](_Operands(launch, operands, attrs))

    def _store(self, region: Region, first_row: int, rows: Array) -> None:
        values = rows.view(ml_dtypes.bfloat16) if region.layout is Layout.MATRIX else rows
        self.memory.setdefault(region, np.full(region.shape, np.nan, F32))
        self.memory[region][first_row : first_row + len(rows)] = values.astype(F32)

    @staticmethod
    def _blank(region: Region) -> Array:
        dtype = _NUMPY.get(region.dtype, F32)
        poison = np.nan if dtype is F32 else 0
        return np.full(region.shape, 0 if region.role is Role.FIXED else poison, dtype)

    def _array(self, view: View) -> Array:
        array = self.memory[view.region]
        start = view.lead * (array.size // array.shape[0]) + view.col
        strides = [array.itemsize]
        for axis, extent in enumerate(reversed(view.shape[1:])):
            strides.append(view.row_stride * array.itemsize if axis == 0 else strides[-1] * extent)
        flat = array.reshape(-1)[start:]
        return np.lib.stride_tricks.as_strided(flat, view.shape, strides[::-1])


class _Operands:
    """Operands of a launch by name; `t` the valid rows, `p` the position of the first."""

    def __init__(
        self, launch: Launch, operands: dict[str, Array], attrs: dict[str, int | float]
    ) -> None:
        self.by_name, self.attrs, self.dims = operands, attrs, launch.dims
        self.p, self.t = (int(n) for n in operands["cursor"][:2])

    def __getitem__(self, name: str) -> Array:
        return self.by_name[name]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _normed(x: Array, w: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + F32(eps)) * w


def _embed(o: _Operands) -> None:
    tokens = o["tokens"][: o.t]
    o["x"][: o.t] = o["table"][tokens]
    o["journal"][0, o.p : o.p + o.t, 0] = tokens


def _rmsnorm(o: _Operands) -> None:
    o["y"][: o.t] = _normed(o["x"][: o.t], o["w"], o.attrs["eps"])


def _add_rmsnorm(o: _Operands) -> None:
    o["x"][: o.t] += o["r"][: o.t]
    _rmsnorm(o)


def _linear(o: _Operands) -> None:
    rows = min(o.t, len(o["x"]))  # the head has one row whatever the cursor says
    o["y"][:rows] = o["x"][:rows] @ o["w"].T


def _conv_window(o: _Operands) -> None:
    window, w = o["window"], o["w"]
    full = np.concatenate([window, o["u"][: o.t]])
    y = sum(full[j : j + o.t] * w[j] for j in range(len(w)))
    o["y"][: o.t] = y * _sigmoid(y)
    window[...] = full[len(full) - len(window) :]


def _delta_gates(o: _Operands) -> None:
    heads, size = int(o.attrs["key_heads"]), int(o.attrs["key_dim"])
    qk = o["y"][: o.t, : 2 * heads * size].reshape(o.t, 2, heads, size).copy()
    qk /= np.sqrt(np.sum(qk * qk, -1, keepdims=True) + F32(1e-6))
    qk[:, 0] /= np.sqrt(F32(size))
    o["y"][: o.t, : 2 * heads * size] = qk.reshape(o.t, -1)
    softplus = np.logaddexp(0, o["a"][: o.t] + o["dt_bias"])
    o["decay"][: o.t] = np.exp(-np.exp(o["a_log"]) * softplus)
    o["beta"][: o.t] = _sigmoid(o["b"][: o.t])


def _delta_rule(o: _Operands) -> None:
    state, heads = o["state"], int(o.attrs["key_heads"])
    n_values, dk, dv = state.shape
    for t in range(o.t):
        qk = o["y"][t, : 2 * heads * dk].reshape(2, heads, dk).repeat(n_values // heads, axis=1)
        v = o["y"][t, 2 * heads * dk :].reshape(n_values, dv)
        state *= o["decay"][t][:, None, None]
        delta = o["beta"][t][:, None] * (v - np.einsum("hkv,hk->hv", state, qk[1]))
        state += qk[1][:, :, None] * delta[:, None, :]
        o["o"][t] = np.einsum("hkv,hk->hv", state, qk[0]).reshape(-1)


def _gated_rmsnorm(o: _Operands) -> None:
    dv = len(o["w"])
    x, z = (o[name][: o.t].reshape(o.t, -1, dv) for name in ("o", "z"))
    o["y"][: o.t] = (_normed(x, o["w"], o.attrs["eps"]) * z * _sigmoid(z)).reshape(o.t, -1)


def _split(o: _Operands) -> tuple[Array, Array, Array, Array]:
    """Query, gate [t, Nq, D], key, value [t, Nk, D] of u."""
    nq, nk, d = (o.dims[n] for n in ("Nq", "Nk", "D"))
    u = o["u"][: o.t]
    qg = u[:, : 2 * nq * d].reshape(o.t, nq, 2, d)
    kv = u[:, 2 * nq * d :].reshape(o.t, 2, nk, d)
    return qg[:, :, 0], qg[:, :, 1], kv[:, 0], kv[:, 1]


def _rope_append(o: _Operands) -> None:
    query, _, key, value = _split(o)
    angle = (np.arange(o.p, o.p + o.t, dtype=F32)[:, None] * o["inv_freq"])[:, None]
    half = len(o["inv_freq"])

    def turned(x: Array, w: Array) -> Array:
        x = _normed(x, w, o.attrs["eps"])
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    o["q"][: o.t] = turned(query, o["q_norm"])
    o["keys"][:, o.p : o.p + o.t] = turned(key, o["k_norm"]).swapaxes(0, 1)
    o["values"][:, o.p : o.p + o.t] = value.swapaxes(0, 1)


def _attention(o: _Operands) -> None:
    q, gate = o["q"][: o.t], _split(o)[1]
    group = o.dims["Nq"] // o.dims["Nk"]
    keys, values = (o[n][:, : o.p + o.t].repeat(group, axis=0) for n in ("keys", "values"))
    scores = np.einsum("thd,hsd->hts", q, keys) / np.sqrt(F32(q.shape[-1]))
    hidden = np.arange(o.p + o.t)[None] > np.arange(o.p, o.p + o.t)[:, None]
    scores[:, hidden] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hts,hsd->thd", p / p.sum(-1, keepdims=True), values)
    o["y"][: o.t] = (mixed * _sigmoid(gate)).reshape(o.t, -1)


def _silu_mul(o: _Operands) -> None:
    gate, up = np.split(o["u"][: o.t], 2, axis=1)
    o["y"][: o.t] = gate * _sigmoid(gate) * up


def _last_row(o: _Operands) -> None:
    o["y"][0] = o["x"][o.t - 1]


def _advance(o: _Operands) -> None:
    o["cursor"][0] += o["cursor"][1]


def _sample(o: _Operands) -> None:
    o["cursor"][2] = np.argmax(o["logits"][0])


_KERNELS: dict[str, Callable[[_Operands], None]] = {
    "embed": _embed, "rmsnorm": _rmsnorm, "add_rmsnorm": _add_rmsnorm, "linear": _linear,
    "conv_window": _conv_window, "delta_gates": _delta_gates, "delta_rule": _delta_rule,
    "gated_rmsnorm": _gated_rmsnorm, "rope_append": _rope_append, "attention": _attention,
    "silu_mul": _silu_mul, "last_row": _last_row, "advance": _advance, "sample": _sample,
}  # fmt: skip
