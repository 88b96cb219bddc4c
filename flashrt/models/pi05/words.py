"""What a pi0.5 policy reads: a task, and the state written into it.

IS: the text, as LeRobot's processor makes it, and its tokens; where its tokenizer is. IS NOT: the
tokenizer (text.tokenizer), or rows of a plan. As the state is text, another state is another text,
and a plan that sees it has all rows of the text anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.hub.cache import cache_folder, snapshot_of
from flashrt.hub.names import hub_name
from flashrt.models.features import STATE
from flashrt.models.pi05.config import Pi05Config
from flashrt.models.pi05.weights import TOKENIZER, Weights
from flashrt.models.scaling import shift_of
from flashrt.text.tokenizer import TOKENIZER_FILE, Tokenizer
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.computed import computing
from flashrt.weights.lerobot import step_of

USUAL_TOKENIZER = "google/paligemma-3b-pt-224"
_BINS = np.linspace(-1, 1, 256 + 1)[:-1]  # of a number of the state, from -1 to 1
Values = NDArray[np.float32]


class Words:
    """Text and tokens of tasks and states."""

    def __init__(self, c: Pi05Config, filled: Weights, tokenizer: Tokenizer) -> None:
        """Reads the statistics of the state. Raises CheckpointError."""
        self._config = c
        self._vocab_size = filled.sizes.vocab_size
        self._tokenizer = tokenizer
        self._shift = np.float32(shift_of(filled.scaling.modes[STATE]))
        rules, formulas = filled.scaling.rules(STATE, (c.state_dim,))
        source = filled.checkpoint
        statistics = computing(source, filled.scaling.tensors, formulas)
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

    def text(self, task: str, state: Values) -> str:
        """Of a task and a state float32 [state_dim], in the environment's units."""
        c = self._config
        padded = np.zeros(c.max_state_dim, np.float32)
        with np.errstate(over="ignore"):  # infinity is in the last bin too
            padded[: c.state_dim] = (state - self._mean) / self._std - self._shift
        numbers = np.digitize(padded, _BINS) - 1
        cleaned = task.strip().replace("_", " ").replace("\n", " ")
        return f"Task: {cleaned}, State: {' '.join(map(str, numbers))};\nAction: "

    def tokens(self, task: str, state: Values) -> list[int]:
        """Of that text, cut at its end where there are too many. Raises TokenError, and
        CheckpointError for a tokenizer that is another model's.
        """
        text = self.text(task, state)
        found = self._tokenizer.encode_whole(text, self._config.tokenizer_max_length)
        if found and max(found) >= self._vocab_size:
            raise CheckpointError(
                f"{self._tokenizer.path}: token {max(found)} of a vocabulary of "
                f"{self._vocab_size}: it is another model's"
            )
        return found


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The policy's: in its folder, or in what `flashrt pull` fetched under the name that its
    processor has. Raises CheckpointError that names the way out.
    """
    root = checkpoint.path
    settings = step_of(root, TOKENIZER) or {}
    name = settings.get("tokenizer_name") or USUAL_TOKENIZER
    if not isinstance(name, str):
        raise CheckpointError(f"{root}: tokenizer_name is {shown(name)}, expected a name")
    for folder in _folders(root, name):
        if (folder / TOKENIZER_FILE).is_file():
            return Tokenizer(folder / TOKENIZER_FILE)
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
