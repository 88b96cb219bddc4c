"""Every op of the table as a plain numpy formula in float64: what kernels are held against.

IS: written from the model's equations, loops where loops say it best; operands by param name, whole
logical arrays.
IS NOT: fast, or exact to the bit.

A function gets `Operands` and returns the arrays that the op writes. NaN in a result means that the
op leaves the element as it was: rows at or beyond the valid ones come back as they went in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.ops.experts import Scoring

Array = NDArray[np.float64]
Results = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Operands:
    """Arrays by param name (float64, or integers), and the attributes."""

    arrays: Mapping[str, NDArray[np.generic]]
    attrs: Mapping[str, int | float]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]  # type: ignore[return-value]

    @property
    def position(self) -> int:
        """Position of the first row."""
        return int(self.arrays["cursor"][0])

    def rows(self, name: str) -> int:
        """Valid rows of an operand of T rows."""
        return min(int(self.arrays["cursor"][1]), len(self.arrays[name]))

    def valid(self, name: str) -> Array:
        """The valid rows of an operand."""
        return self[name][: self.rows(name)]

    def padded(self, name: str, rows: Array) -> Array:
        """`rows` as the leading rows of output `name`, NaN below."""
        out = np.full(self.arrays[name].shape, np.nan)
        out[: len(rows)] = rows.reshape(len(rows), *out.shape[1:])
        return out


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def normed(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def embed(o: Operands) -> Results:
    tokens, journal = o.valid("tokens").astype(int), np.full(o["journal"].shape, np.nan)
    journal[0, o.position : o.position + len(tokens), 0] = tokens
    return {"x": o.padded("x", o["table"][tokens]), "journal": journal}


def embed_seen(o: Operands) -> Results:
    tokens, journal = o.valid("tokens").astype(int), np.full(o["journal"].shape, np.nan)
    journal[0, o.position : o.position + len(tokens), 0] = tokens
    is_token = ((tokens >= 0) & (tokens < len(o["table"])))[:, None]
    rows = o["table"][np.where(is_token[:, 0], tokens, 0)]
    return {"x": o.padded("x", np.where(is_token, rows, o.valid("seen"))), "journal": journal}


def place_rows(o: Operands) -> Results:
    n = o.rows("places")
    places = np.repeat(o.position + np.arange(n)[:, None] + o["delta"][0], 3, axis=1)
    if o.attrs["given"]:
        places = places + o.valid("offsets")
    grown = o["delta"] + (o["growth"] if o.attrs["given"] and n else 0)
    return {"places": o.padded("places", places), "delta": grown.astype(np.float64)}


def rmsnorm(o: Operands) -> Results:
    return {"y": o.padded("y", normed(o.valid("x"), o.attrs["eps"]) * o["w"])}


def add_rmsnorm(o: Operands) -> Results:
    x = o.valid("x") + o.valid("r")
    return {"x": o.padded("x", x), "y": o.padded("y", normed(x, o.attrs["eps"]) * o["w"])}


def adaptive_rmsnorm(o: Operands) -> Results:
    x = o.valid("x")
    if o.attrs["added"]:
        x = x + o["gate"] * o.valid("r")
    y = normed(x, o.attrs["eps"]) * (1 + o["scale"]) + o["shift"]
    return {"x": o.padded("x", x), "y": o.padded("y", y)}


def linear(o: Operands) -> Results:
    return {"y": o.padded("y", o.valid("x") @ o["w"].T)}


def conv_window(o: Operands) -> Results:
    u, w, window = o.valid("u"), o["w"], o["window"]
    raw = np.concatenate([window, u])
    y = sum((raw[tap : tap + len(u)] * w[tap] for tap in range(len(w))), np.zeros(u.shape))
    return {"y": o.padded("y", silu(y)), "window": raw[len(raw) - len(window) :]}


def conv_verify(o: Operands) -> Results:
    return {"y": conv_window(o)["y"]}


def gated_conv(o: Operands) -> Results:
    w, window = o["w"], o["window"]
    b, c, x = np.split(o.valid("u"), 3, axis=1)
    rows = np.concatenate([window, b * x])
    y = sum((rows[tap : tap + len(x)] * w[tap] for tap in range(len(w))), np.zeros(x.shape))
    if o.attrs["biased"]:
        y = y + o["bias"]
    return {"y": o.padded("y", c * y), "window": rows[len(rows) - len(window) :]}


def conv_biased(o: Operands) -> Results:
    u, w, window = o.valid("u"), o["w"], o["window"]
    raw = np.concatenate([window, u])
    y = sum((raw[tap : tap + len(u)] * w[tap] for tap in range(len(w))), np.zeros(u.shape))
    return {"y": o.padded("y", silu(y + o["b"])), "window": raw[len(raw) - len(window) :]}


def ssm(o: Operands) -> Results:
    groups = int(o.attrs["groups"])
    S, y = o["state"].copy(), o.valid("y")
    Hv, dk, dv = S.shape
    out = np.empty((len(y), Hv, dv))
    for t, row in enumerate(y):
        x = row[: Hv * dv].reshape(Hv, dv)
        B, C = row[Hv * dv :].reshape(2, groups, dk)
        time = np.logaddexp(0, o["dt"][t] + o["dt_bias"])
        time = np.minimum(np.maximum(time, o.attrs["dt_min"]), o.attrs["dt_max"])
        for h in range(Hv):
            g = h // (Hv // groups)
            S[h] = np.exp(-np.exp(o["a_log"][h]) * time[h]) * S[h] + np.outer(B[g], time[h] * x[h])
            out[t, h] = S[h].T @ C[g] + o["d"][h] * x[h]
    return {"o": o.padded("o", out), "state": S}


def silu_rmsnorm(o: Operands) -> Results:
    v = o.valid("o") * silu(o.valid("z"))
    parts = v.reshape(len(v), int(o.attrs["groups"]), -1)
    return {"y": o.padded("y", normed(parts, o.attrs["eps"]).reshape(v.shape) * o["w"])}


def scale_rows(o: Operands) -> Results:
    return {"x": o.padded("x", o.valid("x") * o.attrs["factor"])}


def delta_gates(o: Operands) -> Results:
    heads, size = int(o.attrs["key_heads"]), int(o.attrs["key_dim"])
    y = o.valid("y").copy()
    qk = y[:, : 2 * heads * size].reshape(len(y), 2, heads, size)
    qk = qk / np.sqrt(np.sum(qk * qk, -1, keepdims=True) + 1e-6)
    qk[:, 0] /= np.sqrt(size)
    y[:, : 2 * heads * size] = qk.reshape(len(y), -1)
    softplus = np.logaddexp(0, o.valid("a") + o["dt_bias"])
    decay = np.exp(-np.exp(o["a_log"]) * softplus)
    return {
        "y": o.padded("y", y),
        "decay": o.padded("decay", decay),
        "beta": o.padded("beta", sigmoid(o.valid("b"))),
    }


def delta_rule(o: Operands) -> Results:
    heads = int(o.attrs["key_heads"])
    S, y, decay, beta = o["state"].copy(), o.valid("y"), o.valid("decay"), o.valid("beta")
    Hv, dk, dv = S.shape
    out = np.empty((len(y), Hv, dv))
    for t, row in enumerate(y):
        q, k = row[: 2 * heads * dk].reshape(2, heads, dk)
        v = row[2 * heads * dk :].reshape(Hv, dv)
        for h in range(Hv):
            key_head = h // (Hv // heads)
            S[h] *= decay[t, h]
            delta = beta[t, h] * (v[h] - S[h].T @ k[key_head])
            S[h] += np.outer(k[key_head], delta)
            out[t, h] = S[h].T @ q[key_head]
    return {"o": o.padded("o", out), "state": S}


def delta_verify(o: Operands) -> Results:
    return {"o": delta_rule(o)["o"]}


def gated_rmsnorm(o: Operands) -> Results:
    w = o["w"]
    x, z = (o.valid(name).reshape(-1, len(w)) for name in ("o", "z"))
    y = w * normed(x, o.attrs["eps"]) * silu(z)
    return {"y": o.padded("y", y.reshape(o.rows("o"), -1))}


def split(o: Operands, Nq: int, Nk: int, D: int) -> tuple[Array, Array, Array, Array]:
    """Query and gate [n, Nq, D], key and value [n, Nk, D] of the rows of u."""
    u = o.valid("u")
    parts = 2 if o.attrs["gated"] else 1
    qg = u[:, : parts * Nq * D].reshape(-1, Nq, parts, D)
    kv = u[:, parts * Nq * D :].reshape(-1, 2, Nk, D)
    return qg[:, :, 0], qg[:, :, -1], kv[:, 0], kv[:, 1]


def rope(x: Array, position: int, inv_freq: Array, magnitude: float) -> Array:
    """x [n, heads, D], row t at position + t; the angle is float32, as the model's is."""
    positions = np.arange(position, position + len(x)).astype(np.float32)
    angle = (positions[:, None] * inv_freq.astype(np.float32)).astype(np.float64)[:, None]
    half = len(inv_freq)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rope_append(o: Operands) -> Results:
    (_, Nq, D), (Nk, _, _) = o["q"].shape, o["keys"].shape
    q, _, k, v = split(o, Nq, Nk, D)
    if o.attrs["normed"]:
        q, k = (normed(x, o.attrs["eps"]) * o[w] for x, w in ((q, "q_norm"), (k, "k_norm")))
    first = o.position - int(o.attrs["shift"])
    q, k = (rope(x, first, o["inv_freq"], o.attrs["magnitude"]) for x in (q, k))
    keys, values = (np.full(o[name].shape, np.nan) for name in ("keys", "values"))
    at = slice(o.position, o.position + len(k))
    keys[:, at], values[:, at] = k.swapaxes(0, 1), v.swapaxes(0, 1)
    return {"q": o.padded("q", q), "keys": keys, "values": values}


