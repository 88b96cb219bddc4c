"""Golden sets: a checkpoint and what Hugging Face transformers computes from it in float32.

IS: readers of expected.json and expected.safetensors, and the tolerance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

# Absolute, on logits of standard deviation 2.5 to 3 and on states. float32 sums in another order
# reach 1e-4 (rows whose mean square is near eps amplify rounding); one wrong constant reaches 1.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Expected:
    """What a set holds. Arrays are float32 by the names of the oracle's file."""

    folder: Path
    prompts: list[list[int]]
    greedy: list[list[int]]  # [prompts, 48]
    cache_prompt: int | None  # the prompt whose states after prefill are in `arrays`
    arrays: dict[str, NDArray[np.float32]]
    layer_types: list[str]
    draft_prompt: int  # the prompt that `drafts` and arrays mtp.* continue
    drafts: list[int]


def read_expected(folder: Path) -> Expected:
    """Read a set."""
    info = json.loads((folder / "expected.json").read_text())
    arrays = load_file(folder / "expected.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layer_types = config.get("text_config", config)["layer_types"]
    cache_prompt = info.get("cache_prompt")
    return Expected(
        folder, info["prompts"], info["greedy"], cache_prompt, arrays, layer_types,
        info["mtp_prompt"], info["mtp_drafts"],
    )  # fmt: skip


def assert_close(actual: NDArray[np.generic], expected: NDArray[np.float32], what: str) -> None:
    """Equal shapes, and no element further off than TOLERANCE; NaN fails."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    worst = float(np.abs(actual - expected).max())
    assert worst <= TOLERANCE, f"{what}: off by {worst:.2e}"


def assert_states(lane: dict[str, NDArray[np.generic]], expected: Expected) -> None:
    """Compare regions state, window, keys, values with the oracle's caches, layer by layer.

    state [linear layers, Hv, dk, dv], window [linear layers, K - 1, C], keys and values [full
    layers * Nk, positions, D]; the oracle keeps K columns of the window, the first of no use.
    """
    kinds = {"linear_attention": 0, "full_attention": 0}
    for i, kind in enumerate(expected.layer_types):
        at, index = f"cache.{i}", kinds[kind]
        kinds[kind] += 1
        if kind == "linear_attention":
            state, window = (
                expected.arrays[f"{at}.recurrent_state"],
                expected.arrays[f"{at}.conv_state"],
            )
            assert_close(lane["state"][index], state, f"{at}.recurrent_state")
            assert_close(lane["window"][index], window.T[1:], f"{at}.conv_state")
        else:
            for name in ("keys", "values"):
                rows = expected.arrays[f"{at}.{name}"]
                heads, n_rows, _ = rows.shape
                got = lane[name][index * heads : (index + 1) * heads, :n_rows]
                assert_close(got, rows, f"{at}.{name}")
    assert sum(kinds.values()) == len(expected.layer_types) > 0
