"""`flashrt bench --lanes`: tokens per second by how many lanes decode in one replay.

IS: rates by count of lanes, in turns with llama.cpp's batches; what a newcomer's prompt costs the
lanes that decode; best of several forks against one generation. All in one run. IS NOT: its tables
(report), or what every bench says about a run (document).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import FlashrtError
from flashrt.base.flags import thread_count
from flashrt.commands import console
from flashrt.commands.bench.document import (
    BenchOptions,
    check_outputs,
    checkpoint_of,
    deliver,
    of_engine,
    opening,
)
from flashrt.commands.bench.peer import LlamaLanes, lanes_peer_of
from flashrt.commands.bench.report import show_lanes
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.commands.plan import model_of
from flashrt.commands.timing import Tokens, synthetic_tokens
from flashrt.core.backend import Progress
from flashrt.engine.engine import PoolDefault
from flashrt.models.model import STEP_ROWS
from flashrt.ops.sample import SamplerParams
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.session.together import together
from flashrt.view.lanes_plot import plot
from flashrt.weights.opening import open_weights

LENGTHS = [128, 2048]  # of a lane's prompt; of the prompt that forks begin at
DECODED = 48  # tokens of each lane, each time
NEWCOMER = 256  # tokens of the prompt that comes while others decode
FORKS, FORK_TOKENS = 8, 64
_BEFORE = 8  # steps of the others before the newcomer


def bench_lanes(
    options: BenchOptions, counts: Sequence[int], json_path: Path | None, plot_path: Path | None
) -> int:
    """The command. Returns 1 if a lane says something else beside others than alone."""
    check_outputs(json_path, plot_path)
    started = time.perf_counter()
    facts = opening(options)
    path = checkpoint_of(options)
    lengths = options.lengths or LENGTHS
    counts = sorted({1, *counts})
    engine = open_engine(path, _room(path, options.engine, counts[-1], lengths))
    random = np.random.default_rng(0)
    prompts = [synthetic_tokens(random, engine.vocab_size, lengths[0]) for _ in range(counts[-1])]
    peer = _peer(path, lengths[0] + DECODED + 2, prompts)
    with console.progress_bars() as progress:
        bench = _Bench(engine, prompts, options.repeats, progress)
        rows = bench.rates(counts, peer)
        newcomer = bench.newcomer(synthetic_tokens(random, engine.vocab_size, NEWCOMER))
        bench.close()
        prompt = synthetic_tokens(random, engine.vocab_size, lengths[-1])
        best_of = _best_of(engine, prompt, options.repeats, progress)
    document = {
        **facts,
        **of_engine(engine),
        "prompt_tokens": lengths[0],
        "decoded_tokens": DECODED,
        "repeats": options.repeats,
        "rows": [row.facts(rows[0]) for row in rows],
        "newcomer": newcomer,
        "best_of": best_of,
        "peer": None if peer is None else peer.close(),
        "is_exact": bench.is_exact and best_of["is_exact"],
        "seconds": time.perf_counter() - started,
    }
    engine.close()
    deliver(document, json_path, show_lanes, plot_path, plot)
    return 0 if document["is_exact"] else 1


def _room(path: Path, options: EngineOptions, most: int, lengths: Sequence[int]) -> EngineOptions:
    """Lanes for all of it, and a pool that holds a capsule and a waypoint of each."""
    lanes = max(most, FORKS + 1)
    positions = max(lengths[0] + DECODED + 2 * _BEFORE, lengths[-1] + FORK_TOKENS, NEWCOMER) + 1
    options = replace(options, lanes=lanes, max_positions=positions)
    model = model_of(open_weights(path), options)
    rows = -(-lanes * (lengths[0] + DECODED) // positions)
    pool = PoolDefault(fixed=2 * lanes + 4, lanes=rows + 2)
    return replace(options, pool_bytes=pool.nbytes(model, CpuDevice().storage))


def _peer(path: Path, positions: int, prompts: Sequence[Tokens]) -> LlamaLanes | None:
    """One that does not come up is said, and left out."""
    try:
        return lanes_peer_of(path, positions, thread_count(), prompts)
    except FlashrtError as error:
        console.complain(f"note: {error}")
        return None


@dataclass(slots=True)
class _AtCount:
    """Samples of so many lanes."""

    lanes: int
    seconds: list[float] = field(default_factory=list)  # DECODED tokens of each lane
    inter_token_s: list[float] = field(default_factory=list)  # of every lane

    @property
    def tokens_per_s(self) -> float:
        """Of all lanes together."""
        return self.lanes * DECODED / fmean(self.seconds)

    def facts(self, one: _AtCount) -> dict[str, Any]:
        """Its row, beside one lane."""
        return {
            "lanes": self.lanes,
            "tokens_per_s": self.tokens_per_s,
            "lane_tokens_per_s": self.tokens_per_s / self.lanes,
            "of_one": self.tokens_per_s / one.tokens_per_s,
            **_quantiles(self.inter_token_s),
            "samples": {"seconds": self.seconds, "inter_token_s": self.inter_token_s},
        }


class _Bench:
    """Sessions with prompts of their own. Between measurements they go back to the end of them."""

    def __init__(
        self, engine: SessionEngine, prompts: Sequence[Tokens], repeats: int, progress: Progress
    ) -> None:
        self.engine, self.repeats, self.progress = engine, repeats, progress
        self.is_exact = True
        self._sessions: list[Session] = []
        self._said: dict[int, list[int]] = {}  # by each lane, the first time
        for i, prompt in enumerate(prompts):
            self._sessions.append(engine.session())
            self._sessions[i].prefill(prompt)
            progress("prompts", i + 1, len(prompts))
        self._starts = [session.snapshot() for session in self._sessions]

    def close(self) -> None:
        """Give the lanes back."""
        for session, start in zip(self._sessions, self._starts, strict=True):
            session.close()
            start.drop()

    def rates(self, counts: Sequence[int], peer: LlamaLanes | None) -> list[_AtCount]:
        """Counts in turns, and each in turns with the peer."""
        found = [_AtCount(count) for count in counts]
        self._decode(_AtCount(counts[-1]))  # memory is touched for the first time
        for repeat in range(self.repeats):
            for i, at in enumerate(found):
                what = f"decode, run {repeat + 1} of {self.repeats}"
                self.progress(what, i, len(found))
                self._decode(at)
                if peer is not None:
                    peer.measure(at.lanes, DECODED)
                self.progress(what, i + 1, len(found))
        return found

    def _decode(self, at: _AtCount) -> None:
        sessions = self._back(at.lanes)
        stream = together(*(session.generate(DECODED + 1) for session in sessions))
        said = [[next(stream)[1]] for _ in sessions]  # sampled from the restored state: no decode
        begun = time.perf_counter()
        before = [begun] * len(sessions)
        for index, token in stream:
            now = time.perf_counter()
            at.inter_token_s.append(now - before[index])
            before[index] = now
            said[index].append(token)
        at.seconds.append(time.perf_counter() - begun)
        for index, tokens in enumerate(said):
            self.is_exact &= self._said.setdefault(index, tokens) == tokens

    def newcomer(self, prompt: Tokens) -> dict[str, Any]:
        """A prompt comes while lanes decode: fed in pieces beside them, or at once, in turns."""
        n = min(FORKS, self.engine.most_together - 1, len(self._sessions))
        before: list[float] = []
        pieces, blocking = _Coming(), _Coming()
        while len(self._sessions) > self.engine.most_together - 1:  # a lane for it
            self._sessions.pop().close()
            self._starts.pop().drop()
        with self.engine.session() as new:
            for repeat in range(self.repeats):
                for coming, come in ((pieces, self._pieces), (blocking, self._blocking)):
                    sessions = self._back(n)
                    new.rollback(0)
                    tokens = [self.engine.sample(s.lane, SamplerParams()) for s in sessions]
                    for _ in range(_BEFORE):
                        begun = time.perf_counter()
                        tokens = self._others(sessions, tokens)
                        before.append(time.perf_counter() - begun)
                    coming.digests.append(come(sessions, new, tokens, prompt, coming))
                self.progress("a newcomer", repeat + 1, self.repeats)
        self.is_exact &= len({*pieces.digests, *blocking.digests}) == 1
        return {
            "tokens": len(prompt),
            "lanes": n,
            "piece_tokens": STEP_ROWS - n,
            "before": _quantiles(before),
            "pieces": pieces.facts(),
            "blocking": blocking.facts(),
        }

    def _pieces(
        self, sessions: Sequence[Session], new: Session, tokens: list[int], prompt: Tokens,
        coming: _Coming,
    ) -> str:  # fmt: skip
        """As a scheduler does it: a token of each lane, and what room is left is the newcomer's."""
        self.engine.set_sampler(new.lane, SamplerParams())
        begun = before = time.perf_counter()
        room = STEP_ROWS - len(sessions)
        for first in range(0, len(prompt), room):
            runs = [
                (session.lane, np.array([token], np.int32))
                for session, token in zip(sessions, tokens, strict=True)
            ]
            runs.append((new.lane, prompt[first : first + room]))
            *tokens, _ = self.engine.step(runs)
            now = time.perf_counter()
            coming.inter_token_s.append(now - before)
            before = now
        coming.first_token_s.append(before - begun)
        return new.digest()

    def _blocking(
        self, sessions: Sequence[Session], new: Session, tokens: list[int], prompt: Tokens,
        coming: _Coming,
    ) -> str:  # fmt: skip
        """The others wait until all of it is fed and its first token is sampled."""
        begun = time.perf_counter()
        for start, stop in self.engine.chunks(len(prompt)):
            self.engine.prefill(new.lane, prompt[start:stop])
        self.engine.sample(new.lane, SamplerParams())
        coming.first_token_s.append(time.perf_counter() - begun)
        self._others(sessions, tokens)
        coming.inter_token_s.append(time.perf_counter() - begun)
        return new.digest()

    def _others(self, sessions: Sequence[Session], tokens: list[int]) -> list[int]:
        return self.engine.decode_together([session.lane for session in sessions], tokens)

    def _back(self, count: int) -> list[Session]:
        """The first so many sessions, at the end of their prompts."""
        for session, start in zip(self._sessions[:count], self._starts, strict=False):
            session.restore(start)
        return self._sessions[:count]


