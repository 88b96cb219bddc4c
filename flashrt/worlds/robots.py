"""The environments that the bundled policies were trained for, by name.

IS: gymnasium's own Pendulum-v1 and MountainCarContinuous-v0 with the velocity hidden, and two
doors, whose goal is shown only at the start. Two doors and the pendulum need a memory; the car gets
by with its previous action. IS NOT the pairing of an environment with a policy's capsules
(flashrt/robot/rollout.py). Needs the `gym` extra; gymnasium's own environments also need what they
ask for.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.worlds.gym import gymnasium
from flashrt.worlds.two_doors import TwoDoors

Environment = gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]
NAMES = ("two_doors", "pendulum", "mountain_car")


class HiddenVelocity(
    gymnasium.ObservationWrapper[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
):
    """Only the first `seen` numbers of each observation: the positions, without the velocities."""

    def __init__(self, environment: Environment, seen: int) -> None:
        super().__init__(environment)
        space = environment.observation_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._seen = seen
        self.observation_space = gymnasium.spaces.Box(
            space.low[:seen], space.high[:seen], (seen,), np.float32
        )

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """The positions."""
        return observation[: self._seen]


def make(name: str, **options: Any) -> Environment:
    """The environment `name`, one of NAMES; `two_doors` takes `jammed=True`: one door is shut."""
    match name:
        case "two_doors":
            return TwoDoors(**options)
        case "pendulum":  # sees cos and sin of the angle
            return HiddenVelocity(gymnasium.make("Pendulum-v1", **options), 2)
        case "mountain_car":  # sees the position
            return HiddenVelocity(gymnasium.make("MountainCarContinuous-v0", **options), 1)
    raise ValueError(f"environment {name!r} is not one of {', '.join(NAMES)}")
