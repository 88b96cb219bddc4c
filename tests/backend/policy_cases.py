"""Launches of the ops of robot policies, at sizes off every grid.

IS: inputs only, as in cases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashrt.ops.cursor import PolicyWord, RequestWord
from flashrt.ops.table import IDENTITY, RELU, REQUEST_WORDS, SILU
from tests.backend.cases import randn
from tests.backend.runner import Case, rng_for

SEED = {"seed_low": -5, "seed_high": 77}
DENSE_SIZES = (
    (1, 1, 1), (1, 7, 3), (1, 8, 32), (3, 9, 33), (1, 64, 96), (10, 8, 70), (1, 136, 40),
    (1, 251, 256), (2, 512, 65),
)  # fmt: skip  # rows, K, N


def words(**values: int) -> NDArray[np.int32]:
    """A cursor."""
    out = np.zeros(16, np.int32)
    for name, value in values.items():
        out[PolicyWord[name.upper()]] = value
    return out


def observe(size: int, A: int, tick: int) -> Case:
    rng = rng_for("observe", size, A)
    observation = randn(rng, size, scale=20)  # some beyond the limit
    operands = {
        "observation": observation, "mean": randn(rng, size), "std": 0.5 + np.abs(randn(rng, size)),
        "previous": randn(rng, A), "cursor": words(tick=tick, observed=tick - 1, **SEED),
        "x": (size + A,),
    }  # fmt: skip
    return Case("observe", operands)


def dense(T: int, K: int, N: int, activation: int) -> Case:
    rng = rng_for("dense", T, K, N)
    operands = {
        "x": randn(rng, T, K), "w": randn(rng, N, K, scale=K**-0.5), "b": randn(rng, N),
        "y": (T, N),
    }  # fmt: skip
    return Case("dense", operands, {"activation": activation})


def dense_add(T: int, K: int, N: int) -> Case:
    rng = rng_for("dense_add", T, K, N)
    return Case("dense_add", {**dense(T, K, N, IDENTITY).operands, "y": randn(rng, T, N)})


def gru_cell(M: int) -> Case:
    rng = rng_for("gru", M)
    operands = {"u": randn(rng, 3 * M, scale=3), "v": randn(rng, 3 * M), "memory": randn(rng, M)}
    return Case("gru_cell", operands)


def flow_begin(H: int, A: int, committed: int, **cursor: int) -> Case:
    rng = rng_for("flow_begin", H, A, committed)
    request = np.zeros(REQUEST_WORDS, np.int32)
    request[0] = committed
    operands = {
        "memory": randn(rng, 24), "encoded": randn(rng, 17), "previous": randn(rng, A),
        "queue": randn(rng, H, A), "request": request, "cursor": words(**cursor, **SEED),
        "context": (24 + 17,), "flow": (H * A + H,),
    }  # fmt: skip
    return Case("flow_begin", operands, {"steps": 5, "execute": 4}, label=f"flow_begin-{cursor}")


def flow_step(H: int, A: int, K: int, committed: int) -> Case:
    rng = rng_for("flow_step", H, A, K)
    mask = (np.arange(H) < committed).astype(np.float32)
    operands = {
        "z": randn(rng, 1, K), "w": randn(rng, H * A, K, scale=K**-0.5), "b": randn(rng, H * A),
        "mask": mask, "x": randn(rng, H * A), "cursor": words(plan_steps_left=3, **SEED),
    }  # fmt: skip
    return Case("flow_step", operands, {"steps": 7})


def flow_end(H: int, A: int) -> Case:
    cursor = words(plan_tick=40, plan_stop=46, plan_steps_left=0, chunk=30, stop=42, **SEED)
    x = randn(rng_for("flow_end", H, A), H * A)
    return Case("flow_end", {"x": x, "queue": (H, A), "cursor": cursor})


def chunk_begin(H: int, A: int, committed: int, **cursor: int) -> Case:
    whole = flow_begin(H, A, committed, **cursor)
    kept = {n: whole.operands[n] for n in ("previous", "queue", "request", "cursor")}
    attrs = {"steps": 1, "execute": 4}
    return Case("chunk_begin", {**kept, "kept": (H * A + H,)}, attrs, label=f"chunk_begin-{cursor}")


def chunk_end(H: int, A: int, committed: int, margin: tuple[int, int] = (0, 0)) -> Case:
    rng = rng_for("chunk_end", H, A)
    kept = np.concatenate([randn(rng, H * A), (np.arange(H) < committed).astype(np.float32)])
    cursor = words(plan_tick=40, plan_stop=46, plan_steps_left=1, chunk=30, stop=42, **SEED)
    operands = {"kept": kept, "chunk": 9 * randn(rng, H, A), "queue": (H, A), "cursor": cursor}
    return Case("chunk_end", operands, margin=margin)


def flow_noise(H: int, D: int, given: int) -> Case:
    request = np.zeros(REQUEST_WORDS, np.int32)
    request[RequestWord.GIVEN] = given
    operands = {
        "given": randn(rng_for("flow_noise", H, D), H, D), "request": request,
        "cursor": words(plan_tick=9, observed=9, tick=10, **SEED), "x": (H, D),
    }  # fmt: skip
    return Case("flow_noise", operands, label=f"flow_noise-{H}-{given}")


def guide(H: int, D: int, guided: int) -> Case:
    rng = rng_for("guide", H, D)
    weights = np.where(np.arange(H) < guided, 0.1 + np.abs(randn(rng, H)), 0).astype(np.float32)
    x, target, v = (randn(rng, H, D) for _ in range(3))
    target[guided:] = np.inf  # a row that is not guided is not looked at
    operands = {"x": x, "target": target, "weights": weights, "v": v}
    return Case("guide", operands, {"time": 0.7, "strength": 3.5})


def euler(H: int, D: int) -> Case:
    rng = rng_for("euler", H, D)
    operands = {
        "v": randn(rng, H, D), "x": randn(rng, H, D), "cursor": words(plan_steps_left=3, **SEED),
    }  # fmt: skip
    return Case("euler", operands, {"step": -0.1})


def ensemble(H: int, A: int, before: int, **cursor: int) -> Case:
    """After `before` chunks from as many ticks."""
    rng = rng_for("ensemble", H, A, before)
    weights = np.exp(-0.1 * np.arange(H)).astype(np.float32)
    counts = np.minimum(before, np.arange(H, 0, -1)).astype(np.float32)
    operands = {
        "chunk": randn(rng, H, A), "weights": weights, "sums": np.cumsum(weights),
        "cursor": words(**cursor, **SEED), "average": randn(rng, H, A), "counts": counts,
    }  # fmt: skip
    return Case("ensemble", operands, label=f"ensemble-{before}-{cursor}")


def take_action(H: int, A: int, **cursor: int) -> Case:
    rng = rng_for("take_action", H, A)
    operands = {
        "queue": randn(rng, H, A), "scale": 1 + np.abs(randn(rng, A)), "offset": randn(rng, A),
        "previous": randn(rng, A), "cursor": words(**cursor, **SEED), "action": (A,),
    }  # fmt: skip
    return Case("take_action", operands, label=f"take_action-{cursor}")


def policy_cases() -> list[Case]:
    """All of them."""
    return [
        observe(1, 1, 0), observe(5, 2, 7), observe(33, 9, 1 << 20), observe(300, 40, 3),
        *(dense(*size, activation) for size in DENSE_SIZES for activation in (IDENTITY, SILU)),
        dense(3, 9, 33, RELU),
        *(dense_add(*size) for size in DENSE_SIZES),
        *(gru_cell(M) for M in (1, 5, 8, 64, 251)),
        flow_begin(1, 1, 0, tick=0, observed=-1),
        flow_begin(8, 2, 0, tick=6, observed=6, chunk=4, stop=8),
        flow_begin(8, 2, 3, tick=7, observed=6, chunk=4, stop=9),
        flow_begin(16, 7, 15, tick=1, observed=1, chunk=0, stop=16),
        flow_begin(50, 14, 1, tick=5, observed=4, chunk=0, stop=5),
        flow_step(1, 1, 1, 0), flow_step(8, 2, 32, 3), flow_step(5, 7, 65, 0),
        flow_step(16, 8, 256, 15), flow_end(1, 1), flow_end(16, 7),
        chunk_begin(8, 2, 0, tick=6, observed=6, chunk=4, stop=8),
        chunk_begin(8, 2, 3, tick=7, observed=6, chunk=4, stop=9),
        chunk_begin(50, 14, 49, tick=1, observed=1, chunk=0, stop=50),
        chunk_end(1, 1, 0), chunk_end(16, 7, 5), chunk_end(9, 3, 2, (2, 4)),
        flow_noise(1, 1, 0), flow_noise(50, 32, 0), flow_noise(7, 5, 1),
        guide(1, 1, 1), guide(9, 32, 4), euler(1, 1), euler(50, 32),
        ensemble(1, 1, 0, plan_tick=0), ensemble(7, 130, 3, plan_tick=3, chunk=2),
        ensemble(7, 3, 9, plan_tick=9, chunk=8), ensemble(7, 3, 2, plan_tick=9, chunk=7),
        take_action(8, 3, tick=9, chunk=6, stop=10, held=2),
        take_action(8, 3, tick=10, chunk=6, stop=10, held=2),
        take_action(4, 1, tick=20, chunk=6, stop=30),
        take_action(4, 40, tick=6, chunk=6, stop=7),
    ]  # fmt: skip