def rope_placed(o: Operands) -> Results:
    """Pair by pair by the place of its axis: a head is turned by each, and each gives its pairs."""
    inv_freq, places = o["inv_freq"], o.valid("places")
    pair = np.arange(len(inv_freq))
    axis = np.where((pair % 3 == 1) & (pair < 3 * o.attrs["by_rows"]), 1, 0)
    axis = np.where((pair % 3 == 2) & (pair < 3 * o.attrs["by_columns"]), 2, axis)
    (_, Nq, D), (Nk, _, _) = o["q"].shape, o["keys"].shape
    q, _, k, v = split(o, Nq, Nk, D)
    q, k = (normed(x, o.attrs["eps"]) * o[w] for x, w in ((q, "q_norm"), (k, "k_norm")))
    half, angles = len(inv_freq), (places[:, axis] - o.attrs["shift"]) * inv_freq
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    for x in (q, k):
        low, high = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
        x[:, :, :half] = low * cosine - high * sine
        x[:, :, half : 2 * half] = high * cosine + low * sine
    keys, values = (np.full(o[name].shape, np.nan) for name in ("keys", "values"))
    at = slice(o.position, o.position + len(k))
    keys[:, at], values[:, at] = k.swapaxes(0, 1), v.swapaxes(0, 1)
    return {"q": o.padded("q", q), "keys": keys, "values": values}


