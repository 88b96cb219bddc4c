"""One replay for lanes that decode and lanes that are given pieces of their prompts.

IS: the order of tokens in a step, and what sessions know after it. IS NOT: which lanes take part
(scheduler), or the replay (engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.lineage import Lane
from flashrt.ops.sample import SamplerParams
from flashrt.session.session import Generation, Session


@dataclass(frozen=True, slots=True)
class Feed:
    """The next piece of a session's prompt."""

    session: Session
    tokens: NDArray[np.int32]  # [n], n > 0
    then: Generation | None = None  # begins after this piece: its first token is sampled here too


def step(decoding: Sequence[Generation], feeds: Sequence[Feed] = ()) -> None:
    """The next token of each generation, and pieces of prompts, in one replay: afterwards
    next(generation) takes its token without another.

    At most `engine.most_together` sessions, and STEP_ROWS tokens in all; a session's tokens that
    are not fed yet come first among its own. A generation whose next step is not a plain decode is
    passed over.
    """
    due = [(g, t) for g in decoding if (t := g.session.fed_next(g.draft)) is not None]
    if not feeds:
        _decode(due)
        return
    runs: list[tuple[Lane, NDArray[np.int32]]] = []
    told: list[tuple[Session, SamplerParams | None]] = []
    for generation, token in due:
        session = generation.session
        runs.append((session.lane, np.array([token], np.int32)))
        told.append((session, generation.params))
    for feed in feeds:
        session, lane = feed.session, feed.session.lane
        pending = session.tokens[lane.position :]
        runs.append((lane, np.concatenate([pending, feed.tokens]).astype(np.int32)))
        told.append((session, feed.then.params if feed.then else None))
    engine = told[0][0].engine
    for session, params in told:
        if params is not None:
            engine.set_sampler(session.lane, params)
    for (session, params), token in zip(told, engine.step(runs), strict=True):
        if params is not None:
            session.fed(params, token)


def _decode(due: Sequence[tuple[Generation, int]]) -> None:
    """As `flashrt.together` does; one alone takes its own step."""
    if len(due) < 2:
        return
    engine = due[0][0].session.engine
    for generation, _ in due:
        engine.set_sampler(generation.session.lane, generation.params)
    lanes = [generation.session.lane for generation, _ in due]
    following = engine.decode_together(lanes, [token for _, token in due])
    for (generation, _), token in zip(due, following, strict=True):
        generation.session.fed(generation.params, token)
