"""What a policy is trained on: dynamics over batches of states, and scripted experts.

IS: for each environment of flashrt.worlds.robots the same dynamics as a pure function of float64
states [count, D], an expert that sees the whole state, and what a policy may see of it. Branching
a thousand futures is a thousand rows. IS NOT the environment itself: `check` compares the two,
tick by tick. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.worlds import two_doors
from flashrt.worlds.robots import Environment, make

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a task and of the policy that is trained for it."""

    name: str
    observation_dim: int
    low: tuple[float, ...]  # of the actions
    high: tuple[float, ...]
    ticks: int  # of a training episode; the environment's may be longer
    episode_ticks: int  # of the environment, at most
    forget_at: int  # a tick at which the memory matters, for ablations
    fps: float
    privileged_dim: int
    width: int  # of encoder and memory
    head_dim: int
    head_blocks: int
    chunk_size: int
    n_action_steps: int  # executed of a chunk in training
    n_deployed_steps: int  # executed of a chunk in use: fewer see more
    num_inference_steps: int
    backprop_ticks: int  # gradients flow back through so many ticks of memory
    steps: int  # of the optimiser

    @property
    def action_dim(self) -> int:
        """Number of action components."""
        return len(self.low)


class Task(Protocol):
    """All functions are pure and take states [count, D]; actions are in the environment's units."""

    shape: Shape

    def initial(self, rng: np.random.Generator, count: int) -> Array:
        """States at the start of episodes."""
        ...

    def observe(self, state: Array) -> NDArray[np.float32]:
        """What the policy sees, [count, O]."""
        ...

    def advance(self, state: Array, action: Array) -> Array:
        """States one tick later."""
        ...

    def reward(self, state: Array, action: Array, after: Array) -> Array:
        """Reward of a tick, [count]."""
        ...

    def is_success(self, state: Array) -> NDArray[np.bool_]:
        """Whether episodes that end in these states count as solved."""
        ...

    def intend(self, rng: np.random.Generator, state: Array) -> Array:
        """The expert's choice among equally good ways, [count]; kept while it acts."""
        ...

    def expert(self, state: Array, intent: Array) -> Array:
        """The expert's actions, [count, A]."""
        ...

    def privileged(self, state: Array) -> Array:
        """What memory should know: hidden from the policy, a training signal for its memory."""
        ...

    def disturb(self, rng: np.random.Generator, state: Array) -> Array:
        """Events from outside: in two doors the goal may move."""
        ...


class Pendulum:
    """Pendulum-v1 without the velocity. State: angle (0 is upright), velocity."""

    shape = Shape(
        name="pendulum", observation_dim=2, low=(-2.0,), high=(2.0,),
        ticks=100, episode_ticks=200, forget_at=20, fps=20.0,
        privileged_dim=1, width=64, head_dim=128, head_blocks=2,
        chunk_size=8, n_action_steps=4, n_deployed_steps=2, num_inference_steps=5,
        backprop_ticks=50, steps=2000,
    )  # fmt: skip

    def initial(self, rng: np.random.Generator, count: int) -> Array:
        """As gymnasium draws them."""
        return rng.uniform((-np.pi, -1.0), (np.pi, 1.0), (count, 2))

    def observe(self, state: Array) -> NDArray[np.float32]:
        """cos, sin."""
        return np.stack((np.cos(state[:, 0]), np.sin(state[:, 0])), axis=1).astype(np.float32)

    def advance(self, state: Array, action: Array) -> Array:
        """gymnasium's semi-implicit Euler step of 50 ms."""
        torque = np.clip(action[:, 0], -2.0, 2.0)
        velocity = state[:, 1] + (15.0 * np.sin(state[:, 0]) + 3.0 * torque) * 0.05
        velocity = np.clip(velocity, -8.0, 8.0)
        return np.stack((state[:, 0] + velocity * 0.05, velocity), axis=1)

    def reward(self, state: Array, action: Array, after: Array) -> Array:
        """Minus the cost of the state before the action."""
        torque = np.clip(action[:, 0], -2.0, 2.0)
        return -(_wrap(state[:, 0]) ** 2 + 0.1 * state[:, 1] ** 2 + 0.001 * torque**2)

    def is_success(self, state: Array) -> NDArray[np.bool_]:
        """Upright and at rest."""
        return (np.abs(_wrap(state[:, 0])) < 0.1) & (np.abs(state[:, 1]) < 0.5)

    def intend(self, rng: np.random.Generator, state: Array) -> Array:
        """One way only."""
        return np.zeros(len(state))

    def expert(self, state: Array, intent: Array) -> Array:
        """Pump energy until upright is in reach, then a linear regulator."""
        angle, velocity = _wrap(state[:, 0]), state[:, 1]
        energy = velocity**2 / 6.0 + 5.0 * (np.cos(angle) - 1.0)  # 0: just enough to stand
        swing = -6.0 * energy * np.where(velocity >= 0, 1.0, -1.0) * np.minimum(np.abs(velocity), 1)
        # A pendulum that hangs still has no direction to pump in: push it.
        swing = np.where(np.abs(velocity) < 0.05, 2.0 * np.sign(np.sin(angle) + 1e-9), swing)
        regulate = -(9.0 * angle + 2.4 * velocity)
        near = (np.abs(angle) < 0.6) & (np.abs(regulate) < 5.0)
        return np.clip(np.where(near, regulate, swing), -2.0, 2.0)[:, None]

    def privileged(self, state: Array) -> Array:
        """Velocity, scaled to about 1."""
        return state[:, 1:] / 4.0

    def disturb(self, rng: np.random.Generator, state: Array) -> Array:
        """Nothing."""
        return state