@dataclass(slots=True)
class _Coming:
    """One way to feed a newcomer's prompt."""

    inter_token_s: list[float] = field(default_factory=list)  # of the others, until it is fed
    first_token_s: list[float] = field(default_factory=list)  # of the newcomer
    digests: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Its row."""
        return {
            "steps": len(self.inter_token_s) // len(self.first_token_s),
            **_quantiles(self.inter_token_s),
            "first_token_s": median(self.first_token_s),
            "samples": {"inter_token_s": self.inter_token_s, "first_token_s": self.first_token_s},
        }


def _best_of(
    engine: SessionEngine, prompt: Tokens, repeats: int, progress: Progress
) -> dict[str, Any]:
    """Forks of one prompt that sample side by side, in turns with one of them alone."""
    one_s, all_s, fork_s, is_exact = [], [], [], True
    with engine.session() as root:
        root.prefill(prompt)
        for repeat in range(repeats):
            begun = time.perf_counter()
            with root.fork() as alone:
                said = list(alone.generate(FORK_TOKENS, temperature=1.0))
                one_s.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            forks = root.fork(FORKS)
            fork_s.append(time.perf_counter() - begun)
            stream = together(
                *(f.generate(FORK_TOKENS, temperature=1.0, seed=i) for i, f in enumerate(forks))
            )
            first = [token for index, token in stream if index == 0]
            all_s.append(time.perf_counter() - begun)
            is_exact &= first == said
            for fork in forks:
                fork.close()
            progress("best of several forks", repeat + 1, repeats)
    return {
        "forks": FORKS,
        "prompt_tokens": len(prompt),
        "tokens": FORK_TOKENS,
        "one_s": median(one_s),
        "all_s": median(all_s),
        "fork_s": median(fork_s),
        "of_one": median(all_s) / median(one_s),
        "is_exact": is_exact,
        "samples": {"one_s": one_s, "all_s": all_s, "fork_s": fork_s},
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = (float(value) for value in np.quantile(seconds, (0.5, 0.99)))
    return {"inter_token_p50_s": p50, "inter_token_p99_s": p99}
