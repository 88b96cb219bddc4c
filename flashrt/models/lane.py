"""The regions that a lane of every token model has, and what is chosen when a model is built.

IS: names, shapes and order. IS NOT: the state of a family (its model). It exists so that engine,
sessions and capsules find the same regions whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashrt.base.errors import PlanError
from flashrt.base.messages import shown
from flashrt.core.region import CODE_DTYPES, DType, Layout, Region, Role
from flashrt.models.model import PREFILL_ROWS, USUAL_PREFILL_ROWS
from flashrt.ops import table as ops
from flashrt.weights.rules import Source, Stored

MOST_POSITIONS = 1 << 24  # far beyond any model; positions and rows of a lane are int32
KV_DTYPES = (DType.BF16, DType.F32, DType.I8, DType.E4M3)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a model is built from besides its config; see `models.model_for`."""

    max_positions: int
    kv_dtype: DType
    has_draft_head: bool
    lacks_head: bool | None  # whether the weight files lack lm_head.weight
    stored: Callable[[Source], Stored]
    prefill_rows: int = USUAL_PREFILL_ROWS  # of the largest launch of a prompt: a bucket
    has_images: bool = False  # rows may be those of images


def check_choices(
    max_positions: int, kv_dtype: DType, prefill_rows: int = USUAL_PREFILL_ROWS
) -> None:
    """Raises PlanError unless a lane can be so long, with keys and values of such a dtype, and
    launches have so many rows at most.
    """
    is_whole = isinstance(max_positions, int) and not isinstance(max_positions, bool)
    if not is_whole or not 1 <= max_positions <= MOST_POSITIONS:
        raise PlanError(
            f"max_positions is {shown(max_positions)}; an integer from 1 to {MOST_POSITIONS:,} "
            "is needed"
        )
    if kv_dtype not in KV_DTYPES:
        raise PlanError(f"kv_dtype is {kv_dtype}; {', '.join(KV_DTYPES)} are supported")
    if prefill_rows not in PREFILL_ROWS:
        raise PlanError(
            f"prefill_rows is {shown(prefill_rows)}; choose one of "
            f"{', '.join(map(str, PREFILL_ROWS))}"
        )


def kv_regions(keys: str, values: str, shape: tuple[int, int, int], dtype: DType) -> list[Region]:
    """Rows of keys and values; of codes, the scales of rows besides."""
    regions = [
        Region(keys, shape, dtype, Role.ROWS, Layout.ROWS_IN_LANES, is_digested=True),
        Region(values, shape, dtype, Role.ROWS, Layout.COLS_IN_LANES, is_digested=True),
    ]
    if dtype in CODE_DTYPES:
        regions += [
            Region(
                scales_name(of), (*shape[:2], 1), DType.F32, Role.ROWS, Layout.ROWS_IN_LANES,
                is_digested=True,
            )
            for of in (keys, values)
        ]  # fmt: skip
    return regions


def scales_name(rows: str) -> str:
    """The region of the scales of keys or values that are codes."""
    return f"{rows.removesuffix('s')}_scales"


def lane_regions(
    vocab_size: int,
    hidden: int,
    kv_shape: tuple[int, int, int],
    kv_dtype: DType,
    state: Sequence[Region] = (),
    prefill_rows: int = USUAL_PREFILL_ROWS,
) -> tuple[Region, ...]:
    """Regions of a lane, in order; `state` is what the family has besides keys and values.

    `prefill_rows`: tokens that go into a launch at most.
    `kv_shape`: (layers * key/value heads, positions, size of a head); no plane, no keys.
    """
    planes, max_positions, _ = kv_shape
    regions = [
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED),
        Region("sampler", (ops.SAMPLER_WORDS,), DType.U32, Role.FIXED),
        Region("bias", (ops.BIAS_ENTRIES, 2), DType.U32, Role.FIXED),
        Region("mask", (ops.mask_words(vocab_size),), DType.U32, Role.FIXED),
        *state,
        Region("last_hidden", (1, hidden), DType.ACT, Role.FIXED, is_digested=True),
        Region("journal", (1, max_positions, 1), DType.I32, Role.ROWS, is_digested=True),
    ]
    if planes:
        regions += kv_regions("keys", "values", kv_shape, kv_dtype)
    return (
        *regions,
        Region("tokens", (prefill_rows,), DType.I32, Role.IO),
        Region("logits", (1, vocab_size), DType.F32, Role.IO),
        Region("logits_before", (1, vocab_size), DType.F32, Role.IO),  # see TokenEngine.following
        Region("stops", (ops.STOP_WORDS,), DType.I32, Role.IO),
    )