class MountainCar:
    """MountainCarContinuous-v0 without the velocity. State: position, velocity, arrived."""

    shape = Shape(
        name="mountain_car", observation_dim=1, low=(-1.0,), high=(1.0,),
        ticks=120, episode_ticks=999, forget_at=40, fps=30.0,
        privileged_dim=1, width=64, head_dim=128, head_blocks=2,
        chunk_size=8, n_action_steps=4, n_deployed_steps=4, num_inference_steps=5,
        backprop_ticks=40, steps=1000,
    )  # fmt: skip

    def initial(self, rng: np.random.Generator, count: int) -> Array:
        """As gymnasium draws them."""
        state = np.zeros((count, 3))
        state[:, 0] = rng.uniform(-0.6, -0.4, count)
        return state

    def observe(self, state: Array) -> NDArray[np.float32]:
        """The position."""
        return state[:, :1].astype(np.float32)

    def advance(self, state: Array, action: Array) -> Array:
        """gymnasium's step; a car that arrived stays where it is."""
        force = np.clip(action[:, 0], -1.0, 1.0)
        position, velocity, arrived = state.T
        velocity = velocity + force * 0.0015 - 0.0025 * np.cos(3 * position)
        velocity = np.clip(velocity, -0.07, 0.07)
        position = np.clip(position + velocity, -1.2, 0.6)
        velocity = np.where((position == -1.2) & (velocity < 0), 0.0, velocity)
        new = np.stack((position, velocity, (position >= 0.45) & (velocity >= 0)), axis=1)
        return np.where(arrived[:, None] > 0, state, new)

    def reward(self, state: Array, action: Array, after: Array) -> Array:
        """100 on arrival, minus a tenth of the squared action; nothing afterwards."""
        reward = 100.0 * (after[:, 2] > 0) - 0.1 * action[:, 0] ** 2
        return np.where(state[:, 2] > 0, 0.0, reward)

    def is_success(self, state: Array) -> NDArray[np.bool_]:
        """On the hill."""
        return state[:, 2] > 0

    def intend(self, rng: np.random.Generator, state: Array) -> Array:
        """One way only."""
        return np.zeros(len(state))

    def expert(self, state: Array, intent: Array) -> Array:
        """Push the way it rolls: energy only ever grows."""
        push = np.clip((state[:, 1] + 0.0005) * 2000.0, -1.0, 1.0)
        return np.where(state[:, 2] > 0, 0.0, push)[:, None]

    def privileged(self, state: Array) -> Array:
        """Velocity, scaled to about 1."""
        return state[:, 1:2] / 0.03

    def disturb(self, rng: np.random.Generator, state: Array) -> Array:
        """Nothing."""
        return state


