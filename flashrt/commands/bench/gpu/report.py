"""The GPU bench's documents as pages: JSON as measured, Markdown to read, a picture.

IS: ratios from samples, files that are replaced whole. IS NOT: measurement, nor how they look
(view).
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.base.files import replace_file
from flashrt.view.gpu_page import markdown
from flashrt.view.gpu_plot import plot

Document = dict[str, Any]


def stem(document: Document) -> str:
    """File name without suffix: <device>-<date>-<shape>, the device in letters and digits."""
    device = re.sub(r"[^a-z0-9]+", "-", str(document["device"]).lower()).strip("-")
    precision = "" if document["precision"] == "bfloat16" else f"-{document['precision']}"
    return f"{device}-{document['date'][:10]}-{document['shape']}{precision}"


def write(
    documents: Sequence[Document], folder: Path, name: str, *, has_picture: bool = True
) -> None:
    """name.json, .md and, with matplotlib, .png; one document, or one per shape.

    Raises FlashrtError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = documents[0] if len(documents) == 1 else list(documents)
        text = json.dumps(content, indent=1) + "\n"
        replace_file(folder / f"{name}.json", text, is_durable=True)
        text = "\n".join(markdown(d) for d in documents)
        replace_file(folder / f"{name}.md", text, is_durable=True)
        if has_picture:
            plot(documents, folder / f"{name}.png")
    except OSError as error:
        raise FlashrtError(f"cannot write into {folder}: {error}; give another --out") from error


# ---- ratios


def fold_lengths(document: Document) -> None:
    """Fill `figures` of each row: what the samples and the limits come to."""
    limits = document.get("limits", {})
    for row in document["rows"]:
        figures: dict[str, float] = {}
        if "device" in row and "decode_bytes" in row:
            figures |= _device_figures(document, row, limits)
        if "session" in row:
            figures |= _session_figures(row, limits)
        row["figures"] = figures


def _device_figures(document: Document, row: Document, limits: Document) -> dict[str, float]:
    found = row["device"]
    decode_s, prefill_s = found["decode_us"] / 1e6, found["prefill_us"] / 1e6
    figures = {
        "decode_device_tokens_per_s": 1 / decode_s,
        "prefill_launch_flops": row["prefill_launch_flop"] / prefill_s,
    }
    for name in ("snapshot", "restore", "restore_ancestor", "rollback"):
        figures[f"{name}_of_plain_copy"] = found[name]["plain_us"] / found[name]["us"]
    if limits:
        weights_s = document["streamed_bytes"] / decode_s
        figures |= {
            "decode_weights_of_copy": weights_s / limits["copy_bytes_per_s"],
            "decode_weights_of_read": weights_s / limits["read_bytes_per_s"],
            "decode_bytes_of_copy": row["decode_bytes"] / decode_s / limits["copy_bytes_per_s"],
            "prefill_launch_of_mma": figures["prefill_launch_flops"] / limits["mma_flops"],
        }
    return figures


def _session_figures(row: Document, limits: Document) -> dict[str, float]:
    found = row["session"]
    medians = {k: statistics.median(v) for k, v in found.items() if isinstance(v, list) and v}
    gaps = found["inter_token_s"]
    figures = {
        **{k: v for k, v in medians.items() if k.endswith("_s") and k != "inter_token_s"},
        "itl_p50_s": _percentile(gaps, 0.5),
        "itl_p99_s": _percentile(gaps, 0.99),
        "itl_tokens": len(gaps),
        "decode_tokens_per_s": len(gaps) / sum(gaps),
        "prefill_tokens_per_s": row["tokens"] / medians["prefill_s"],
        "prefill_flops": row["prefill_flop"] / medians["prefill_s"],
        "ttft_ratio": medians["ttft_cold_s"] / medians["ttft_warm_s"],
    }
    if limits:
        figures["prefill_of_mma"] = figures["prefill_flops"] / limits["mma_flops"]
    return figures


def _percentile(samples: Sequence[float], fraction: float) -> float:
    return float(np.quantile(np.array(samples), fraction, method="higher"))
