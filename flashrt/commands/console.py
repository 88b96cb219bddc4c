"""What commands share to talk to a person or a program: text, tables, trees, progress, JSON.

IS: the one door to rich and to the standard streams. IS NOT: any measurement.

A `str` is shown as it is, never as markup: names, paths and texts of models and users hold brackets
and terminal escapes. Control characters become visible (\\x1b); style is given apart, by `styled`.
Progress and notes go to stderr, results to stdout, so that results can be piped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

import rich.table
import rich.tree
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import visible, visible_json
from flashrt.core.backend import Progress
from flashrt.view.units import bytes_text

Part = str | Text  # plain, or styled
Table = rich.table.Table

_PIPE_WIDTH = 140  # columns where there is no terminal to ask
_COUNTED_IN_BYTES = frozenset({"weights", "random weights"})
_ASCII = str.maketrans({"µ": "u", "█": "#"})


# -- text -----------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """`visible`, newlines and tabs too: a name or a path within a sentence."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def styled(text: str, style: str) -> Text:
    """Text in a style of rich's, such as `bold` or `green`."""
    return Text(visible(text), style)


def line(*parts: Part) -> Text:
    """Parts one after another."""
    return Text.assemble(*(visible(p) if isinstance(p, str) else p for p in parts))


def yes_no(value: bool) -> Text:
    """A check's outcome, coloured."""
    return styled("yes", "green") if value else styled("NO", "bold red")


# -- tables and trees -----------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Part]]) -> Table:
    """A table that narrows by wrapping words, never figures.

    A column whose name begins with `>` holds figures, to the right; one with `~` may break words.
    """
    made = Table(
        title=styled(one_line(title), "bold") if title else None,
        title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns),
    )  # fmt: skip
    lines = [[line(cell) for cell in row] for row in rows]
    for i, name in enumerate(columns):
        is_figure, may_break = name.startswith(">"), name.startswith("~")
        header, cells = name.lstrip(">~"), [row[i].plain for row in lines]
        whole = cells if is_figure else [word for cell in cells for word in cell.split()]
        made.add_column(
            line(header),
            justify="right" if is_figure else "left",
            overflow="fold",
            min_width=None if may_break else max(map(len, [*header.split(), *whole]), default=1),
        )
    for row in lines:
        made.add_row(*row)
    return made


class Tree:
    """A label with branches below it."""

    def __init__(self, *label: Part) -> None:
        self.drawn = rich.tree.Tree(line(*label), guide_style="dim")

    def add(self, *label: Part) -> Tree:
        """A branch; returns it."""
        branch = Tree(*label)
        self.drawn.children.append(branch.drawn)
        return branch


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # as any other writer does: the exception that brought us here  # noqa: PLE0704


class Screen:
    """Where a person reads: stdout or stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def print(self, *parts: Part | Table | Tree, style: str = "") -> None:
        """A table or a tree; or parts of text as one paragraph, in a style of its own."""
        if len(parts) == 1 and not isinstance(parts[0], str | Text):
            self._console.print(parts[0].drawn if isinstance(parts[0], Tree) else parts[0])
            return
        text = line(*(part for part in parts if isinstance(part, str | Text)))
        text.style = style
        if self._console.options.ascii_only:
            text.plain = text.plain.translate(_ASCII)
        self._console.print(text)


def screen(*, is_error: bool = False) -> Screen:
    """On stdout, or on stderr."""
    return Screen(_console(is_error))


def _console(is_error: bool) -> Console:
    made = _Console(stderr=is_error, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A progress callback that draws one bar per `what` on stderr, and clears them at the end.

    A total of 0 means that the end is not known. Where stderr is no terminal, nothing is drawn.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
    )
    console = _console(is_error=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(one_line(what), total=total or None, amount="")
            text = f"{done:,} / {total:,}" if total else ""
            if what in _COUNTED_IN_BYTES:
                text = f"{bytes_text(done)} / {bytes_text(total)}"
            bars.update(tasks[what], completed=done, total=total or None, amount=text)

        yield report


# -- streams --------------------------------------------------------------------------------------


def open_streams() -> None:
    """Before anything else: no text can fail to be encoded, and no file that is opened later gets
    the number of a standard stream. Raises FlashrtError where stdout is closed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        raise FlashrtError("standard output is closed; give it a file, or >/dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon(stream: TextIO) -> None:
    """What is still in a stream's buffer goes nowhere: its reader has gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def complain(message: str) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"flashrt: {visible(message)}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """What a library warns of meanwhile is a line on stderr, at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: complain(f"note: {message}")
        yield


def write(text: str, *, is_dim: bool = False) -> None:
    """A piece of a model's text on stdout, at once: as it is for a program, visible for a person.

    Raises OSError when nobody can read it.
    """
    if is_dim and sys.stdout.isatty():
        _console(False).print(Text(visible(text), "dim"), end="", soft_wrap=True)
        sys.stdout.flush()
        return
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_stdin() -> str:
    """All of stdin. Raises FlashrtError when it is closed, a terminal, or not UTF-8."""
    if sys.stdin is None:
        raise FlashrtError("standard input is closed; give it a file, or --prompt TEXT")
    if sys.stdin.isatty():
        raise FlashrtError("nothing to read; give --prompt TEXT, or text on stdin")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FlashrtError(
            f"stdin is not valid UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise FlashrtError(f"cannot read stdin: {error.strerror}") from error


def print_json(value: object) -> None:
    """One JSON document on stdout. Every character is one that a terminal shows."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not is_unicode)
    sys.stdout.write(visible_json(text) + "\n")
