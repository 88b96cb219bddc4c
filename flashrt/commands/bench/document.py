"""What every bench shares: its options, its model, the facts about a run, and where results go.

IS: the choice of model, the opening of the document and of its report, and the outputs, checked
before anything is measured. IS NOT: any measurement.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from flashrt.base.errors import FlashrtError
from flashrt.base.files import replace_file
from flashrt.base.flags import thread_count
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, cached_random_checkpoint
from flashrt.commands.doctor import cpu_name, version_of
from flashrt.engine.engine import Engine
from flashrt.view.figure import check_figure

Document = Mapping[str, Any]
Show = Callable[[Document], None]
Plot = Callable[[Document, Path], Path]
T = TypeVar("T")
_STDOUT = "-"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure. `lengths` and what else depends on the model: None = by shape."""

    shape: str = "mini"
    checkpoint: Path | None = None
    lengths: list[int] | None = None
    repeats: int = 3
    engine: EngineOptions = field(default_factory=EngineOptions)

    def by_shape(self, values: Mapping[str, T], otherwise: T) -> T:
        """The default of a shape; `otherwise` for other shapes and for checkpoints."""
        return otherwise if self.checkpoint is not None else values.get(self.shape, otherwise)


def checkpoint_of(options: BenchOptions, has_draft_head: bool = False) -> Path:
    """The directory; a random one is written with a draft head, or without."""
    if options.checkpoint is not None:
        return options.checkpoint
    with console.progress_bars() as progress:
        return cached_random_checkpoint(options.shape, progress, has_draft_head)[0]


def provenance(*distributions: str) -> dict[str, Any]:
    """What ran, when, and on which versions."""
    return {
        "command": shlex.join(["flashrt", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {n: version_of(n) for n in ("flashrt", "numpy", *distributions)}
        | {"python": platform.python_version()},
    }


def opening(options: BenchOptions) -> dict[str, Any]:
    """Facts from before the run: it is the load of others that counts, not our own."""
    is_named = options.checkpoint is None
    return {
        **provenance(),
        "model": f"random, {options.shape}" if is_named else str(options.checkpoint),
        "precision": options.engine.precision,
        "threads": thread_count(),
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "load_average": os.getloadavg()[0],
    }


def of_engine(engine: Engine) -> dict[str, Any]:
    """Facts about what was loaded."""
    return {
        "device": engine.device,
        "fingerprint": engine.fingerprint,
        "weights_bytes": engine.stats()["weights_bytes"],
    }


def check_outputs(
    json_path: Path | None, plot_path: Path | None = None, *, svg_is_ours: bool = False
) -> None:
    """Before anything is measured. Raises FlashrtError for a folder that is not there, and for a
    plot that could not be drawn (see `check_figure`).
    """
    for path in (json_path, plot_path):
        if path is not None and str(path) != _STDOUT and not path.absolute().parent.is_dir():
            raise FlashrtError(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if plot_path is not None:
        check_figure(plot_path, svg_is_ours=svg_is_ours)


def deliver(
    document: Document, json_path: Path | None, show: Show,
    plot_path: Path | None = None, plot: Plot | None = None,
) -> None:  # fmt: skip
    """As a report on stdout, and JSON in a file; `-` is JSON on stdout in place of the report.

    Raises FlashrtError if a file cannot be written.
    """
    if str(json_path) == _STDOUT:
        console.print_json(document)
    else:
        show(document)
        if json_path is not None:
            try:
                replace_file(json_path, json.dumps(document, indent=2) + "\n", is_durable=True)
            except OSError as error:
                reason = f"cannot write {json_path}: {error.strerror}; give another path"
                raise FlashrtError(reason) from error
    if plot_path is not None and plot is not None:
        console.screen(is_error=True).print(f"plot: {plot(document, plot_path)}")
