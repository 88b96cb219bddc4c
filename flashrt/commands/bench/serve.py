"""`flashrt bench --serve`: a server under load, over HTTP, beside llama.cpp's.

IS: closed-loop clients against `flashrt serve`, by how many they are, in turns with another server
on the same file: tokens per second, time to first token cold and warm, time between tokens, errors,
memory. All in one run. IS NOT: its table (report), the servers (servers), the clients (clients).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.base.flags import thread_count
from flashrt.commands import console
from flashrt.commands.bench import clients
from flashrt.commands.bench.clients import Load, run_clients
from flashrt.commands.bench.document import BenchOptions, check_outputs, deliver, opening
from flashrt.commands.bench.report import show_serve
from flashrt.commands.bench.servers import (
    LANES,
    POSITIONS,
    Server,
    closing,
    flashrt_server,
    llama_server,
)
from flashrt.weights.bundled import bundled_checkpoint

CLIENTS, SECONDS = [1, 4, 8], 20.0
WARM_UP_S = 1.0  # a turn at least
FLAT = 0.02  # growth of memory that is none
_SETTLED = 0.25  # of a server's first run at a count, until its memory is taken for settled
_BUSY = "429"


@dataclass(frozen=True, slots=True)
class ServeBenchOptions:
    """What to measure, besides the model."""

    clients: Sequence[int] = tuple(CLIENTS)
    seconds: float = SECONDS
    host_nbytes: int | None = None  # of `flashrt serve`, as all other options are its defaults
    llama_server: Path | None = None


def bench_serve(options: BenchOptions, wanted: ServeBenchOptions, json_path: Path | None) -> int:
    """The command. Returns 1 if a client saw an error of flashrt's that is not "come again"."""
    check_outputs(json_path)
    model = options.checkpoint or bundled_checkpoint()
    if wanted.llama_server is not None and model.suffix != ".gguf":
        raise FlashrtError(f"llama.cpp reads GGUF files; {model} is none: give --checkpoint")
    started = time.perf_counter()
    facts = opening(options)
    servers = [flashrt_server(model, options.engine, wanted.host_nbytes)]
    with closing(servers):
        if wanted.llama_server is not None:
            servers.append(llama_server(wanted.llama_server, model, thread_count()))
        props = servers[0].get("/props")
        counts = sorted(set(wanted.clients))
        with console.progress_bars() as progress:
            found = [
                [_AtCount(server, count, wanted.seconds) for server in servers] for count in counts
            ]
            for server in servers:
                run_clients(server.url, 1, WARM_UP_S, first=1 << 20)  # pages are touched
            for repeat in range(options.repeats):
                for i, beside in enumerate(found):
                    what = f"run {repeat + 1} of {options.repeats}"
                    progress(what, i, len(found))
                    for at in beside:
                        at.measure(repeat)
                    progress(what, i + 1, len(found))
    rows = [at.facts() for beside in found for at in beside]
    document = {
        **facts,
        "model": str(model),
        "weights_bytes": _weights_nbytes(model),
        "device": props["device"],
        "fingerprint": props["fingerprint"],
        "lanes": LANES,
        "positions": POSITIONS,
        "turns": clients.TURNS,
        "most_tokens": clients.MOST_TOKENS,
        "host_bytes": wanted.host_nbytes,
        "seconds_each": wanted.seconds,
        "repeats": options.repeats,
        "rows": rows,
        "peer": servers[1].name if len(servers) > 1 else None,
        "seconds": time.perf_counter() - started,
    }
    deliver(document, json_path, show_serve)
    ours = [row for row in rows if row["server"] == servers[0].name]
    return 0 if all(set(row["errors"]) <= {_BUSY} for row in ours) else 1


def _weights_nbytes(model: Path) -> int:
    """Of its files."""
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(path.stat().st_size for path in files)


@dataclass(slots=True)
class _AtCount:
    """Runs of one server with so many clients."""

    server: Server
    clients: int
    seconds: float
    loads: list[Load] = field(default_factory=list)
    settled_nbytes: int = 0
    end_nbytes: int = 0

    def measure(self, repeat: int) -> None:
        """One run more. Conversations of a run are new to the server."""
        settled = threading.Timer(self.seconds * _SETTLED, self._look) if not repeat else None
        if settled is not None:
            settled.start()
        try:
            first = (repeat << 12) + (self.clients << 24)
            self.loads.append(run_clients(self.server.url, self.clients, self.seconds, first))
        finally:
            if settled is not None:
                settled.join()
        self.server.check()
        self.end_nbytes = self.server.memory_nbytes

    def _look(self) -> None:
        self.settled_nbytes = self.server.memory_nbytes

    def facts(self) -> dict[str, Any]:
        """Its row."""
        loads = self.loads
        turns = [turn for load in loads for turn in load.turns]
        cold, warm = ([s for load in loads for s in load.first_token_s(is_first)]
                      for is_first in (True, False))  # fmt: skip
        later = [turn for turn in turns if not turn.is_first]
        cached = [turn.cached_tokens for turn in later if turn.cached_tokens is not None]
        prompts = sum(turn.prompt_tokens for turn in later)
        rates = [load.tokens_per_s for load in loads]
        return {
            "clients": self.clients,
            "server": self.server.name,
            "tokens_per_s": fmean(rates),
            **_quantiles("ttft_cold", cold),
            **_quantiles("ttft_warm", warm),
            **_quantiles("inter_token", [s for load in loads for s in load.inter_token_s()]),
            "cached_fraction": sum(cached) / prompts if cached and prompts else None,
            "requests": len(turns),
            "errors": dict(sum((load.errors for load in loads), Counter())),
            "memory_settled_bytes": self.settled_nbytes,
            "memory_end_bytes": self.end_nbytes,
            "memory_growth": self.end_nbytes / self.settled_nbytes - 1,
            "is_flat": self.end_nbytes <= self.settled_nbytes * (1 + FLAT),
            "samples": {"tokens_per_s": rates},
        }


def _quantiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}_p50_s": None, f"{name}_p99_s": None}
    p50, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.99)))
    return {f"{name}_p50_s": p50, f"{name}_p99_s": p99}
