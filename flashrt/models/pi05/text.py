"""What a pi0.5 policy reads: a task, and the state written into it.

IS: the text, as LeRobot's processor makes it; where the policy's tokenizer is. IS NOT: tokens
(vla.reading), or rows of a plan. As the state is text, another state is another text, and a plan
that sees it has all of its rows anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, shown
from flashrt.hub.cache import cache_folder, snapshot_of
from flashrt.hub.names import hub_name
from flashrt.models.features import STATE, size_of
from flashrt.models.pi05.weights import PREPARE, Weights
from flashrt.models.scaling import shift_of
from flashrt.text.tokenizer import TOKENIZER_FILE
from flashrt.weights.computed import computing
from flashrt.weights.lerobot import PREPROCESSOR, step_of

_BINS = np.linspace(-1, 1, 256 + 1)[:-1]  # of a number of the state, from -1 to 1
_MOST_NUMBERS = 1 << 10
Values = NDArray[np.float32]


class Text:
    """Of tasks and states."""

    def __init__(self, root: Path, filled: Weights) -> None:
        """`root`: the policy's folder. Reads statistics of the state. Raises CheckpointError."""
        self._size = _numbers_of(root, filled.config.state_dim)
        self._shift = np.float32(shift_of(filled.scaling.modes[STATE]))
        rules, formulas = filled.scaling.rules(STATE, (filled.config.state_dim,))
        statistics = computing(filled.checkpoint, filled.scaling.tensors, formulas)
        read = []
        for rule in rules:
            if rule.constant:
                read.append(np.array(rule.constant, np.float32))
            elif (array := statistics.array(rule.region.name)) is not None:
                read.append(array.read(statistics.read_into))
        statistics.close()
        self._mean, self._std = read
        if not (np.isfinite(self._mean).all() and np.isfinite(self._std).all() and self._std.all()):
            raise CheckpointError(
                f"{filled.scaling.inputs.file}: statistics of {STATE} divide by 0 or are not finite"
            )

    def of(self, task: str, state: Values) -> str:
        """Of a task and a state float32 [state_dim], in the environment's units."""
        padded = np.zeros(self._size, np.float32)
        with np.errstate(over="ignore"):  # infinity is in the last bin too
            padded[: len(state)] = (state - self._mean) / self._std - self._shift
        numbers = np.digitize(padded, _BINS) - 1
        cleaned = task.strip().replace("_", " ").replace("\n", " ")
        return f"Task: {cleaned}, State: {' '.join(map(str, numbers))};\nAction: "


def _numbers_of(root: Path, state_dim: int) -> int:
    """Numbers that a text has: those of the state, then zeros."""
    step = step_of(root, PREPARE)
    problems: list[str] = []
    if step is None:
        problems.append("is missing; without it the policy does not see the state: fetch it again")
        step = {}
    fields = {"max_state_dim": 32, "task_key": "task", **step}
    found = size_of(fields, "max_state_dim", _MOST_NUMBERS, problems)
    if fields["task_key"] != "task":
        problems.append(f"task_key is {shown(fields['task_key'])}; supported: 'task'")
    if problems:
        raise CheckpointError(f"{root / PREPROCESSOR}: step {PREPARE}:{indented(problems)}")
    return max(found, state_dim)  # LeRobot cuts nothing off


def tokenizer_file(root: Path, name: str) -> Path:
    """The tokenizer.json of a policy's folder: in it, or in what `flashrt pull` fetched under the
    name that its processor has. Raises CheckpointError that names the way out.
    """
    for folder in _folders(root, name):
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    raise CheckpointError(
        f"{root}: no {TOKENIZER_FILE} of {shown(name)}; put it into the folder, or fetch it: "
        f"flashrt pull {name}"
    )


def _folders(root: Path, name: str) -> Iterator[Path]:
    yield root
    local = Path(name).expanduser()
    if local.is_dir():
        yield local
        return
    known = hub_name(name)
    snapshot = None if known is None else snapshot_of(known, cache_folder())
    if snapshot is not None:
        yield snapshot
