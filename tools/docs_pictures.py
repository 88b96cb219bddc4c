"""Draws the pictures of the docs from a real run of the bundled model.

IS: docs/pictures/*.svg: the arena, a session tree, who holds which rows, ways to one state. IS NOT:
drawing (flashrt.view). Run it when the model or a drawing changes.

    python tools/docs_pictures.py [--out docs/pictures]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flashrt
from flashrt.models.model import tapes_of
from flashrt.session.chat import Chat, ChatPoint, open_chat
from flashrt.view.arena_map import arena_map, widest
from flashrt.view.batching_map import Way, batching_map
from flashrt.view.lineage_map import lineage_map
from flashrt.view.session_tree import session_tree
from flashrt.view.svg import save_svg
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.building import Building, parse_call
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

POSITIONS, LANES = 2048, 2


def draw(out: Path) -> list[Path]:
    """All pictures; returns their paths."""
    engine = flashrt.load(bundled_checkpoint(), "cpu", POSITIONS, LANES, pool_bytes=16 << 20)
    tapes = tapes_of(engine.model, len(engine.lanes))
    title = f"The arena of the bundled model: {LANES} lanes of {POSITIONS:,} positions"
    pictures = {"arena": arena_map(engine.arena.plan, widest(tapes), title)}
    with open_chat(engine) as chat:
        points = converse(chat, facts=100, hints=12)
        capsules = [point.capsule for point in points]
        pictures["session-tree"] = session_tree(capsules, {"the agent": capsules[-1]})
        found = ways(engine, points[1])
        pictures["exactness"] = batching_map(found, "Five ways to one state, measured")
    with open_chat(engine) as chat:  # a shorter prompt, so that what follows can be seen
        capsules = [point.capsule for point in converse(chat, facts=6, hints=4)]
        pictures["lineage"] = lineage_map(capsules)
    return [save_svg(svg, out / f"{name}.svg") for name, svg in pictures.items()]


def converse(chat: Chat, facts: int, hints: int) -> list[ChatPoint]:
    """An agent with facts and hints: a question, then an errand whose first call fails."""
    world, building = Inventory(HELD_OUT, facts, facts // 5), Building(HELD_OUT + 4, hints)
    chat.add("system", f"{world.prompt()} {building.prompt()}")
    prompt = chat.snapshot("prompt")
    chat.add("user", world.question(world.things[facts // 2]))
    chat.reply(24)
    asked = chat.snapshot("a question")
    chat.restore(prompt)
    chat.add("user", building.request(building.things[0]))
    before = chat.snapshot("before a call")
    chat.reply(24)
    chat.add("tool", "error : the tool did not answer .")
    failed = chat.snapshot("the call failed")
    chat.restore(before)
    for _ in range(8):
        said = chat.reply(24)
        if not parse_call(said):
            break
        chat.add("tool", building.call(said))
    return [prompt, asked, before, failed, chat.snapshot("called again")]


def ways(engine: flashrt.Engine, end: ChatPoint) -> list[Way]:
    """One state by five batchings; the last one begins at a capsule."""
    tokens = end.capsule.tokens
    last, parent = len(tokens), end.capsule.parent
    assert parent is not None, "the question follows the prompt"
    plans = {
        "one prefill": [last],
        "in pieces of 100": [*range(100, last, 100), last],
        "odd pieces": [7, 300, 301, 640, last],
        "the end by tokens": [*range(last - 40, last + 1)],
    }
    found = []
    for name, cuts in plans.items():
        with engine.session() as session:
            for cut in cuts:
                session.prefill(tokens[session.position : cut])
            found.append(Way(name, cuts, session.digest()))
    with engine.session() as session:
        session.restore(parent)
        session.prefill(tokens[parent.position :])
        cuts = [parent.position, last]
        found.append(Way("restore, go on", cuts, session.digest(), [True, False]))
    return found


def main() -> None:
    """Parse arguments, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder")
    for path in draw(parser.parse_args().out):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
