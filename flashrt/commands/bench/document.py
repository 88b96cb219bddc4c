"""What every bench on a checkpoint shares: its options, its model, and the facts about a run.

IS: the choice of model, the opening of the document and of its report, and where the JSON goes.
IS NOT: any measurement. Called by: bench, bench_report, and the other benches.
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

from rich.console import Console

from flashrt.base.errors import FlashrtError
from flashrt.base.flags import thread_count
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, cached_random_checkpoint
from flashrt.commands.doctor import cpu_name, version_of
from flashrt.engine.actions import PolicyEngine
from flashrt.load import SessionEngine
from flashrt.view.units import bytes_text

Document = Mapping[str, Any]
T = TypeVar("T")
_BUSY = 0.5  # load average before a run, beyond which a report warns


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


def opening(options: BenchOptions) -> dict[str, Any]:
    """Facts from before the run: it is the load of others that counts, not our own."""
    is_named = options.checkpoint is None
    return {
        "command": shlex.join(["flashrt", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": f"random, {options.shape}" if is_named else str(options.checkpoint),
        "precision": options.engine.precision,
        "threads": thread_count(),
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {n: version_of(n) for n in ("flashrt", "numpy")}
        | {"python": platform.python_version()},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def of_engine(engine: SessionEngine | PolicyEngine) -> dict[str, Any]:
    """Facts about what was loaded."""
    return {
        "device": engine.device,
        "fingerprint": engine.fingerprint,
        "weights_bytes": engine.stats()["weights_bytes"],
    }


def show_opening(screen: Console, document: Document) -> None:
    """Model, machine and date; a warning if others were using the machine."""
    screen.print(
        f"\n[bold]{document['model']}[/] ({bytes_text(document['weights_bytes'])} of weights) on "
        f"{document['device']}: {document['machine']['processor']}, {document['threads']} threads, "
        f"{document['date']}"
    )
    if (load := document["load_average"]) is not None and load > _BUSY:
        screen.print(
            f"[yellow]The machine was busy before this run (load average {load:.1f}): "
            "figures are lower than they would be.[/]"
        )


def deliver(document: Document, json_path: Path | None, show: Callable[[Document], None]) -> None:
    """As a report on stdout, and JSON in a file; `-` is JSON on stdout in place of the report.

    Raises FlashrtError if the file cannot be written.
    """
    if json_path is not None and str(json_path) == "-":
        console.print_json(document)
        return
    show(document)
    if json_path is None:
        return
    try:
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FlashrtError(f"cannot write {json_path}: {error}; give another path") from error
