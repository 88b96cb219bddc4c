"""The one table of tolerances: how far a kernel may be from the reference, by op and arithmetic.

IS: relative errors, rms(difference) / rms(reference) per output, fixed by what the op computes in
and by what its result is stored as. IS NOT: adjustable from outside, nor used where bits must be
equal.

The matrix units of cuda and simt take bfloat16, or pairs hi + lo in precision "high". Rounding to
bfloat16 is off by at most 2^-8, uniformly: an rms of up to 2^-8 / sqrt(3) = 2.3e-3; to a pair by
the square of that, 5.1e-6. Products are exact and sums are float32 on every backend, so attention
alone is less exact inside than on the cpu: it rounds queries and weights, then what it stores.
What was measured on cpu and simt lies below each value by a factor of 1.2 (rounding) to 10 (sums).

A GPU's matrix units are reported to cut off, where the CPU and the double of them round: of the sum
of 16 products and an accumulator, all bits below the last one of the largest term. So each mma is
off by up to 2^-23 of it, always towards 0. A canonical sum has 16 mma in a chain (a slice of 256 k;
attention: 16 steps over a block of 256 keys), then float32 sums that round: at most 16 * 2^-23 =
1.9e-6. A device run is held to twice that; it was not measured yet.
"""

from __future__ import annotations

from typing import Final

from flashrt.core.region import DType

FLOAT32: Final = 1e-6
_COPIES: Final = frozenset({  # exact
    "embed", "last_row", "last_values", "last_cursor", "advance", "hold", "sample", "draft_begin",
    "draft_note", "verify_cursors", "accept", "take_token", "embed_seen", "place_rows",
})  # fmt: skip
_INSIDE: Final[dict[str, dict[DType, float]]] = {  # other ops: FLOAT32, whatever ACT is
    "delta_rule": {DType.F32: 2e-6, DType.BF16: 2e-6, DType.BF16X2: 2e-6},
    "delta_verify": {DType.F32: 2e-6, DType.BF16: 2e-6, DType.BF16X2: 2e-6},
    "conv2d": dict.fromkeys((DType.F32, DType.BF16, DType.BF16X2), 2e-6),  # one chain of fma
    "ssm": {DType.F32: 2e-6, DType.BF16: 2e-6, DType.BF16X2: 2e-6},
    "attention": {DType.F32: 2e-6, DType.BF16: 6e-3, DType.BF16X2: 1.5e-5},
}
_CUT_OFF: Final = 4e-6  # sums of matrix units on a GPU
_MATRIX_UNITS: Final = frozenset(
    {"linear", "attention", "experts_in", "experts_out"}
)  # ops that use them
_STORED: Final[dict[DType, float]] = {DType.BF16: 2.5e-3, DType.BF16X2: 6e-6}

# Of chains of kernels against recorded values, by the dtype of activations.
SUBLAYER_ABSOLUTE: Final = 1e-3  # float32 and pairs
SUBLAYER_RELATIVE: Final = 1e-2  # bfloat16, of rms
LOGITS_RELATIVE: Final = 2e-2  # a whole model in bfloat16, of rms
FAST_RELATIVE: Final = 0.1  # with one bfloat16 throughout; 8 % is the worst that was seen
# A whole model at any one position, float32 and precision "high" alike. Rows whose mean square is
# near eps amplify rounding: float32 reaches 1.1e-4 there, "high" 6.1e-4.
POSITION_ABSOLUTE: Final = 1e-3


def tolerance(op: str, act: DType, stored: DType, *, is_gpu: bool = False) -> float:
    """For an output of `op` that is stored so, on a backend with those activations; on a GPU, or on
    what computes as the double of one does.
    """
    if op in _COPIES:
        return 0.0
    inside = _INSIDE[op][act] if op in _INSIDE else FLOAT32
    if is_gpu and op in _MATRIX_UNITS:
        inside = max(inside, _CUT_OFF)
    return max(inside, _STORED.get(stored, 0.0))