def attention(o: Operands) -> Results:
    (_, Nq, D), (Nk, _, _) = o["q"].shape, o["keys"].shape
    q = o.valid("q")
    y = np.zeros(q.shape)
    for t, h in np.ndindex(len(q), Nq):
        stop = (o.position + t + 1, o.position + len(q), o.position)[int(o.attrs["seen"])]
        seen, plane = slice(int(o.attrs["shift"]), stop), h // (Nq // Nk)
        if seen.stop <= seen.start:
            continue
        score = o["keys"][plane, seen] @ q[t, h] / np.sqrt(D)
        p = np.exp(score - score.max())
        y[t, h] = (p / p.sum()) @ o["values"][plane, seen]
    if o.attrs["gated"]:
        y = y * sigmoid(split(o, Nq, Nk, D)[1])
    return {"y": o.padded("y", y.reshape(len(q), -1))}


def rope_rows(o: Operands) -> Results:
    _, N, D = o["y"].shape
    x = o.valid("x").reshape(-1, N, D)
    first = o.position if o.attrs["placed"] else 0
    return {"y": o.padded("y", rope(x, first, o["inv_freq"], 1.0))}


def append_rows(o: Operands) -> Results:
    heads, _, D = o["keys"].shape
    results = {}
    for name, of in (("keys", "k"), ("values", "v")):
        rows = o.valid(of).reshape(-1, heads, D).swapaxes(0, 1)
        results[name] = np.full(o[name].shape, np.nan)
        results[name][:, o.position : o.position + rows.shape[1]] = rows
    return results