class TwoDoors:
    """flashrt.worlds.two_doors; the expert takes the door it drifts to, or either."""

    shape = Shape(
        name="two_doors", observation_dim=5, low=(-1.5, -1.5), high=(1.5, 1.5),
        ticks=75, episode_ticks=75, forget_at=15, fps=25.0,
        privileged_dim=4, width=64, head_dim=128, head_blocks=2,
        chunk_size=16, n_action_steps=8, n_deployed_steps=8, num_inference_steps=8,
        backprop_ticks=75, steps=2000,
    )  # fmt: skip

    def initial(self, rng: np.random.Generator, count: int) -> Array:
        """As the environment draws them."""
        return two_doors.initial_states(rng, count)

    def observe(self, state: Array) -> NDArray[np.float32]:
        """Position, and the goal while it is cued."""
        return two_doors.observe(state)

    def advance(self, state: Array, action: Array) -> Array:
        """The environment's own function."""
        return two_doors.advance(state, action)

    def reward(self, state: Array, action: Array, after: Array) -> Array:
        """Minus the distance."""
        return -two_doors.distance(after)

    def is_success(self, state: Array) -> NDArray[np.bool_]:
        """At the goal."""
        return two_doors.distance(state) < two_doors.REACHED

    def intend(self, rng: np.random.Generator, state: Array) -> Array:
        """A door, -1 or +1: by chance in the middle, the nearer one off it."""
        lean = state[:, two_doors.X] + 0.1 * state[:, two_doors.VX]
        chance = 1.0 / (1.0 + np.exp(-lean / 0.04))
        return np.where(rng.random(len(state)) < chance, 1.0, -1.0)

    def expert(self, state: Array, intent: Array) -> Array:
        """Through the door, then to the goal, at 1.5 m/s, slowing down before it."""
        x, y = state[:, two_doors.X], state[:, two_doors.Y]
        in_passage = np.abs(y) <= 0.12
        door = two_doors.DOORS * np.where(in_passage, np.sign(x), intent)
        aligned = np.clip((0.2 - np.abs(x - door)) / 0.15, 0.0, 1.0)
        goal_x, goal_y = state[:, two_doors.GOAL_X], state[:, two_doors.GOAL_Y]
        beyond = y > 0.12
        target_x = np.where(beyond, goal_x, door)
        target_y = np.where(beyond, goal_y, -0.15 + 0.5 * aligned)
        command = 5.0 * np.stack((target_x - x, target_y - y), axis=1)
        speed = np.linalg.norm(command, axis=1, keepdims=True)
        return command * np.minimum(1.0, two_doors.TOP_SPEED / np.maximum(speed, 1e-9))

    def privileged(self, state: Array) -> Array:
        """Velocity and goal."""
        columns = [two_doors.VX, two_doors.VY, two_doors.GOAL_X, two_doors.GOAL_Y]
        return state[:, columns]

    def disturb(self, rng: np.random.Generator, state: Array) -> Array:
        """Once in 100 ticks the goal moves, and is shown again."""
        moves = rng.random(len(state)) < 0.01
        goals = two_doors.random_goals(rng, len(state))
        new = state.copy()
        columns = [two_doors.GOAL_X, two_doors.GOAL_Y]
        new[:, columns] = np.where(moves[:, None], goals, state[:, columns])
        new[:, two_doors.CUE] = np.where(moves, two_doors.CUE_TICKS, state[:, two_doors.CUE])
        return new


TASKS: dict[str, Task] = {task.shape.name: task for task in (TwoDoors(), Pendulum(), MountainCar())}


def check(task: Task, seed: int = 0) -> None:
    """Raise AssertionError where the dynamics here and the environment's differ in an episode."""
    rng = np.random.default_rng(seed)
    environment = make(task.shape.name)
    seen, _ = environment.reset(seed=seed)
    state = state_of(task, environment)
    for tick in range(task.shape.ticks - 1):
        action = rng.uniform(task.shape.low, task.shape.high)[None]
        after = task.advance(state, action)
        reward = task.reward(state, action, after)[0]
        seen, truth, terminated, _, _ = environment.step(action[0])
        where = f"{task.shape.name}, tick {tick}"
        assert np.allclose(task.observe(after)[0], seen, atol=1e-4), where
        assert abs(reward - float(truth)) < 1e-3, where
        if terminated:
            break
        state = after


def state_of(task: Task, environment: Environment) -> Array:
    """The state [1, D] that an environment is in."""
    inner = environment.unwrapped
    if task.shape.name == "two_doors":
        return np.array(inner.get_state())[None]
    state = np.zeros((1, 3 if task.shape.name == "mountain_car" else 2))
    state[0, :2] = inner.state
    return state


def _wrap(angle: Array) -> Array:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def expert_returns(task: Task, state: Array, ticks: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return and success of the expert over undisturbed episodes that begin in `state`."""
    intent, total = task.intend(np.random.default_rng(0), state), np.zeros(len(state))
    for _ in range(ticks):
        action = task.expert(state, intent)
        after = task.advance(state, action)
        total += task.reward(state, action, after)
        state = after
    return total, task.is_success(state)
