"""Checkpoints of model families, for the suites that every family must pass.

IS: by name a folder that holds one, small and random. A new family adds a line to FAMILIES, and
golden sets of its own to tests/golden/families (tools/family_golden.py writes them). IS NOT: cases,
see tests/property/test_families.py and tests/golden/test_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests import dense_models

SETS = Path(__file__).parent / "golden" / "families"  # with what transformers makes of them


def _dense(name: str, folder: Path) -> Path:
    return dense_models.write(folder / name, dense_models.CONFIGS[name])


def _golden(name: str, folder: Path) -> Path:
    del folder
    return SETS / name


# Name -> the checkpoint, written into a folder if need be. Vocabularies of 512 tokens at least.
FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "llama-biased": partial(_dense, "llama-biased"),
    "lfm2": partial(_golden, "lfm2"),
    "lfm2-odd": partial(_golden, "lfm2-odd"),
    "granite-odd": partial(_golden, "granite-odd"),
    "granite-moe": partial(_golden, "granite-moe"),
    "lfm2-moe": partial(_golden, "lfm2-moe"),
    "qwen3-5-moe": partial(_golden, "qwen3-5-moe"),
    "qwen3-next": partial(_golden, "qwen3-next"),
    "nemotron": partial(_golden, "nemotron"),
    "nemotron-odd": partial(_golden, "nemotron-odd"),
}
