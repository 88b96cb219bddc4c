"""A figure by matplotlib, which is optional: made and written, with errors that name the way out.

IS: the one place that imports matplotlib. IS NOT: what is drawn; see the plots of this folder.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.base.files import replacing

SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def has_matplotlib() -> bool:
    """Whether a figure can be made."""
    return importlib.util.find_spec("matplotlib") is not None


def check_figure(path: Path, *, svg_is_ours: bool = False) -> None:
    """Raises FlashrtError unless a figure can be drawn and `path` says in which format.

    `svg_is_ours`: an .svg is drawn without matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise FlashrtError(f"cannot draw {path}: give a path that ends in .png or .svg")
    if not has_matplotlib() and not (svg_is_ours and path.suffix == ".svg"):
        without = "a .svg does not" if svg_is_ours else "the tables and --json do not"
        raise FlashrtError(f"a plot needs matplotlib: pip install 'flashrt[plot]'; {without}")


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises FlashrtError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlashrtError("a plot needs matplotlib: pip install 'flashrt[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Write it. Raises FlashrtError when that cannot be done."""
    try:
        with replacing(path, is_durable=False) as temporary:
            figure.savefig(temporary, dpi=130, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise FlashrtError(f"cannot write {path}: {error}; give a .png or .svg path") from error
    return path
