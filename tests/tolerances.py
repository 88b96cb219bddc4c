"""The one table of tolerances: how far a kernel may be from the reference, by backend and op.

IS: relative errors, rms(difference) / rms(reference) per output, fixed by a backend's arithmetic.
IS NOT: adjustable from outside, nor used where bits must be equal. Called by: tests/backend.

The values are what float32 (cpu) gives, with a factor of about five to spare. On cuda and simt the
operands of the matrix units are bfloat16, and so is what ops write as their input (`ACT`):
half an ulp of bfloat16 is 2^-9 = 2e-3.
"""

from __future__ import annotations

from typing import Final

ACTIVATION_BF16: Final = 4e-3  # an output that is stored as bfloat16
FLOAT32: Final = 1e-6
SUBLAYER_ABSOLUTE: Final = 1e-3  # kernels against recorded values of whole sublayers

_CPU: Final[dict[str, float]] = {
    "embed": 0.0,
    "rmsnorm": FLOAT32,
    "add_rmsnorm": FLOAT32,
    "linear": FLOAT32,
    "conv_window": FLOAT32,
    "delta_gates": FLOAT32,
    "delta_rule": 2e-6,
    "gated_rmsnorm": FLOAT32,
    "rope_append": FLOAT32,
    "attention": 2e-6,
    "silu_mul": FLOAT32,
    "last_row": 0.0,
    "advance": 0.0,
    "sample": 0.0,
}
_TENSOR_CORES: Final[dict[str, float]] = {
    **_CPU,
    "rmsnorm": ACTIVATION_BF16,
    "add_rmsnorm": ACTIVATION_BF16,
    "gated_rmsnorm": ACTIVATION_BF16,
    "attention": ACTIVATION_BF16,
    "silu_mul": ACTIVATION_BF16,
}
STORED_BF16: Final = 2.5e-3  # keys or values stored as bfloat16

TOLERANCE: Final[dict[str, dict[str, float]]] = {
    "cpu": _CPU,
    "simt": _TENSOR_CORES,
    "cuda": _TENSOR_CORES,
}
