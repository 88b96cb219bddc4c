"""What a user would run instead, measured in the same run, in turns with flashrt.

IS: llama.cpp on the same GGUF file, where its Python package is installed. IS NOT: figures from
another machine or another day: without the package, or for a model that is no GGUF file, a report
has no peer.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import printable
from flashrt.commands.bench.peer_load import load_figures
from flashrt.commands.timing import Tokens

PACKAGE = "llama_cpp"
_DECODED = 32  # tokens at each length, each time


@dataclass(slots=True)
class _Samples:
    prefill_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
    ttft_warm_s: list[float] = field(default_factory=list)


class LlamaCpp:
    """llama.cpp in a process of its own; it waits while flashrt is measured."""

    def __init__(self, model: Path, positions: int, threads: int) -> None:
        """Raises FlashrtError if it does not come up."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        arguments = [str(model), str(positions), str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flashrt.commands.bench.llama_worker", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip
        self._load = (model, positions, threads)
        self._samples: dict[int, _Samples] = {}
        self._opening = self._answer()

    def measure(self, prompt: Tokens, turn: Tokens) -> None:
        """One sample of each figure at this length."""
        assert self._process.stdin is not None
        request = {"prompt": prompt.tolist(), "turn": turn.tolist(), "decode": _DECODED}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        at = self._samples.setdefault(len(prompt), _Samples())
        at.prefill_s.append(answer["prefill_s"])
        at.inter_token_s += answer["inter_token_s"]
        at.ttft_warm_s.append(answer["ttft_warm_s"])

    def close(self) -> dict[str, Any]:
        """End it. Its figures by name and length, keyed as those of a session's bench; and under
        `load` what loading costs each, in processes of their own, or why that is not known.
        """
        self._process.communicate()
        load: dict[str, Any]
        try:
            load = load_figures(*self._load)
        except FlashrtError as error:  # the other figures are there already
            load = {"problem": str(error)}
        return {
            "name": f"llama.cpp (llama-cpp-python {self._opening['version']})",
            "load_s": self._opening["load_s"],
            "load": load,
            "prefill_tokens_per_s": {n: n / median(s.prefill_s) for n, s in self._samples.items()},
            "decode_tokens_per_s": {
                n: 1 / fmean(s.inter_token_s) for n, s in self._samples.items()
            },
            "ttft_warm_s": {n: median(s.ttft_warm_s) for n, s in self._samples.items()},
        }

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError as error:
            self._process.communicate()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
            why = printable(last[0]) if last else "it ended, and said nothing"
            raise FlashrtError(
                f"llama.cpp is installed, but cannot be measured beside flashrt: {why}"
            ) from error
        assert isinstance(answer, dict)
        return answer


def peer_of(model: Path, positions: int, threads: int) -> LlamaCpp | None:
    """llama.cpp on this model; None where there is no package, or no file that it reads."""
    if model.suffix != ".gguf" or importlib.util.find_spec(PACKAGE) is None:
        return None
    return LlamaCpp(model, positions, threads)


def turn_of(tokens: Tokens, count: int) -> Tokens:
    """So many tokens for a turn, taken from a prompt."""
    return np.resize(tokens, count)
