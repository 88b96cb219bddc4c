"""What a training run shows: a bar with the curriculum, or a line now and then in a log.

IS: printing. IS NOT: a record that anything depends on.
"""

from __future__ import annotations

from types import TracebackType

from curriculum import LENGTHS, Curriculum
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY = 20  # steps, where the output is no terminal


class Progress:
    """Of one process; `is_shown` is false for all but the first."""

    def __init__(self, is_shown: bool, first: int, last: int) -> None:
        self._is_shown = is_shown
        self._console = Console(soft_wrap=True)
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        is_live = is_shown and self._console.is_terminal
        self._bars = Bars(*columns, console=self._console, disable=not is_live)
        self._task = self._bars.add_task("", total=last, completed=first)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(
        self, step: int, tokens: int, speed: float, wiped: float, curriculum: Curriculum
    ) -> None:
        """speed: tokens per second; wiped: share of right words where states were wiped."""
        if not self._is_shown:
            return
        tasks = "  ".join(
            f"{task} {LENGTHS[curriculum.level[task]]} {right:.2f}"
            for task, right in curriculum.right.items()
        )
        text = f"{tokens / 1e6:.2f}M tokens  {speed:.0f}/s  wiped {wiped:.2f}  {tasks}"
        self._bars.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and step % LINE_EVERY == 0:
            print(f"{step:6d}  {text}", flush=True)
