"""Push the T to a place that words name, seen through pixels: gym-pusht's table and physics.

IS: a gymnasium environment (10 Hz) on bodies, controller and drawing of gym_pusht's PushTEnv, no
display needed. The four places are marked nowhere but in words: "push the T to the left". Success:
the T's centre of mass within REACHED of it, however it is turned. IS NOT PushT's task, a pose that
is to be covered to 95 %; nor an expert or a learner (tools/train_policy).

All there is to an episode is one small array. pymunk keeps more inside (contact caches, pending
corrections), out of reach; so every tick builds its space anew: physics forgets its caches ten
times a second, and a state that is put back goes on as it did, to the bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import FlashrtError
from flashrt.worlds.gym import gymnasium

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
try:
    import pygame
    import pymunk
    from gym_pusht.envs.pusht import PushTEnv
    from gym_pusht.envs.pymunk_override import DrawOptions
except ImportError as error:
    raise FlashrtError(
        "flashrt.worlds.pusht needs gym-pusht: pip install 'flashrt[pusht]'"
    ) from error

Array = NDArray[np.float64]
Observation = dict[str, Any]

FPS = 10.0
SUBSTEPS = 10  # of physics in a tick
TICKS = 80  # of an episode, at most
SIZE = 512  # px of the table's side; all lengths are in px of the table
IMAGE = 96  # pixels of an image's side
REACHED = 30.0  # px
FRICTION = 1.0  # of T and pusher where they touch; PushT has none
PLACES = {
    "left": (140.0, 256.0),
    "right": (372.0, 256.0),
    "up": (256.0, 140.0),
    "down": (256.0, 372.0),
}
NAMES = tuple(PLACES)
INSTRUCTIONS = {
    "left": "push the T to the left",
    "right": "push the T to the right",
    "up": "push the T up",
    "down": "push the T down",
}
CLEARANCE = 100.0  # px between the centres of T and pusher at the start: they do not touch

# Columns of a state, float64. T_X and T_Y are of the T's centre of mass; PLACE indexes NAMES.
X, Y, VX, VY, T_X, T_Y, T_ANGLE, T_VX, T_VY, T_SPIN, PLACE, TICK = range(12)
STATE_DIM = 12


def initial_state(rng: np.random.Generator) -> Array:
    """The start of an episode: the T near the middle, the pusher clear of it, all at rest."""
    state = np.zeros(STATE_DIM)
    state[PLACE] = rng.integers(len(NAMES))
    state[[T_X, T_Y]] = rng.uniform(170.0, 342.0, 2)
    state[T_ANGLE] = rng.uniform(-np.pi, np.pi)
    while True:
        state[[X, Y]] = rng.uniform(40.0, SIZE - 40.0, 2)
        if np.hypot(state[X] - state[T_X], state[Y] - state[T_Y]) > CLEARANCE:
            break
    return state if distance(state) > 2 * REACHED else initial_state(rng)


def place(state: Array) -> Array:
    """Where the T is to go, [2]."""
    return np.array(PLACES[NAMES[int(state[PLACE])]], np.float64)


def distance(state: Array) -> float:
    """From the T's centre of mass to the place, px."""
    return float(np.hypot(*(state[[T_X, T_Y]] - place(state))))


def corners(state: Array) -> Array:
    """The corners of the T's two boxes on the table, [8, 2]."""
    cos, sin = np.cos(state[T_ANGLE]), np.sin(state[T_ANGLE])
    turn = np.array([[cos, sin], [-sin, cos]], np.float64)
    return np.asarray(state[[T_X, T_Y]] + _shape_of_t() @ turn, np.float64)


def advance(state: Array, action: Array) -> Array:
    """The state a tick later. `action` [2]: where the pusher's controller is to take it, px."""
    return foresee(state, lambda _: action, 1)[1]


def foresee(state: Array, act: Callable[[Array], Array], ticks: int) -> list[Array]:
    """The states of so many ticks, the first included, in which `act` decides: without the fresh
    start of each tick that `advance` makes, so good for a look ahead, and quick.
    """
    table, states = _table(state), [state]
    pusher, block = table.agent, table.block
    for _ in range(ticks):
        wanted = np.clip(np.asarray(act(states[-1]), np.float64), 0.0, SIZE).tolist()
        for _ in range(SUBSTEPS):
            (x, y), (vx, vy) = pusher.position, pusher.velocity
            pusher.velocity = (
                vx + (table.k_p * (wanted[0] - x) - table.k_v * vx) * table.dt,
                vy + (table.k_p * (wanted[1] - y) - table.k_v * vy) * table.dt,
            )
            table.space.step(table.dt)
        new = states[-1].copy()
        new[[X, Y]], new[[VX, VY]] = pusher.position, pusher.velocity
        new[[T_X, T_Y]] = block.local_to_world(block.center_of_gravity)
        new[[T_VX, T_VY]] = block.velocity
        new[T_ANGLE], new[T_SPIN] = block.angle, block.angular_velocity
        new[TICK] += 1
        states.append(new)
    return states


