"""`flashrt replay`: run a recorded session again and check its digest at every boundary.

IS: the command around session.recording's replay. IS NOT: recording.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.commands.store import Subparsers
from flashrt.session import recording as replays
from flashrt.store.store import Store

NOTHING = "none"


def register(commands: Subparsers) -> None:
    """Add `replay` to the command line."""
    purpose = "Run a recorded session again and check tokens and digests at every boundary."
    examples = (
        "examples:\n  flashrt replay agent.capsule agent.recording\n"
        "  flashrt replay none cold.recording --checkpoint ~/models/Qwen3.5-0.8B\n"
        '  flashrt replay "system prompt" agent.recording --store ~/capsules'
    )
    parser = commands.add_parser("replay", help=purpose, description=purpose, epilog=examples)
    parser.set_defaults(command=_command)
    parser.add_argument(
        "capsule", metavar="CAPSULE",
        help="a capsule file; with --store a name or an id; `none` for a recording from the start",
    )  # fmt: skip
    parser.add_argument(
        "recording", type=Path, metavar="RECORDING", help="what a SessionRecorder wrote"
    )
    parser.add_argument("--store", metavar="STORE", help="where the capsule is")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="default: the one that the recording names"
    )
    parser.add_argument("--kv-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead")


def replay(
    which: str, recording: Path, store: str | None, options: EngineOptions, checkpoint: Path | None
) -> replays.SessionReplay:
    """Load what the recording was made with, and run it. Raises FlashrtError."""
    head, _, _ = replays.read_recording(recording)
    options = dataclasses.replace(
        options, device=head.device, max_positions=head.max_positions, lanes=1
    )
    engine = open_engine(checkpoint or Path(head.checkpoint), options)
    capsule = None
    if which != NOTHING:
        capsule = engine.load_capsule(which) if store is None else Store(store).load(engine, which)
    return replays.replay(engine, capsule, recording)


def _command(options: argparse.Namespace) -> int:
    """1 when something differs."""
    engine = EngineOptions(kv_dtype=options.kv_dtype)
    report = replay(options.capsule, options.recording, options.store, engine, options.checkpoint)
    if options.json:
        console.print_json(dataclasses.asdict(report))
    else:
        _show(report)
    return 0 if report.mismatch is None else 1


def _show(report: replays.SessionReplay) -> None:
    screen = console.screen()
    if report.mismatch is None:
        screen.print(
            console.styled("the same bits", "green"),
            f": {report.steps} calls, {report.tokens:,} tokens, {report.boundaries} digests agree",
        )
    else:
        differs = console.styled("differs", "bold red")
        screen.print(differs, f" after {report.steps} calls that agree")
        screen.print(report.mismatch)
    if report.is_cut_short:
        screen.print("the recording's last line was cut short; it was left out")
