"""Two doors: a robot must remember where to go, and choose how to get there.

IS: a gymnasium environment (numpy only, 25 Hz, exact to repeat, its state one small array) and its
dynamics over batches of states. A point robot with a motor lag starts below a wall with two doors.
A goal beyond the wall is shown for the first five ticks, then hidden: only memory can find it.
Either door will do, so a good policy has two modes; one door may be jammed, which the robot cannot
see but a simulation of its future can. The goal may move on the way. IS NOT a learner or an expert
(tools/train_policy). It exists because the usual control tasks need neither memory nor a choice.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.worlds.gym import gymnasium

Array = NDArray[np.float64]

FPS = 25.0
TICKS = 75
CUE_TICKS = 5
TOP_SPEED = 1.5  # m/s, of each axis
MOTOR_LAG = 0.4  # share of the commanded change of velocity that happens in one tick
DOORS = 0.5  # doors at x = -0.5 and x = +0.5
HALF_DOOR = 0.2
HALF_WALL = 0.05  # the wall is |y| < 0.05
REACHED = 0.1  # m: the goal counts as reached

# Columns of a state, float64. JAMMED is -1 or +1 for a door that does not open, else 0.
X, Y, VX, VY, GOAL_X, GOAL_Y, CUE, TICK, JAMMED = range(9)
STATE_DIM = 9
OBSERVATION_DIM = 5  # x, y, cue visible, cue x, cue y


def initial_states(rng: np.random.Generator, count: int, *, jammed: bool = False) -> Array:
    """States at the start of `count` episodes, [count, STATE_DIM]; `jammed`: with one door shut."""
    state = np.zeros((count, STATE_DIM))
    state[:, X] = rng.uniform(-0.1, 0.1, count)
    state[:, Y] = rng.uniform(-0.9, -0.7, count)
    state[:, [GOAL_X, GOAL_Y]] = random_goals(rng, count)
    state[:, CUE] = CUE_TICKS
    if jammed:
        state[:, JAMMED] = rng.choice((-1.0, 1.0), count)
    return state


def random_goals(rng: np.random.Generator, count: int) -> Array:
    """Goals beyond the wall, [count, 2]."""
    return rng.uniform((-0.8, 0.3), (0.8, 0.9), (count, 2))


def observe(state: Array) -> NDArray[np.float32]:
    """What the robot sees of states [..., STATE_DIM]: no velocity, and the goal only while cued."""
    seen = (state[..., CUE] > 0).astype(np.float64)
    columns = (
        state[..., X],
        state[..., Y],
        seen,
        seen * state[..., GOAL_X],
        seen * state[..., GOAL_Y],
    )
    return np.stack(columns, axis=-1).astype(np.float32)


def advance(state: Array, command: Array) -> Array:
    """The states one tick later. `command` [..., 2]: wanted velocity, m/s, clipped to TOP_SPEED."""
    new = state.copy()
    wanted = np.clip(command, -TOP_SPEED, TOP_SPEED)
    velocity = state[..., VX : VY + 1] + MOTOR_LAG * (wanted - state[..., VX : VY + 1])
    x = state[..., X] + velocity[..., 0] / FPS
    y = state[..., Y] + velocity[..., 1] / FPS
    inside = np.abs(state[..., Y]) < HALF_WALL
    hits_post = inside & (np.abs(np.abs(x) - DOORS) > HALF_DOOR)
    x = np.where(hits_post, state[..., X], x)
    is_open = (np.abs(np.abs(x) - DOORS) <= HALF_DOOR) & (np.sign(x) != state[..., JAMMED])
    hits_wall = ~inside & (np.abs(y) < HALF_WALL) & ~is_open
    y = np.where(hits_wall, state[..., Y], y)
    out_x, out_y = np.abs(x) > 1.0, np.abs(y) > 1.0
    new[..., X], new[..., Y] = np.clip(x, -1.0, 1.0), np.clip(y, -1.0, 1.0)
    new[..., VX] = np.where(hits_post | out_x, 0.0, velocity[..., 0])
    new[..., VY] = np.where(hits_wall | out_y, 0.0, velocity[..., 1])
    new[..., CUE] = np.maximum(state[..., CUE] - 1, 0)
    new[..., TICK] += 1
    return new


def distance(state: Array) -> Array:
    """Distance to the goal, m."""
    return np.hypot(state[..., X] - state[..., GOAL_X], state[..., Y] - state[..., GOAL_Y])


class TwoDoors(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Reward per tick: minus the distance to the goal, m. `info`: `distance`, and `is_success`.

    `state` is all there is to an episode: save it, set it, and the future is the same to the bit.
    """

    metadata = {"render_modes": [], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own convention)

    def __init__(self, *, jammed: bool = False) -> None:
        low = np.array([-1, -1, 0, -1, -1], np.float32)
        self.observation_space = gymnasium.spaces.Box(low, np.ones(5, np.float32))
        self.action_space = gymnasium.spaces.Box(-TOP_SPEED, TOP_SPEED, (2,), np.float32)
        self._jammed = jammed
        self._state: Array = initial_states(np.random.default_rng(0), 1)[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """A new episode, drawn from `seed` (or from what the last seed left)."""
        super().reset(seed=seed, options=options)
        self._state = initial_states(self.np_random, 1, jammed=self._jammed)[0]
        return observe(self._state), self._info()

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One tick of 40 ms; episodes never terminate, they are truncated after TICKS."""
        self._state = advance(self._state, np.asarray(action, np.float64))
        is_over = bool(self._state[TICK] >= TICKS)
        return observe(self._state), -float(distance(self._state)), False, is_over, self._info()

    def move_goal(self, x: float, y: float) -> NDArray[np.float32]:
        """Show another goal for CUE_TICKS; what the robot sees now."""
        self._state = self._state.copy()
        self._state[[GOAL_X, GOAL_Y, CUE]] = x, y, CUE_TICKS
        return observe(self._state)

    def get_state(self) -> Array:
        """The whole state of the episode; later steps do not write to it."""
        return self._state

    def set_state(self, state: Array) -> None:
        """Go on from a state that `get_state` returned."""
        self._state = np.array(state, np.float64)

    def _info(self) -> dict[str, Any]:
        gap = float(distance(self._state))
        return {"distance": gap, "is_success": gap < REACHED}
