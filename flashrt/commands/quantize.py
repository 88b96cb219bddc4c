"""`flashrt quantize`: a checkpoint directory with weights of four or eight bits.

IS: the command and its report. IS NOT: the quantiser or the files (weights/formats).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flashrt.commands import console
from flashrt.view.units import bytes_text
from flashrt.weights.formats.quantise import TARGETS
from flashrt.weights.formats.write import quantise_checkpoint

WEIGHTS = tuple(TARGETS)
_WORST = 5


def quantize(src: Path, dst: Path, weights: str, as_json: bool) -> int:
    """The command: writes `dst`, and tells what the weights lost."""
    with console.progress_bars() as progress:
        losses = quantise_checkpoint(src, dst, weights, progress)
    before, after = (_weights_nbytes(folder) for folder in (src, dst))
    if as_json:
        console.print_json({
            "path": str(dst), "weights": weights, "source_bytes": before, "bytes": after,
            "tensors": [{"name": name, "relative_error": loss} for name, loss in losses],
        })  # fmt: skip
        return 0
    screen = console.screen()
    columns = ("matrices", ">count", ">mean error", ">worst error")
    screen.print(console.table(f"{len(losses)} matrices as {weights}", columns, _by_kind(losses)))
    worst = sorted(losses, key=lambda item: -item[1])[:_WORST]
    rows = [[name, f"{loss:.3%}"] for name, loss in worst]
    screen.print(console.table("Largest errors", ("~tensor", ">error"), rows))
    screen.print(
        f"{console.one_line(str(dst))}: {bytes_text(after)} of weights, {bytes_text(before)} "
        "before. Errors are those of weights, relative to their root mean square"
    )
    return 0


def _by_kind(losses: Sequence[tuple[str, float]]) -> list[list[str]]:
    kinds: dict[str, list[float]] = {}
    for name, loss in losses:
        kind = re.sub(r"\.\d+\.", ".N.", name.removesuffix(".weight"))
        kinds.setdefault(kind, []).append(loss)
    return [
        [kind, f"{len(found)}", f"{sum(found) / len(found):.3%}", f"{max(found):.3%}"]
        for kind, found in kinds.items()
    ]


def _weights_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
