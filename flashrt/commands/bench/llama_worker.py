"""llama.cpp, through its Python package, as a process that a bench asks in turns.

IS: a program (`python -m flashrt.commands.bench.llama_worker MODEL POSITIONS THREADS`) that reads a
JSON request a line, and answers each with a JSON line of seconds. IS NOT: imported by anything: the
package, its threads and what it prints stay out of the process that is measured.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Answer requests until standard input ends."""
    model, positions, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begun = time.perf_counter()
    llama = llama_cpp.Llama(
        model_path=model, n_ctx=positions, n_threads=threads, n_threads_batch=threads,
        n_batch=512, verbose=False,
    )  # fmt: skip
    _answer({"load_s": time.perf_counter() - begun, "version": llama_cpp.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        _answer(_measured(llama, request["prompt"], request["turn"], request["decode"]))


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


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
