"""What commands share to talk to a person or a program: tables, progress bars, JSON.

IS: rich, set up once. IS NOT: any measurement. Progress goes to stderr, results to stdout, so that
results can be piped. Called by: the other commands.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from flashrt.core.backend import Progress
from flashrt.view.units import bytes_text

_PIPE_WIDTH = 140  # columns where there is no terminal to ask
_COUNTED_IN_BYTES = frozenset({"weights", "random weights"})


def screen(*, is_error: bool = False) -> Console:
    """A console on stdout, or on stderr."""
    made = Console(stderr=is_error, highlight=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that narrows by wrapping words, never figures.

    A column whose name begins with `>` holds figures, to the right; one with `~` may break words.
    """
    made = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    made.show_header = any(columns)
    for i, name in enumerate(columns):
        is_figure, may_break = name.startswith(">"), name.startswith("~")
        header, cells = name.lstrip(">~"), [Text.from_markup(row[i]).plain for row in rows]
        whole = cells if is_figure else [word for cell in cells for word in cell.split()]
        made.add_column(
            header,
            justify="right" if is_figure else "left",
            overflow="fold",
            min_width=None if may_break else max(map(len, [*header.split(), *whole]), default=1),
        )
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callback that draws one bar per `what` on stderr, and clears them at the end.

    A total of 0 means that the end is not known. Where stderr is no terminal, nothing is drawn.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    console = screen(is_error=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None, amount="")
            text = f"{done:,} / {total:,}" if total else ""
            if what in _COUNTED_IN_BYTES:
                text = f"{bytes_text(done)} / {bytes_text(total)}"
            bars.update(tasks[what], completed=done, total=total or None, amount=text)

        yield report


def yes_no(value: bool) -> str:
    """A check's outcome, coloured."""
    return "[green]yes[/]" if value else "[bold red]NO[/]"