def silu_mul(o: Operands) -> Results:
    gate, up = np.split(o.valid("u"), 2, axis=1)
    return {"y": o.padded("y", silu(gate) * up)}


def relu_squared(o: Operands) -> Results:
    return {"y": o.padded("y", np.maximum(o.valid("u"), 0) ** 2)}


def activations(o: Operands) -> Results:
    return {"y": o.padded("y", o.valid("x"))}


def mix_rows(o: Operands) -> Results:
    mixed = (o["table"][o.valid("rows").astype(int)] * o.valid("weights")[:, :, None]).sum(1)
    return {"y": o.padded("y", mixed)}


def add_layer_norm(o: Operands) -> Results:
    x = o.valid("x") + o.valid("r")
    centred = x - x.mean(1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + o.attrs["eps"])
    return {"x": o.padded("x", x), "y": o.padded("y", centred * scale * o["w"] + o["b"])}


def gelu(o: Operands) -> Results:
    u = o.valid("u")
    if o.attrs["tanh"]:
        share = (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))) / 2
    else:
        share = (1 + np.vectorize(math.erf, [float])(u / np.sqrt(2))) / 2
    return {"y": o.padded("y", u * share)}


def geglu(o: Operands) -> Results:
    gate, up = np.split(o.valid("u"), 2, axis=1)
    share = (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
    return {"y": o.padded("y", gate * share * up)}


def turn_patches(o: Operands) -> Results:
    x, inv_freq = o.valid("x"), o["inv_freq"]
    heads = x.reshape(len(x), -1, 4 * len(inv_freq))
    angles = (o.valid("places")[:, :, None] * inv_freq).reshape(len(x), 1, -1)
    low, high = np.split(heads, 2, axis=2)
    cosine, sine = np.cos(angles), np.sin(angles)
    turned = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=2)
    return {"x": o.padded("x", turned.reshape(x.shape))}


def attend_patches(o: Operands) -> Results:
    heads = int(o.attrs["heads"])
    (_, columns), n = o["q"].shape, o.rows("q")
    size = columns // heads
    q, k, v = (o.valid(name).reshape(n, heads, size).swapaxes(0, 1) for name in "qkv")
    scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
    p = np.exp(scores - scores.max(2, keepdims=True, initial=-np.inf))
    y = (p / p.sum(2, keepdims=True)) @ v
    return {"y": o.padded("y", y.swapaxes(0, 1).reshape(n, columns))}


def add_bias(o: Operands) -> Results:
    return {"x": o.padded("x", o.valid("x") + o["b"])}


def last_row(o: Operands) -> Results:
    return {"y": o["x"][o.rows("x") - 1][None]}


def last_values(o: Operands) -> Results:
    return last_row(o)


def keep_rows(o: Operands) -> Results:
    return {"y": o.padded("y", o.valid("x"))}


def keep_values(o: Operands) -> Results:
    return keep_rows(o)


def last_cursor(o: Operands) -> Results:
    last = np.zeros(o["last"].shape)
    if rows := int(o["cursor"][1]):
        last[:2] = o.position + rows - 1, 1
    return {"last": last}


def advance(o: Operands) -> Results:
    cursor = o["cursor"].astype(np.float64)
    cursor[0] += cursor[1]
    return {"cursor": cursor}


def hold(o: Operands) -> Results:
    cursor, (n, *stops) = o["cursor"].astype(np.float64), o["stops"]
    if cursor[TOKEN] < 0 or cursor[TOKEN] in stops[: int(n)]:
        cursor[ROWS] = 0
    return {"cursor": cursor}


# ---- experts ----


def route(o: Operands) -> Results:
    logits, P = o.valid("logits"), o["picks"].shape[1]
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    is_sigmoid = o.attrs["scoring"] == Scoring.SIGMOID
    score = sigmoid(logits) if is_sigmoid else softmax
    rank = score + o["bias"] if o.attrs["biased"] else logits
    picks = np.sort(np.argsort(-rank, axis=-1, kind="stable")[:, :P], axis=-1)
    gates = np.take_along_axis(score, picks, axis=-1)
    if o.attrs["normed"]:
        gates = gates / (gates.sum(-1, keepdims=True) + o.attrs["eps"])
    gates = gates * o.attrs["scale"]
    return {"picks": o.padded("picks", picks.astype(float)), "gates": o.padded("gates", gates)}


