"""A GPU bench's document as a page of Markdown: setting, targets, tables.

IS: figures -> text. IS NOT: measurement, nor ratios; the documents have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]
_SIMT_WARNING = (
    "**simt: verification, not speed. No figure on this page says how fast anything is.**"
)


# ---- targets


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that flashrt means to reach on one device: at least, or at most, a value."""

    shape: str
    position: int
    what: str
    path: tuple[str, ...]  # into a row of the document
    value: float
    form: str = "{:.2f}"
    is_least: bool = True


TARGET_DEVICE = "H200"
TARGETS = (
    Target("27b", 2048, "decode, weights / copy", ("figures", "decode_weights_of_copy"), 0.80),
    Target("0.8b", 2048, "decode, weights / copy", ("figures", "decode_weights_of_copy"), 0.50),
    Target("27b", 16384, "restore, us", ("device", "restore", "us"), 1000, "{:,.0f}", False),
    Target(
        "27b", 16384, "restore of an ancestor, us", ("device", "restore_ancestor", "us"), 200,
        "{:,.0f}", False,
    ),
    Target("27b", 16384, "TTFT, cold / warm", ("figures", "ttft_ratio"), 27, "{:.1f}"),
)  # fmt: skip


def targets(document: Document) -> list[str]:
    """Lines on targets that are set for this shape on this device; none for others."""
    if TARGET_DEVICE not in document["device"] or document["is_verification_only"]:
        return []
    rows = []
    for target in (t for t in TARGETS if t.shape == document["shape"]):
        found = _found(document, target)
        side = "at least" if target.is_least else "at most"
        goal = f"{side} {target.form.format(target.value)}"
        if found is None:
            rows.append([target.what, f"{target.position:,}", goal, "not measured", ""])
            continue
        is_met = found >= target.value if target.is_least else found <= target.value
        verdict = "met" if is_met else "**missed**"
        rows.append([target.what, f"{target.position:,}", goal, target.form.format(found), verdict])
    if not rows:
        return []
    return ["## Targets", "", *_table(["figure", "position", "target", "found", ""], rows), ""]


def _found(document: Document, target: Target) -> float | None:
    for row in document["rows"]:
        if row["tokens"] == target.position:
            value: Any = row
            for key in target.path:
                value = value.get(key) if isinstance(value, dict) else None
            return None if value is None else float(value)
    return None


# ---- Markdown


def markdown(document: Document) -> str:
    """The page of one document."""
    lines = [f"# {document['shape']} on {document['device']}, {document['date'][:10]}", ""]
    if document["is_verification_only"]:
        lines += [_SIMT_WARNING, ""]
    lines += _setting(document)
    if document["failed"]:
        lines += ["", "**Failed stages:**", ""]
        lines += [f"- {name}: {reason}" for name, reason in document["failed"].items()]
    lines += ["", *targets(document), *_lengths_tables(document), "", *_kernel_table(document), ""]
    return "\n".join(lines)


def _setting(document: Document) -> list[str]:
    limits, smi = document.get("limits"), document["clocks_before"]
    lines = [
        f"- command: `{document['command']}`",
        f"- device: {document['device']}, {document['arch']}, {document['multiprocessors']} "
        f"multiprocessors; driver {smi.get('driver_version', 'unknown')} (CUDA "
        f"{document['driver_for_cuda']}); {document['compiler']}",
        f"- clocks before and after: {_clocks(smi)}; {_clocks(document.get('clocks_after', {}))}",
        f"- model: random weights of the {document['shape']} shape, precision "
        f"{document['precision']}, fingerprint {document.get('fingerprint', 'unknown')}",
        f"- restored states equal to the bit: {'yes' if document['is_exact'] else '**NO**'}",
    ]
    if limits:
        lines.append(
            f"- limits, measured in this run: copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s "
            f"(read + write; driver {limits['driver_copy_bytes_per_s'] / 1e9:,.0f}, kernel "
            f"{limits['kernel_copy_bytes_per_s'] / 1e9:,.0f}), read "
            f"{limits['read_bytes_per_s'] / 1e9:,.0f} GB/s, bare mma loop "
            f"{limits['mma_flops'] / 1e12:,.1f} TFLOP/s"
        )
    if "weights_bytes" in document:
        lines.append(
            f"- weights {document['weights_bytes'] / 1e9:,.2f} GB, of which a token streams "
            f"{document['streamed_bytes'] / 1e9:,.2f} GB; loaded in {document['load_s']:.1f} s; "
            f"{document['launches_per_token']} ops per token"
        )
    return lines


def _clocks(smi: dict[str, str]) -> str:
    if not smi:
        return "unknown"
    return ", ".join(smi.get(k, "?") for k in ("clocks.sm", "clocks.mem", "power.draw"))


