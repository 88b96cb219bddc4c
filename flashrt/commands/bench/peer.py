"""What a user would run instead, measured in the same run, in turns with flashrt.

IS: llama.cpp on the same GGUF file, where its Python package is installed. IS NOT: figures from
another machine or another day: without the package, or for a model that is no GGUF file, a report
has no peer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


class _Worker:
    """llama.cpp in a process of its own; it waits while flashrt is measured."""

    def __init__(self, *arguments: object) -> None:
        """Raises FlashrtError if it does not come up."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [sys.executable, "-m", "flashrt.commands.bench.llama_worker"]
        self._process = subprocess.Popen(
            [*command, *(str(argument) for argument in arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip
        self._opening = self._answer()

    def _ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: what it said last tells why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _close(self) -> dict[str, Any]:
        """End it; who it was."""
        self._process.communicate()
        return {
            "name": f"llama.cpp (llama-cpp-python {self._opening['version']})",
            "load_s": self._opening["load_s"],
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


class LlamaCpp(_Worker):
    """One sequence: prefill, decode, and a warm start, by length of the prompt."""

    def __init__(self, model: Path, positions: int, threads: int) -> None:
        """Raises FlashrtError if it does not come up."""
        self._samples: dict[int, _Samples] = {}
        self._load = (model, positions, threads)
        super().__init__(model, positions, threads)

    def measure(self, prompt: Tokens, turn: Tokens) -> None:
        """One sample of each figure at this length."""
        request = {"prompt": prompt.tolist(), "turn": turn.tolist(), "decode": _DECODED}
        answer = self._ask(request)
        at = self._samples.setdefault(len(prompt), _Samples())
        at.prefill_s.append(answer["prefill_s"])
        at.inter_token_s += answer["inter_token_s"]
        at.ttft_warm_s.append(answer["ttft_warm_s"])

    def close(self) -> dict[str, Any]:
        """End it. Its figures by name and length, keyed as those of a session's bench; and under
        `load` what loading costs each, in processes of their own, or why that is not known.
        """
        found = self._close()
        try:
            found["load"] = load_figures(*self._load)
        except FlashrtError as error:  # the other figures are there already
            found["load"] = {"problem": str(error)}
        return {
            **found,
            "prefill_tokens_per_s": {n: n / median(s.prefill_s) for n, s in self._samples.items()},
            "decode_tokens_per_s": {
                n: 1 / fmean(s.inter_token_s) for n, s in self._samples.items()
            },
            "ttft_warm_s": {n: median(s.ttft_warm_s) for n, s in self._samples.items()},
        }


class LlamaLanes(_Worker):
    """Sequences side by side: a batch has the next token of each."""

    def __init__(
        self, model: Path, positions: int, threads: int, prompts: Sequence[Tokens]
    ) -> None:
        """A sequence per prompt, of up to so many positions; prompts are prefilled once.

        Raises FlashrtError if it does not come up.
        """
        self._step_s: dict[int, list[float]] = {}
        super().__init__(model, positions, threads, len(prompts))
        self._ask({"prompts": [prompt.tolist() for prompt in prompts]})

    def measure(self, count: int, n_decode: int) -> None:
        """The first so many sequences, back at the end of their prompts, decode."""
        answer = self._ask({"count": count, "decode": n_decode})
        self._step_s.setdefault(count, []).extend(answer["inter_token_s"])

    def close(self) -> dict[str, Any]:
        """End it. Tokens per second of all sequences together, by how many they were."""
        return {
            **self._close(),
            "tokens_per_s": {n: n / fmean(steps) for n, steps in self._step_s.items()},
            "inter_token_p50_s": {n: median(steps) for n, steps in self._step_s.items()},
        }


def lanes_peer_of(
    model: Path, positions: int, threads: int, prompts: Sequence[Tokens]
) -> LlamaLanes | None:
    """See LlamaLanes and `peer_of`."""
    return LlamaLanes(model, positions, threads, prompts) if _is_for(model) else None


def peer_of(model: Path, positions: int, threads: int) -> LlamaCpp | None:
    """llama.cpp on this model; None where there is no package, or no file that it reads."""
    return LlamaCpp(model, positions, threads) if _is_for(model) else None


def _is_for(model: Path) -> bool:
    return model.suffix == ".gguf" and importlib.util.find_spec(PACKAGE) is not None


def turn_of(tokens: Tokens, count: int) -> Tokens:
    """So many tokens for a turn, taken from a prompt."""
    return np.resize(tokens, count)
