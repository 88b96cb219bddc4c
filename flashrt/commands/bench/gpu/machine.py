"""Clocks, temperature and driver of the GPU, as nvidia-smi tells them.

IS: a note beside figures: a GPU that throttles or shares its power is slower than its name. IS NOT:
required; without nvidia-smi the note is empty.
"""

from __future__ import annotations

import subprocess

_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw",
    "power.limit", "temperature.gpu", "clocks_throttle_reasons.active", "mig.mode.current",
)  # fmt: skip


def clocks() -> dict[str, str]:
    """Field to value; empty where nvidia-smi is missing or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False))