def picture(state: Array, side: int = IMAGE) -> NDArray[np.uint8]:
    """The table from above, uint8 [side, side, 3]: the T, the pusher, and the walls."""
    table = _table(state)
    screen = pygame.Surface((SIZE, SIZE), depth=24)
    screen.fill((255, 255, 255))
    table.space.debug_draw(DrawOptions(screen))
    if side != SIZE:
        screen = pygame.transform.smoothscale(screen, (side, side))
    return np.ascontiguousarray(pygame.surfarray.array3d(screen).transpose(1, 0, 2))


def observe(state: Array) -> Observation:
    """What the policy is shown: see PushT."""
    return {
        "observation.image": picture(state),
        "observation.state": state[[X, Y, VX, VY]].astype(np.float32),
        "task": INSTRUCTIONS[NAMES[int(state[PLACE])]],
    }


@functools.cache
def _shape_of_t() -> Array:
    """The corners of a T that is not turned, from its centre of mass, [8, 2]."""
    block, shapes = PushTEnv.add_tee(pymunk.Space(), (0, 0), 0)
    vertices = np.array([vertex for shape in shapes for vertex in shape.get_vertices()])
    return np.array(vertices - np.array(block.center_of_gravity), np.float64)


def _table(state: Array) -> Any:
    """A PushTEnv in a state, its space new."""
    table = PushTEnv(obs_type="state")
    table._setup()
    for shape in (*table.agent.shapes, *table.block.shapes):
        shape.friction = FRICTION
    table.agent.position = state[[X, Y]].tolist()
    table.agent.velocity = state[[VX, VY]].tolist()
    block = table.block
    block.angle = float(state[T_ANGLE])
    arm = block.center_of_gravity.rotated(block.angle)
    block.position = float(state[T_X]) - arm.x, float(state[T_Y]) - arm.y
    block.velocity = state[[T_VX, T_VY]].tolist()
    block.angular_velocity = float(state[T_SPIN])
    table.space.reindex_shapes_for_body(table.agent)
    table.space.reindex_shapes_for_body(block)
    return table


class PushT(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Observation: `observation.image` uint8 [96, 96, 3], `observation.state` float32 [4] (the
    pusher's position and velocity, px and px/s), `task`: the instruction. Action: float32 [2], px.

    Reward per tick: minus the T's distance to the place, in sides of the table. An episode
    terminates when the T is there, and is truncated after TICKS.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's way)

    def __init__(self) -> None:
        space = gymnasium.spaces
        far = np.full(4, np.finfo(np.float32).max, np.float32)
        self.observation_space = space.Dict(
            {
                "observation.image": space.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8),
                "observation.state": space.Box(-far, far),
                "task": space.Text(
                    max(map(len, INSTRUCTIONS.values())),
                    charset=frozenset("".join(INSTRUCTIONS.values())),
                ),
            }
        )
        self.action_space = space.Box(0.0, float(SIZE), (2,), np.float32)
        self.render_mode = "rgb_array"
        self._state: Array = initial_state(np.random.default_rng(0))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """A new episode, drawn from `seed` (or from what the last seed left)."""
        super().reset(seed=seed, options=options)
        self._state = initial_state(self.np_random)
        return observe(self._state), self._info()

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One tick of 100 ms."""
        self._state = advance(self._state, np.asarray(action, np.float64))
        info = self._info()
        is_late = bool(self._state[TICK] >= TICKS)
        reward = -float(info["distance"]) / SIZE
        return observe(self._state), reward, bool(info["is_success"]), is_late, info

    def instruct(self, name: str) -> Observation:
        """Another place, from now on; what is seen with it."""
        self._state = self._state.copy()
        self._state[PLACE] = NAMES.index(name)
        return observe(self._state)

    def get_state(self) -> Array:
        """A copy of all there is to the episode, [STATE_DIM]."""
        return self._state.copy()

    def set_state(self, state: Array) -> Observation:
        """Put a state in force; what is seen in it."""
        self._state = np.array(state, np.float64)
        return observe(self._state)

    def render(self) -> NDArray[np.uint8]:
        """The table, uint8 [512, 512, 3]."""
        return picture(self._state, SIZE)

    def _info(self) -> dict[str, Any]:
        gap = distance(self._state)
        return {"distance": gap, "is_success": gap <= REACHED}
