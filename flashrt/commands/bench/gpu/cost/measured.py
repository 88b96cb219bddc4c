"""Measured times of the same GPU and shape: what `flashrt bench --device cuda` and the GPU report
wrote.

IS: their documents, found and read. IS NOT: a judgement: the model's figures stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.commands.bench.gpu.cost.devices import Gpu
from flashrt.ops.attention import ATTENTION

_Key = tuple[str, str, tuple[tuple[str, int], ...]]  # phase, op, dims


@dataclass(frozen=True, slots=True)
class Measured:
    """Microseconds on one GPU, of one shape."""

    source: str = ""
    per_launch: Mapping[_Key, float] = field(default_factory=dict)  # of an op
    decode: Mapping[int, float] = field(default_factory=dict)  # per token, by position
    first_token: Mapping[int, float] = field(default_factory=dict)  # by tokens of the prompt
    kernels_at: int = 0  # the position of `per_launch`
    read_bytes_per_s: float | None = None  # what a kernel that only reads gets of DRAM
    mma_flops: float | None = None  # what a bare loop of mma.sync reaches

    def op(self, phase: str, op: str, dims: Mapping[str, int], position: int) -> float | None:
        """Of one launch of an op; None where it was not measured. What attention takes depends on
        the position, so only that of `kernels_at` is compared.
        """
        if op == ATTENTION.name and position != self.kernels_at:
            return None
        return self.per_launch.get((phase, op, tuple(sorted(dims.items()))))


def measured(place: Path, gpu: Gpu, shape: str, form: str, precision: str) -> Measured:
    """From a document, or from the newest that fits in a folder; nothing where none does.

    A document without a format of weights is of bfloat16. Raises FlashrtError where `place` is
    neither a file nor a folder, or where a file is no report of a GPU.
    """
    if not place.is_dir():
        documents = list(_documents(place, is_asked_for=True))
    else:
        documents = [d for path in sorted(place.glob("*.json")) for d in _documents(path)]
    fitting = [
        d for d in documents
        if gpu.title.lower() in str(d["device"]).lower() and not d["is_verification_only"]
        and (d["shape"], d["precision"], d.get("weights") or "bfloat16") == (shape, precision, form)
    ]  # fmt: skip
    if not fitting:
        return Measured()
    return _of(max(fitting, key=lambda d: str(d["date"])))


def _documents(path: Path, *, is_asked_for: bool = False) -> Iterator[dict[str, Any]]:
    """The GPU bench's documents of a file, which has one or one per shape."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlashrtError(f"cannot read {path}: {error.strerror}; give another path") from error
    except ValueError as error:
        raise FlashrtError(f"{path} is no JSON: {error}; give a report of a GPU") from error
    some = content if isinstance(content, list) else [content]
    found = [d for d in some if isinstance(d, dict) and "is_verification_only" in d]
    if is_asked_for and not found:
        raise FlashrtError(f"{path} is no report of `flashrt bench --device cuda`; give one")
    yield from found


def _of(document: dict[str, Any]) -> Measured:
    rows, bare = document["rows"], document.get("limits", {})
    return Measured(
        f"{document['device']}, {document['date'][:10]}",
        {
            (k["phase"], k["op"], tuple(sorted(k["dims"].items()))): float(k["us"])
            for k in document["kernels"]
        },
        {row["tokens"]: float(row["device"]["decode_us"]) for row in rows if "device" in row},
        {
            row["tokens"]: 1e6 * float(row["figures"]["ttft_cold_s"])
            for row in rows if "ttft_cold_s" in row.get("figures", {})
        },
        int(document.get("kernels_at", 0)),
        bare.get("read_bytes_per_s"),
        bare.get("mma_flops"),
    )  # fmt: skip