def experts_in(o: Operands) -> Results:
    x, picks, w = o.valid("x"), o.valid("picks").astype(int), o["w"]
    gate, up = w.reshape(len(o["groups"]), 2, -1, w.shape[1]).swapaxes(0, 1)
    h = silu(np.einsum("th,tpih->tpi", x, gate[picks])) * np.einsum("th,tpih->tpi", x, up[picks])
    return {"h": o.padded("h", h)}


def experts_out(o: Operands) -> Results:
    h, picks, w = o.valid("h"), o.valid("picks").astype(int), o["w"]
    down = w.reshape(len(o["groups"]), -1, w.shape[1])
    return {"y": o.padded("y", np.einsum("tp,tpi,tpni->tn", o.valid("gates"), h, down[picks]))}


def add_gated(o: Operands) -> Results:
    gate = sigmoid(o.valid("gate")) if o.attrs["gated"] else 1.0
    return {"y": o.padded("y", o.valid("y") + gate * o.valid("x"))}


# ---- sampling ----

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random words for a counter of four words and a key of two."""
    word = 0xFFFFFFFF
    for i in range(10):
        k0, k1 = ((key[j] + i * PHILOX_W[j]) & word for j in (0, 1))
        p0, p1 = PHILOX_M[0] * counter[0], PHILOX_M[1] * counter[2]
        counter = ((p1 >> 32) ^ counter[1] ^ k0, p1 & word, (p0 >> 32) ^ counter[3] ^ k1, p0 & word)
    return counter


def gumbel(n: int, seed: tuple[int, int], position: int) -> Array:
    """Noise of tokens [0, n) at a position: -log(-log(1 - v)), v = (word + 1/2) / 2^32."""
    words = [w for i in range(-(-n // 4)) for w in philox((position, i, 0, 0), seed)][:n]
    v = np.minimum((np.array(words) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -np.log(-np.log1p(-v))


def filtered(z: Array, top_k: int, top_p: float, min_p: float) -> NDArray[np.bool_]:
    """Which tokens the filters leave, of z = logits / temperature; equals are ordered by id."""
    order = np.argsort(-z, kind="stable")
    p = np.exp(z[order] - z.max())
    kept = np.ones(len(z), bool)
    if top_k > 0:
        kept[top_k:] = False
    mass = np.cumsum(np.where(kept, p, 0))
    if top_p < 1:
        kept[1:] &= mass[:-1] < top_p * mass[-1]
    out = np.zeros(len(z), bool)
    out[order] = kept & (p >= min_p)
    return out


def masked(logits: Array, mask: NDArray[np.uint32]) -> Array:
    """-inf for tokens whose bit is not set: bit t % 32 of word t / 32."""
    bits = [int(mask[t // 32]) >> t % 32 & 1 for t in range(len(logits))]
    return np.where(bits, logits, -np.inf)


def adjusted(
    logits: Array,
    sampler: NDArray[np.uint32],
    bias: NDArray[np.uint32],
    history: NDArray[np.generic],
) -> Array:
    """Logits with bias, and with penalties for tokens that stand in the history."""
    repetition, presence, frequency = (float(x) for x in sampler[6:9].view(np.float32))
    repetition = repetition or 1.0
    x = logits.copy()
    for token, value in bias[: int(sampler[9])]:
        x[token] += float(np.array(value).view(np.float32))
    count = np.bincount(history.astype(int), minlength=len(x))
    penalised = np.where(x > 0, x / repetition, x * repetition) - presence - frequency * count
    return np.where(count > 0, penalised, x)


def scores(logits: Array, sampler: NDArray[np.uint32], position: int) -> Array:
    """What the sampled token is the arg max of, given adjusted logits; -inf for tokens that a
    filter drops.
    """
    top_k = int(sampler[2:3].view(np.int32)[0])
    temperature, top_p, min_p = (float(x) for x in sampler[3:6].view(np.float32))
    if not temperature > 0 or logits.max() == np.inf:
        return logits
    z = logits / temperature
    noise = gumbel(len(z), (int(sampler[0]), int(sampler[1])), position)
    return np.where(filtered(z, top_k, top_p, min_p), z + noise, -np.inf)


def sample(o: Operands) -> Results:
    cursor = o["cursor"].astype(np.float64)
    if cursor[1] < 1:
        return {}
    sampler, bias, mask = (
        np.ascontiguousarray(o.arrays[n], np.uint32) for n in ("sampler", "bias", "mask")
    )
    logits = masked(o["logits"][0], mask) if sampler[10] else o["logits"][0]
    logits = adjusted(logits, sampler, bias, o.arrays["journal"][0, : o.position, 0])
    is_refused = bool(np.isnan(logits).any()) or logits.max() == -np.inf
    cursor[2] = -1 if is_refused else int(np.argmax(scores(logits, sampler, o.position)))
    return {"cursor": cursor}


# ---- drafting ----

POSITION, ROWS, TOKEN = range(3)  # words of a cursor


def draft_input(o: Operands) -> Results:
    tokens = o.valid("tokens").astype(int)
    before = np.concatenate([o["last"], o.valid("hidden")])[: len(tokens)]
    parts = ((o["table"][tokens], "w_token"), (before, "w_hidden"))
    y = np.concatenate([normed(x, o.attrs["eps"]) * o[w] for x, w in parts], axis=1)
    return {"y": o.padded("y", y)}


def draft_input_seen(o: Operands) -> Results:
    tokens = o.valid("tokens").astype(int)
    is_token = ((tokens >= 0) & (tokens < len(o["table"])))[:, None]
    rows = o["table"][np.where(is_token[:, 0], tokens, 0)]
    before = np.concatenate([o["last"], o.valid("hidden")])[: len(tokens)]
    parts = ((np.where(is_token, rows, o.valid("seen")), "w_token"), (before, "w_hidden"))
    y = np.concatenate([normed(x, o.attrs["eps"]) * o[w] for x, w in parts], axis=1)
    return {"y": o.padded("y", y)}


def draft_begin(o: Operands) -> Results:
    draft = np.zeros(o["draft"].shape)
    draft[: TOKEN + 1] = o["cursor"][POSITION], 1, o["cursor"][TOKEN]
    return {"draft": draft}


def draft_note(o: Operands) -> Results:
    results = {name: np.full(o[name].shape, np.nan) for name in ("draft", "journal", "drafted")}
    position, token = int(o["draft"][POSITION]), max(0, int(o["draft"][TOKEN]))
    results["draft"][TOKEN] = token
    if position - o.position < len(o["drafted"]):
        results["drafted"][position - o.position] = token
    if position < o["journal"].shape[1]:
        results["journal"][0, position, 0] = token
    return results


def verify_cursors(o: Operands) -> Results:
    samples = np.zeros(o["samples"].shape)
    for t in range(o.rows("samples")):
        samples[t, : ROWS + 1] = o.position + t + 1, 1
    return {"samples": samples}


def accept(o: Operands) -> Results:
    sampled, drafted = o.valid("samples")[:, TOKEN], o.valid("drafted")
    agree = np.append(np.cumprod(drafted[1:] == sampled[:-1]), 0)
    n = 1 + int(agree.sum())
    verdict = np.full(o["verdict"].shape, np.nan)
    verdict[: n + 1] = n, *sampled[:n]
    return {"verdict": verdict}


def take_token(o: Operands) -> Results:
    cursor = o["cursor"].astype(np.float64)
    cursor[TOKEN] = o.valid("samples")[-1, TOKEN]
    return {"cursor": cursor}


REFERENCE: dict[str, Callable[[Operands], Results]] = {
    f.__name__: f
    for f in (
        embed, rmsnorm, add_rmsnorm, linear, conv_window, delta_gates, delta_rule, gated_rmsnorm,
        rope_append, attention, silu_mul, add_bias, last_row, last_values, last_cursor,
        advance, hold, keep_rows, keep_values,
        sample,
        conv_verify, delta_verify, draft_input, draft_begin, draft_note, verify_cursors, accept,
        draft_input_seen,
        take_token, gated_conv,
        conv_biased, ssm, silu_rmsnorm, scale_rows,
        relu_squared,
        activations, mix_rows, add_layer_norm, gelu, turn_patches, attend_patches,
        place_rows, embed_seen, rope_placed,
        route, experts_in, experts_out, add_gated, rope_rows, append_rows,
        geglu, adaptive_rmsnorm,
    )
}  # fmt: skip
