"""llama.cpp, through its Python package, as a process that a bench asks in turns.

IS: a program (`python -m flashrt.commands.bench.llama_worker MODEL POSITIONS THREADS [SEQUENCES]`)
that reads a JSON request a line, and answers each with a JSON line of seconds. With SEQUENCES, its
requests are for so many sequences side by side, of POSITIONS each. IS NOT: imported by anything:
the package, its threads and what it prints stay out of the process that is measured.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np

_BATCH = 512  # tokens of a prompt at once


def main() -> None:
    """Answer requests until standard input ends."""
    model, positions, threads, *sequences = sys.argv[1:]
    begun = time.perf_counter()
    answers: Callable[[dict[str, Any]], dict[str, Any]]
    if sequences:
        answers = _Sequences(model, int(positions), int(threads), int(sequences[0])).answer
    else:
        llama = llama_cpp.Llama(
            model_path=model, n_ctx=int(positions), n_threads=int(threads),
            n_threads_batch=int(threads), n_batch=_BATCH, verbose=False,
        )  # fmt: skip

        def answers(request: dict[str, Any]) -> dict[str, Any]:
            return _measured(llama, request["prompt"], request["turn"], request["decode"])

    _answer({"load_s": time.perf_counter() - begun, "version": llama_cpp.__version__})
    for line in sys.stdin:
        _answer(answers(json.loads(line)))


# -- one sequence ---------------------------------------------------------------------------------


def _measured(llama: Any, prompt: list[int], turn: list[int], n_decode: int) -> dict[str, Any]:
    """Prefill from empty; decode there; load that state again, with a turn and a first token."""
    llama.reset()
    begun = time.perf_counter()
    llama.eval(prompt)
    prefill_s = time.perf_counter() - begun
    state = llama.save_state()
    inter_token_s = []
    for _ in range(n_decode):
        begun = time.perf_counter()
        llama.eval([_argmax(llama)])
        inter_token_s.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    llama.load_state(state)
    llama.eval(turn)
    _argmax(llama)
    return {
        "prefill_s": prefill_s,
        "inter_token_s": inter_token_s,
        "ttft_warm_s": time.perf_counter() - begun,
    }


def _argmax(llama: Any) -> int:
    logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, (llama.n_vocab(),))))


# -- sequences side by side -----------------------------------------------------------------------


class _Sequences:
    """By the package's low level: its `Llama` has one sequence."""

    def __init__(self, model: str, positions: int, threads: int, count: int) -> None:
        llama_cpp.llama_backend_init()
        loaded = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not loaded:
            sys.exit(f"cannot read {model}")
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = count
        options.n_ctx = count * positions  # a part for each: `kv_unified` is False by default
        options.n_batch = options.n_ubatch = _BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(loaded, options)
        if not self._context:
            sys.exit(f"no context for {count} sequences of {positions} positions")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._prompts: list[list[int]] = []
        self._states: list[Any] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Either new prompts, or how many of the sequences decode how many tokens each."""
        if "prompts" in request:
            self._prompts = request["prompts"]
            return {"prefill_s": self._prefill()}
        return {"inter_token_s": self._decode(request["count"], request["decode"])}

    def _prefill(self) -> float:
        """All prompts; the state after each is kept."""
        begun = time.perf_counter()
        for i, prompt in enumerate(self._prompts):
            for first in range(0, len(prompt), _BATCH):
                piece = prompt[first : first + _BATCH]
                self._feed([(i, first + at, token) for at, token in enumerate(piece)])
            size = llama_cpp.llama_state_seq_get_size(self._context, i)
            state = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(self._context, state, size, i)
            self._states.append(state)
        return time.perf_counter() - begun

    def _decode(self, count: int, n_decode: int) -> list[float]:
        """Seconds of each step: a token of each sequence, and the likeliest one after it."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        for i, state in enumerate(self._states[:count]):
            if not llama_cpp.llama_state_seq_set_data(self._context, state, len(state), i):
                sys.exit(f"the state of sequence {i} was not taken")
        tokens = [prompt[-1] for prompt in self._prompts[:count]]
        seconds = []
        for step in range(n_decode + 1):  # the first comes after copies, and does not count
            begun = time.perf_counter()
            rows = [(i, len(self._prompts[i]) + step, token) for i, token in enumerate(tokens)]
            self._feed(rows, is_asked=True)
            logits = llama_cpp.llama_get_logits(self._context)
            shape = (count, self._vocab_size)
            tokens = np.ctypeslib.as_array(logits, shape).argmax(axis=1).tolist()
            seconds.append(time.perf_counter() - begun)
        return seconds[1:]

    def _feed(self, rows: Sequence[tuple[int, int, int]], *, is_asked: bool = False) -> None:
        """(sequence, position, token) in one batch; `is_asked`: with logits after each."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (sequence, position, token) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = is_asked
        if code := llama_cpp.llama_decode(self._context, batch):
            sys.exit(f"llama_decode of {len(rows)} tokens: {code}")


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
