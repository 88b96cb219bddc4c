"""Draws docs/pictures/pusht.gif: the bundled robot that sees and reads, on gym-pusht's table.

IS: one run of the policy: an episode, the same moment restored and other words, then forks that
look ahead and the best of them. IS NOT: a figure of how often it succeeds (evaluate_pusht). Needs
the `pusht` and `vision` extras. Run it when the policy changes.

    python tools/pusht_animation.py [POLICY] [--out docs/pictures/pusht.gif]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flashrt
from flashrt.robot import Moment, Rollout
from flashrt.worlds import pusht
from flashrt.worlds.pusht import FPS, INSTRUCTIONS, Array, PushT

SIDE, STRIP = 208, 36  # pixels of the table and of the words below it
FORKS = 4
COLOURS = ("#d95f02", "#7570b3", "#e7298a", "#66a61e")
HOLD = 8  # frames that a still is shown
LAST = 5  # frames that an end is shown


@dataclass(slots=True)
class Film:
    """Frames of a tick each."""

    frames: list[Image.Image] = field(default_factory=list)

    def show(
        self, state: Array, words: str, note: str, trails: dict[str, list[Array]], times: int = 1
    ) -> None:
        """A frame: the table, ways of the T by colour, and two lines below."""
        frame = Image.new("RGB", (SIDE, SIDE + STRIP), "white")
        frame.paste(Image.fromarray(pusht.picture(state, SIDE)), (0, 0))
        draw, scale = ImageDraw.Draw(frame), SIDE / pusht.SIZE
        x, y = pusht.place(state) * scale
        r = pusht.REACHED * scale
        draw.ellipse((x - r, y - r, x + r, y + r), outline="#66a61e")  # for the reader alone
        for colour, way in trails.items():
            points = [(s[pusht.T_X] * scale, s[pusht.T_Y] * scale) for s in way]
            if len(points) > 1:
                draw.line(points, fill=colour, width=2)
        draw.text((5, SIDE + 3), words, fill="black", font=ImageFont.load_default(13))
        draw.text((5, SIDE + 20), note, fill="#666666", font=ImageFont.load_default(11))
        self.frames += [frame] * times

    def save(self, path: Path) -> None:
        """One palette for all, so that what stands still costs nothing."""
        whole = Image.new("RGB", (SIDE, (SIDE + STRIP) * 3))
        for i in range(3):
            frame = self.frames[i * (len(self.frames) - 1) // 2]
            whole.paste(frame, (0, i * (SIDE + STRIP)))
        palette = whole.quantize(32)
        frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in self.frames]
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=round(1000 / FPS), loop=0
        )


def state_of(robot: Rollout) -> Array:
    """Of its table."""
    assert isinstance(robot.environment, PushT)
    return robot.environment.get_state()


def go_on(robot: Rollout) -> list[Array]:
    """The rest of an episode."""
    states = [state_of(robot)]
    while not robot.is_over:
        robot.step()
        states.append(state_of(robot))
    return states


def told(robot: Rollout, moment: Moment, name: str) -> list[Array]:
    """Other words at a moment, and what comes of them."""
    robot.restore(moment)
    world = robot.environment
    assert isinstance(world, PushT)
    observation, is_over = world.instruct(name), False
    robot.loop.interrupt()
    states = [world.get_state()]
    while not is_over:
        observation, _, is_there, is_late, _ = world.step(robot.loop.tick(observation))
        states.append(world.get_state())
        is_over = is_there or is_late
    return states


def draw(policy: str, seed: int, barge_at: int, words: str, path: Path) -> None:
    """The three acts."""
    engine = flashrt.load_policy(policy, device="cpu", lanes=1 + FORKS, pool_bytes=64 << 20)
    robot, film = Rollout(PushT, flashrt.ControlLoop(engine, FPS)), Film()
    robot.reset(seed)
    start = robot.snapshot()
    task = INSTRUCTIONS[pusht.NAMES[int(state_of(robot)[pusht.PLACE])]]
    first = go_on(robot)
    assert pusht.distance(first[-1]) <= pusht.REACHED
    for tick, state in enumerate(first):
        film.show(state, task, f"tick {tick}", {})
    film.show(first[-1], task, f"there after {len(first) - 1} ticks", {}, LAST)

    robot.restore(start)
    for _ in range(barge_at):
        robot.step()
    middle = robot.snapshot()
    film.show(state_of(robot), "restore", f"policy and table, tick {barge_at}", {}, HOLD)
    second = told(robot, middle, words)
    for tick, state in enumerate(second, barge_at):
        film.show(state, INSTRUCTIONS[words], f"told at tick {barge_at}; tick {tick}", {})
    assert pusht.distance(second[-1]) <= pusht.REACHED
    film.show(
        second[-1], INSTRUCTIONS[words], f"there at tick {barge_at + len(second) - 1}", {}, LAST
    )

    robot.restore(start)
    futures = robot.fork(FORKS, seeds=range(FORKS))
    ways = [go_on(future) for future in futures]
    trails = dict(zip(COLOURS, ways, strict=True))
    film.show(state_of(robot), "look ahead", f"{FORKS} forks of policy and table", trails, HOLD)
    best = int(np.argmin([len(way) for way in ways]))
    robot.loop.set_seed(best)
    third = go_on(robot)
    assert [s.tobytes() for s in third] == [s.tobytes() for s in ways[best]]
    kept = {COLOURS[best]: ways[best]}
    for tick, state in enumerate(third):
        film.show(state, task, f"the best of them comes true; tick {tick}", kept)
    film.show(third[-1], task, f"there after {len(third) - 1} ticks", kept, LAST)
    film.save(path)


def main() -> None:
    """Parse arguments, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("policy", nargs="?", default="pusht")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--barge-at", type=int, default=8)
    parser.add_argument("--words", default="right", choices=pusht.NAMES)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/pusht.gif"))
    options = parser.parse_args()
    draw(options.policy, options.seed, options.barge_at, options.words, options.out)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
