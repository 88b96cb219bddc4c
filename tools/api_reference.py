"""Makes the API reference from docstrings, as a folder of static pages.

IS: the choice of modules, and pdoc. IS NOT: prose; that is docs/*.md.

    python tools/api_reference.py      # -> out/api; needs pdoc: pip install -e '.[docs]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pdoc
import pdoc.render

MODULES = (  # what a user calls, then what a writer of a model, a kernel or a backend meets
    "flashrt",  # and flashrt.load, which pdoc finds by the name of the function in it
    "flashrt.session.session", "flashrt.session.chat",
    "flashrt.store.store", "flashrt.store.opening", "flashrt.session.recording",
    "flashrt.capsule.eviction", "flashrt.store.upkeep",
    "flashrt.robot.loop", "flashrt.robot.rollout", "flashrt.robot.recording",
    "flashrt.engine.actions", "flashrt.text.tokenizer", "flashrt.text.template", "flashrt.worlds",
    "flashrt.engine.engine", "flashrt.engine.tokens", "flashrt.capsule.table",
    "flashrt.core.region", "flashrt.core.op", "flashrt.core.tape", "flashrt.core.planner",
    "flashrt.core.backend", "flashrt.core.digest", "flashrt.models.model", "flashrt.models.blocks",
    "flashrt.ops.table", "flashrt.ops.sample", "flashrt.base.errors", "flashrt.base.flags",
)  # fmt: skip


def build(out: Path) -> None:
    """Write one page per module, an index and a search index to `out`."""
    pdoc.render.configure(docformat="markdown", show_source=True, footer_text="flashrt")
    pdoc.pdoc(*MODULES, output_directory=out)


def main() -> None:
    """Parse arguments, build."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/api"), help="default: out/api")
    options = parser.parse_args()
    build(options.out)
    print(f"{len(MODULES)} modules: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
