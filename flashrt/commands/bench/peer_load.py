"""How long a process takes to load a model and answer for the first time, and its most memory.

IS: a program (`python -m flashrt.commands.bench.peer_load WHO MODEL POSITIONS THREADS`) for one
load by flashrt or llama.cpp in a process of its own, imports apart; and the call that runs it, in
turns. IS NOT: a measure of a file that is not in the page cache: the first turn reads it there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import printable

with contextlib.suppress(ImportError):  # native Windows, where this program has nothing to ask
    import resource

WHO = ("flashrt", "llama.cpp")
_TURNS = 3
_TOKENS = (1, 2, 3, 4)  # what a first answer follows
_KB = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def load_figures(model: Path, positions: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of each of WHO: `load_s` until the first logits, and `peak_bytes` of its process.

    Raises FlashrtError where one of them does not come up.
    """
    found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    for _ in range(_TURNS):
        for who in WHO:
            found[who].append(_one(who, model, positions, threads))
    return {
        who: {key: median(figures[key] for figures in turns) for key in turns[0]}
        for who, turns in found.items()
    }


def _one(who: str, model: Path, positions: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, who, str(model), str(positions), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:]
        why = printable(last[0]) if last else "it ended, and said nothing"
        raise FlashrtError(f"{who} does not load {model} in a process of its own: {why}")
    figures = json.loads(result.stdout.splitlines()[-1])
    return {key: float(figures[key]) for key in ("load_s", "peak_bytes")}


def main() -> None:
    """Load, prefill a few tokens, have their logits; print a line of JSON."""
    who, model, positions, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    seconds = (_flashrt if who == "flashrt" else _llama_cpp)(model, positions, threads)
    print(json.dumps({"load_s": seconds, "peak_bytes": peak_nbytes()}))


def peak_nbytes() -> int:
    """The most memory that this program has had. Linux counts into ru_maxrss what the process held
    before it became this program, which is what its parent holds: so its status is asked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KB


def _flashrt(model: str, positions: int, threads: int) -> float:
    import os

    os.environ["FLASHRT_THREADS"] = str(threads)
    import flashrt

    begun = time.perf_counter()
    engine = flashrt.load(model, device="cpu", max_positions=positions, pool_bytes=0)
    session = engine.session()
    session.prefill(_TOKENS)
    session.logits()
    return time.perf_counter() - begun


def _llama_cpp(model: str, positions: int, threads: int) -> float:
    import llama_cpp

    begun = time.perf_counter()
    llama = llama_cpp.Llama(
        model_path=model, n_ctx=positions, n_threads=threads, n_threads_batch=threads,
        n_batch=512, verbose=False,
    )  # fmt: skip
    llama.eval(list(_TOKENS))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