_DEVICE_COLUMNS = (
    ("decode, tokens/s", "decode_device_tokens_per_s", "{:,.1f}"),
    ("weights / copy", "decode_weights_of_copy", "{:.1%}"),
    ("all bytes / copy", "decode_bytes_of_copy", "{:.1%}"),
    ("weights / read", "decode_weights_of_read", "{:.1%}"),
    ("prefill launch / mma", "prefill_launch_of_mma", "{:.1%}"),
)
_SESSION_COLUMNS = (
    ("prefill, tokens/s", "prefill_tokens_per_s", "{:,.0f}"),
    ("of mma", "prefill_of_mma", "{:.1%}"),
    ("decode, tokens/s", "decode_tokens_per_s", "{:,.1f}"),
    ("ITL p50, ms", "itl_p50_s", "ms"),
    ("ITL p99, ms", "itl_p99_s", "ms"),
    ("tokens", "itl_tokens", "{:,}"),
    ("TTFT cold, ms", "ttft_cold_s", "ms"),
    ("TTFT warm, ms", "ttft_warm_s", "ms"),
    ("cold / warm", "ttft_ratio", "{:.1f}x"),
    ("TTFT of a turn, ms", "ttft_turn_s", "ms"),
    ("snapshot, ms", "snapshot_s", "ms"),
    ("restore, ms", "restore_s", "ms"),
    ("ancestor, ms", "restore_ancestor_s", "ms"),
    ("rollback + replay, ms", "rollback_s", "ms"),
)


def _lengths_tables(document: Document) -> list[str]:
    rows = document["rows"]
    turn, replays = document["turn_tokens"], document["decode_replays"]
    return [
        "## On the device",
        "",
        f"By events. Decode: {replays} replays in a row that begin at the position; a token's "
        "weights, or all bytes it must move, per second of it, over the copy rate.",
        "",
        *_table(["position", *(c[0] for c in _DEVICE_COLUMNS)], (
            [f"{row['tokens']:,}", *(_cell(row["figures"], *c[1:]) for c in _DEVICE_COLUMNS)]
            for row in rows
        )),
        "",
        "Capsules: us, beside a plain device copy of as many bytes.",
        "",
        *_table(["position", "move", "MB", "us", "plain copy, us", "plain / ours"], (
            _move_row(row, name) for row in rows if "device" in row
            for name in ("snapshot", "restore", "restore_ancestor", "rollback")
        )),
        "",
        "## Through the session",
        "",
        f"By the host's clock, medians. ITL over so many tokens from the position on; warm: "
        f"restore, {turn} tokens, first token; cold: the same prompt from nothing; TTFT of a turn: "
        f"after a reply, {document['short_turn_tokens']} tokens of the user, first token.",
        "",
        *_table(["position", *(c[0] for c in _SESSION_COLUMNS)], (
            [f"{row['tokens']:,}", *(_cell(row["figures"], *c[1:]) for c in _SESSION_COLUMNS)]
            for row in rows
        )),
    ]  # fmt: skip


def _move_row(row: Document, name: str) -> list[str]:
    move, ratio = row["device"][name], row["figures"].get(f"{name}_of_plain_copy")
    return [
        f"{row['tokens']:,}", name.replace("_", " "), f"{move['nbytes'] / 1e6:,.1f}",
        f"{move['us']:,.1f}", f"{move['plain_us']:,.1f}", "" if ratio is None else f"{ratio:.0%}",
    ]  # fmt: skip


def _kernel_table(document: Document) -> list[str]:
    kernels = document["kernels"]
    if not kernels:
        return []
    totals: dict[str, float] = {}
    for k in kernels:
        totals[k["phase"]] = totals.get(k["phase"], 0.0) + k["us"] * k["launches"]
    rows = (
        [
            f"{k['phase']}/{k['rows']}", k["op"] + (" (warm)" if k["is_warm"] else ""),
            " ".join(f"{n}={v}" for n, v in k["dims"].items()), f"{k['launches']}",
            f"{k['us']:,.1f}", f"{k['us'] * k['launches'] / totals[k['phase']]:.1%}",
            f"{k['nbytes'] / k['us'] / 1e3:,.0f}",
            f"{k['flop'] / k['us'] / 1e6:,.1f}" if k["flop"] else "",
        ]
        for k in sorted(kernels, key=lambda k: (k["phase"], -k["us"] * k["launches"]))
    )  # fmt: skip
    return [
        f"## Kernels at position {document['kernels_at']:,}",
        "",
        "Per launch of an op, each layer's after another's, by events. GB/s and TFLOP/s count what "
        "must be moved and multiplied. (warm): on what it had just run on, caches warm.",
        "",
        *_table(["phase", "op", "dims", "launches", "us", "share", "GB/s", "TFLOP/s"], rows),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _cell(figures: dict[str, float], key: str, form: str) -> str:
    if key not in figures:
        return ""
    return f"{figures[key] * 1e3:,.3f}" if form == "ms" else form.format(figures[key])
