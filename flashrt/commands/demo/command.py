"""`flashrt demo`: an agent's session with capsules, its answers and its bits checked on the way.

IS: the choice of model and of what is played. IS NOT: the acts: agent plays an agent in small text
worlds, random_ids any checkpoint on random token ids.

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
from flashrt.commands.demo import agent, random_ids, report
from flashrt.commands.demo.findings import AgentFindings, TokenFindings
from flashrt.commands.plan import lay_out, model_of
from flashrt.commands.timing import timed
from flashrt.session.engine import SessionEngine
from flashrt.text.template import ChatError, chat_template_of
from flashrt.text.tokenizer import tokenizer_of
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.weights.checkpoint import open_checkpoint

RANDOM_SHAPE = "mini"
TRIAL = 256  # tokens, to see how fast a model reads here


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line says. `tokens`: of the prompt of random ids, which it asks for."""

    checkpoint: Path | None
    is_random: bool
    tokens: int | None
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
    found: AgentFindings | TokenFindings
    if options.is_random or options.tokens is not None or not _can_talk(path):
        found = _random_ids(path, options)
    else:
        found = _agent(path, options)
    found.seconds = time.perf_counter() - started
    if options.as_json:
        scores = {"scores": found.scores} if isinstance(found, AgentFindings) else {}
        console.print_json({**asdict(found), **scores, "checks": found.checks})
    else:
        report.show(found)
    return 0 if all(found.checks.values()) else 1


def _can_talk(path: Path) -> bool:
    """Whether it has a tokenizer, and a chat template for conversations like the agent's."""
    template = chat_template_of(path)
    if template is None or tokenizer_of(path) is None:
        return False
    roles = ("system", "user", "assistant", "tool")
    said = [{"role": role, "content": "a"} for role in roles]
    try:
        for n in range(1, len(said) + 1):
            template.render(said[:n], add_generation_prompt=False)
    except ChatError:  # some templates want a question in every prompt
        return False
    return True


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
    lane = lay_out(model_of(open_checkpoint(path), options), options).arena.lanes[0]
    return replace(options, pool_bytes=3 * lane.rows.nbytes + 24 * lane.fixed.nbytes)
