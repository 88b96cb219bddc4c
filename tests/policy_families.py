"""Families of robot policies, for the suites that each of them must pass.

IS: by name a small random policy: how it is written, what it observes, which regions are its state
and which phases make what a plan stands on. A new family adds a line to FAMILIES. IS NOT: cases,
see tests/property/test_policy_families.py and tests/unit/test_policy_families.py; nor weights and
files, see tests/policy_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.core.region import Region, Role
from flashrt.models.act import config as act_config
from flashrt.models.act import model as act_model
from flashrt.models.actions import PLAN
from flashrt.models.pi05 import config as pi05_config
from flashrt.models.prefix import LOOK, READ, READ_STATE
from flashrt.models.smolvla import config as smolvla_config
from flashrt.models.vla import policy as vla_policy
from tests import act_policies, pi05_policies, smolvla_policies
from tests.policy_files import random_noise, random_observation, random_statistics

STATE, TASK = "observation.state", "task"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A small policy of it."""

    name: str
    config: Json
    write: Callable[[Path], Path]  # its files into a folder, which is made
    tasks: tuple[str, ...]  # none: it does not read
    parse: ModuleType  # has parse_config
    declares: ModuleType  # has _lane_regions
    state: tuple[str, ...]  # regions of a lane, without any of which a capsule is not whole
    rows: tuple[str, ...] = ()  # of those: keys and values of what was read
    phases: tuple[str, ...] = (PLAN,)  # of a plan from an observation that is new
    # Observations, one after the other, and the phases of rows that each makes.
    news: Callable[[], list[tuple[Json, list[str]]]] = list

    @property
    def cameras(self) -> list[str]:
        """Names of images, in order."""
        return [n for n, about in self._inputs.items() if about["type"] == "VISUAL"]

    @property
    def vectors(self) -> list[str]:
        """Names of what is numbers alone."""
        return [n for n, about in self._inputs.items() if about["type"] != "VISUAL"]

    @property
    def _inputs(self) -> Json:
        found: Json = self.config["input_features"]
        return found

    @property
    def action_dim(self) -> int:
        """Numbers of an action."""
        (size,) = self.config["output_features"]["action"]["shape"]
        return int(size)

    def observation(self, seed: int) -> Json:
        """All parts, random, by name."""
        return random_observation(self.config, seed, self.tasks)

    def seen(self, at: int) -> Json:
        """Observation `at` of a life: some share all images and the task, or all but a camera; each
        four that follow each other have other vectors, which come again.
        """
        whole = self.observation(at // 8)
        whole |= {name: self.observation(at % 4)[name] for name in self.vectors}
        if at % 8 == 5 and self.tasks and len(self.cameras) > 1:
            del whole[self.cameras[-1]]
        return whole

    def noise(self, seed: int) -> Any:
        """What a chunk is integrated from, [chunk_size, max_action_dim]."""
        return random_noise(self.config, seed)

    def forget(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A region is no state of the engines that are made from here on."""
        declared = self.declares._lane_regions

        def without(*arguments: Any) -> tuple[Region, ...]:
            return tuple(
                Region(r.name, r.shape, r.dtype, Role.IO)
                if r.name == name and r.role is Role.FIXED
                else r
                for r in declared(*arguments)
            )

        monkeypatch.setattr(self.declares, "_lane_regions", without)


def _act(name: str, *more: str) -> Family:
    return Family(
        name=f"act-{name}",
        config=act_policies.SETS[name][0],
        write=lambda folder: act_policies.write_set(name, folder),
        tasks=(),
        parse=act_config,
        declares=act_model,
        state=("cursor", "previous", "action", "queue", "kept", "chunk", *more),
    )


def _smolvla(name: str, made: str) -> Family:
    config = smolvla_policies.SETS[made][0]

    def news() -> list[tuple[Json, list[str]]]:
        top, wrist = _cameras(config)
        base, other = (smolvla_policies.observation_of(config, seed) for seed in (1, 2))
        return [
            (base, [LOOK, LOOK, READ, READ_STATE]),
            (base, []),
            ({**base, STATE: other[STATE]}, [READ_STATE]),
            (base, [READ_STATE]),
            ({**base, wrist: other[wrist]}, [LOOK, READ, READ_STATE]),
            ({**base, TASK: "lift it"}, [LOOK, READ, READ_STATE]),
            ({name: part for name, part in base.items() if name != wrist}, [READ, READ_STATE]),
            (base, [READ, READ_STATE]),
            ({**base, top: other[top]}, [LOOK, READ, READ_STATE]),
        ]

    return Family(
        name=name,
        config=config,
        write=lambda folder: smolvla_policies.write_set(made, folder),
        tasks=smolvla_policies.TASKS,
        parse=smolvla_config,
        declares=vla_policy,
        state=("cursor", "previous", "action", "queue", "kept", "flow", "target", "weights"),
        rows=("keys", "values", "cross_keys", "cross_values"),
        phases=(LOOK, READ, READ_STATE, PLAN),
        news=news,
    )  # fmt: skip


def _pi05() -> Family:
    name = "one-camera"
    config, _, seed = pi05_policies.SETS[name]
    (top,), seen = _cameras(config), pi05_policies.observation_of(name, 0)
    numbers = random_statistics(STATE, (2,), seed)
    base = {**seen, STATE: numbers["mean"]}

    def news() -> list[tuple[Json, list[str]]]:
        return [
            (base, [LOOK, READ]),
            (base, []),
            ({**base, STATE: numbers["mean"] + numbers["std"] / 2}, [READ]),
            ({**base, STATE: numbers["q99"] + 1}, [READ]),
            ({**base, STATE: numbers["q99"] + 2}, []),  # both beyond the last bin
            ({**base, TASK: "let go"}, [READ]),
            ({**base, top: pi05_policies.observation_of(name, 1)[top]}, [LOOK, READ]),
        ]

    return Family(
        name="pi05",
        config=config,
        write=lambda folder: pi05_policies.write_random_pi05(name, folder),
        tasks=pi05_policies.TASKS,
        parse=pi05_config,
        declares=vla_policy,
        state=("cursor", "previous", "action", "queue", "kept", "flow"),
        rows=("keys", "values"),
        phases=(LOOK, READ, PLAN),
        news=news,
    )


def _cameras(config: Json) -> list[str]:
    return [n for n, about in config["input_features"].items() if about["type"] == "VISUAL"]


# Of ACT: without cameras, which is the smallest; with one; with a temporal ensemble. Of SmolVLA:
# the smallest; and one of wider matrices, for what is quantised.
_ALL = (
    _act("no-camera"), _act("pre-norm"), _act("ensemble", "average", "counts"),
    _smolvla("smolvla", "tiny"), _smolvla("smolvla-plain", "plain"), _pi05(),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
ACT, ACT_SEEING, ACT_ENSEMBLE, SMOLVLA, SMOLVLA_PLAIN, PI05 = FAMILIES
SMALL = (ACT, SMOLVLA, PI05)  # one of each
SEEING = (ACT_SEEING, SMOLVLA, PI05)  # one of each that has a camera
READING = (SMOLVLA, PI05)  # those that a task is given


def of(*names: str) -> pytest.MarkDecorator:
    """A case runs on these: see the fixtures `family` of the suites."""
    return pytest.mark.parametrize("family", names, indirect=True)


# -- files that are changed -----------------------------------------------------------------------


def change(file: Path, edit: Callable[[Json], Any]) -> None:
    """Edit a JSON file in place."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def step_of(processor: Json, name: str) -> Json:
    """A step of a processor's file."""
    found: list[Json] = [s for s in processor["steps"] if s.get("registry_name") == name]
    return found[0]


def refused(folder: Path) -> str:
    """What is said of a policy that does not load."""
    with pytest.raises(CheckpointError) as caught:
        flashrt.load_policy(folder, device="cpu")
    return str(caught.value)
