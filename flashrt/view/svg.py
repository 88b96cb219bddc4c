"""A minimal SVG drawing: rectangles, lines, text; legible on light and on dark pages.

IS: elements as strings, one style sheet; text made visible, whatever it holds. IS NOT: layout.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from flashrt.base.errors import FlashrtError
from flashrt.base.files import replace_file
from flashrt.base.messages import visible

FONT_NARROW = 6.2  # pixels per character of the small text, on the generous side
_STYLE = """
text { font: 11px ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.page { fill: #ffffff; } .title { font-size: 17px; font-weight: 600; }
.head { font-size: 12.5px; font-weight: 600; } .soft { fill: #656d76; } .on { fill: #10151c; }
.strong { font-weight: 600; } .frame { fill: none; stroke: #d0d7de; }
.grid { stroke: #d8dee4; } .edge { fill: none; stroke: #8c959f; stroke-width: 1.6; }
.fixed { fill: #e3ab52; } .rows { fill: #74acdf; } .io { fill: #86c292; }
.scratch { fill: #b7a0dc; } .pool { fill: #79c5bf; } .lane { fill: #f1a1a1; }
.cell { stroke: #ffffff; stroke-width: 1; }
.shared { fill: none; stroke: #74acdf; stroke-dasharray: 4 3; }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 10px; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .page { fill: #0d1117; } .soft { fill: #9198a1; } .on { fill: #10151c; }
  .frame { stroke: #3d444d; } .grid { stroke: #30363d; } .edge { stroke: #7d8590; }
  .cell { stroke: #0d1117; }
}
"""


class Drawing:
    """An SVG of a given width; `height` is what `save` or `text` is told."""

    def __init__(self, width: float) -> None:
        self.width = width
        self._elements: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, cls: str, hint: str = "",
        radius: float = 0,
    ) -> None:  # fmt: skip
        """A rectangle; `hint` is what a browser shows under the pointer."""
        title = f"<title>{escape(visible(hint))}</title>" if hint else ""
        rounded = f' rx="{radius:g}"' if radius else ""
        self._elements.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}" '
            f"class={quoteattr(cls)}{rounded}>{title}</rect>"
        )

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        """Text with its baseline at y."""
        self._elements.append(
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" class={quoteattr(cls)}>'
            f"{escape(visible(text))}</text>"
        )

    def text_if_it_fits(self, x: float, y: float, width: float, text: str, cls: str = "on") -> None:
        """Text centred over [x, x + width), left out when it is wider."""
        if len(text) * FONT_NARROW + 6 <= width:
            self.text(x + width / 2, y, text, cls, "middle")

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str = "grid") -> None:
        """A straight line."""
        self._elements.append(
            f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" '
            f"class={quoteattr(cls)}/>"
        )

    def curve(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """An S-shaped edge from left to right."""
        middle = (x1 + x2) / 2
        self._elements.append(
            f'<path d="M{x1:.2f},{y1:.2f} C{middle:.2f},{y1:.2f} {middle:.2f},{y2:.2f} '
            f'{x2:.2f},{y2:.2f}" class="edge"/>'
        )

    def svg(self, height: float) -> str:
        """The document."""
        size = f'width="{self.width:g}" height="{height:g}" viewBox="0 0 {self.width:g} {height:g}"'
        page = f'<rect width="{self.width:g}" height="{height:g}" class="page"/>'
        body = "\n".join(self._elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{_STYLE}</style>\n'
            f"{page}\n{body}\n</svg>\n"
        )


def save_svg(svg: str, path: Path) -> Path:
    """Write a document, folder and all. Raises FlashrtError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, svg, is_durable=False)
    except OSError as error:
        raise FlashrtError(f"cannot write {path}: {error}; give another path") from error
    return path
