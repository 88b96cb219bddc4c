"""`flashrt demo`: an agent's session with capsules, its answers and its bits checked on the way.

IS: the choice of model and of what is played. IS NOT: the acts: agent plays an agent in small text
worlds, which the bundled model knows; document asks any other model that can talk about a text;
random_ids takes any checkpoint, on random token ids.

A check that fails makes exit code 1. A wrong answer does not: models err, and it is shown.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, cached_random_checkpoint, open_engine
from flashrt.commands.demo import agent, document, random_ids, report
from flashrt.commands.demo.findings import AgentFindings, DocumentFindings, TokenFindings
from flashrt.commands.plan import lay_out, model_of
from flashrt.commands.timing import timed
from flashrt.load import text_of
from flashrt.session.engine import SessionEngine
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.weights.opening import open_weights

RANDOM_SHAPE = "mini"
DOCUMENT_POSITIONS = 4096
TRIAL = 256  # tokens, to see how fast a model reads here


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line says. `tokens`: of the prompt of random ids, which it asks for."""

    checkpoint: Path | None
    is_random: bool
    tokens: int | None
    document: Path | None
    seed: int
    engine: EngineOptions
    out: Path
    as_json: bool


def demo(options: DemoOptions) -> int:
    """The command. Returns 1 if a check failed."""
    started = time.perf_counter()
    path = options.checkpoint or (
        _random_checkpoint() if options.is_random else bundled_checkpoint()
    )
    found: AgentFindings | DocumentFindings | TokenFindings
    if options.is_random or options.tokens is not None or not _can_talk(path):
        found = _random_ids(path, options)
    elif path == bundled_checkpoint():
        found = _agent(path, options)
    else:
        found = _document(path, options)
    found.seconds = time.perf_counter() - started
    if options.as_json:
        scores = {"scores": found.scores} if isinstance(found, AgentFindings) else {}
        console.print_json({**asdict(found), **scores, "checks": found.checks})
    else:
        report.show(found)
    return 0 if all(found.checks.values()) else 1


def _can_talk(path: Path) -> bool:
    """Whether it has a tokenizer and a chat template."""
    return text_of(open_weights(path)).can_talk


def _agent(path: Path, options: DemoOptions) -> AgentFindings:
    engine_options = _with_room(path, options.engine, agent.Sizes().lengths[-1] + 256)
    engine = open_engine(path, engine_options)
    parameters = sum(math.prod(t.shape) for t in engine.checkpoint.tensors.values())
    found = AgentFindings(
        device=engine.device, model=path.name, parameters=parameters, seed=options.seed
    )
    is_fast = _prefill_tokens_per_s(engine) >= agent.FAST_TOKENS_PER_S
    sizes = agent.Sizes() if is_fast else agent.SMALL
    with console.progress_bars() as progress:
        agent.AgentDemo(engine, engine_options, sizes, found, progress).play(options.out)
    engine.close()
    return found


def _document(path: Path, options: DemoOptions) -> DocumentFindings:
    name, text = document.read_document(options.document)
    engine_options = _with_room(path, options.engine, DOCUMENT_POSITIONS)
    engine = open_engine(path, engine_options)
    parameters = sum(math.prod(t.shape) for t in engine.checkpoint.tensors.values())
    found = DocumentFindings(
        device=engine.device, model=path.name, parameters=parameters, document=name
    )
    with console.progress_bars() as progress:
        document.DocumentDemo(engine, engine_options, found, progress).play(text, options.out)
    engine.close()
    return found


def _prefill_tokens_per_s(engine: SessionEngine) -> float:
    trial = np.arange(TRIAL) % engine.vocab_size
    with engine.session() as session:
        session.prefill(trial)  # the first touch of memory is not typical
        session.rollback(0)
        _, seconds, _ = timed(engine, lambda: session.prefill(trial))
    return TRIAL / seconds


def _random_ids(path: Path, options: DemoOptions) -> TokenFindings:
    longest = max(options.tokens or random_ids.LENGTHS[-1], 2 * random_ids.TURN)
    room = longest + random_ids.TURN + random_ids.ANSWER + 1
    engine = open_engine(path, _with_room(path, options.engine, room))
    found = TokenFindings(device=engine.device, checkpoint=str(path), is_random=options.is_random)
    with console.progress_bars() as progress:
        played = random_ids.TokenDemo(engine, found, progress)
        played.play(longest, is_fixed=options.tokens is not None, out=options.out)
    engine.close()
    return found


def _random_checkpoint() -> Path:
    with console.progress_bars() as progress:
        path, was_made = cached_random_checkpoint(RANDOM_SHAPE, progress)
    console.screen(is_error=True).print(
        f"This is a random model of shape {RANDOM_SHAPE!r}, "
        f"{'made just now' if was_made else 'from the cache'}, in the real format but untrained: "
        "its tokens mean nothing, its speed and its bits do.",
        style="yellow",
    )
    return path


def _with_room(path: Path, options: EngineOptions, max_positions: int) -> EngineOptions:
    """Three lanes; a pool for two prompts (one comes from a file), branches and waypoints."""
    options = replace(options, max_positions=max_positions, lanes=3)
    lane = lay_out(model_of(open_weights(path), options), options).arena.lanes[0]
    return replace(options, pool_bytes=3 * lane.rows.nbytes + 24 * lane.fixed.nbytes)
