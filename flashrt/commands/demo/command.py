"""`flashrt demo`: an agent's session with capsules, its answers and its bits checked on the way.

IS: the choice of model and story. IS NOT: the acts: agent plays an agent in small text worlds,
random_ids any checkpoint on random token ids. Called by: cli.

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
from flashrt.commands.demo import agent, bits_report, random_ids, report
from flashrt.commands.demo.bits_story import Story as BitsStory
from flashrt.commands.demo.findings import Story
from flashrt.commands.plan import lay_out, model_of
from flashrt.commands.timing import timed
from flashrt.load import SessionEngine
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
    story: Story | BitsStory
    if options.is_random or options.tokens is not None or not _can_talk(path):
        story = _bits(path, options)
    else:
        story = _agent(path, options)
    story.seconds = time.perf_counter() - started
    if options.as_json:
        scores = {"scores": story.scores} if isinstance(story, Story) else {}
        console.print_json({**asdict(story), **scores, "checks": story.checks})
    elif isinstance(story, Story):
        report.show(story)
    else:
        bits_report.show(story)
    return 0 if all(story.checks.values()) else 1


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


def _agent(path: Path, options: DemoOptions) -> Story:
    engine_options = _with_room(path, options.engine, agent.Sizes().lengths[-1] + 256)
    engine = open_engine(path, engine_options)
    parameters = sum(math.prod(t.shape) for t in engine.checkpoint.tensors.values())
    story = Story(path.name, parameters, engine.device, options.seed)
    is_fast = _prefill_tokens_per_s(engine) >= agent.FAST_TOKENS_PER_S
    sizes = agent.Sizes() if is_fast else agent.SMALL
    with console.progress_bars() as progress:
        agent.Stage(engine, engine_options, sizes, story, progress).play(options.out)
    engine.close()
    return story


def _prefill_tokens_per_s(engine: SessionEngine) -> float:
    trial = np.arange(TRIAL) % engine.vocab_size
    with engine.session() as session:
        session.prefill(trial)  # the first touch of memory is not typical
        session.rollback(0)
        _, seconds, _ = timed(engine, lambda: session.prefill(trial))
    return TRIAL / seconds


def _bits(path: Path, options: DemoOptions) -> BitsStory:
    longest = max(options.tokens or random_ids.LENGTHS[-1], 2 * random_ids.TURN)
    room = longest + random_ids.TURN + random_ids.ANSWER + 1
    engine = open_engine(path, _with_room(path, options.engine, room))
    story = BitsStory(str(path), options.is_random, engine.device)
    with console.progress_bars() as progress:
        stage = random_ids.Stage(engine, story, progress)
        stage.play(longest, is_fixed=options.tokens is not None, out=options.out)
    engine.close()
    return story


def _random_checkpoint() -> Path:
    with console.progress_bars() as progress:
        path, was_made = cached_random_checkpoint(RANDOM_SHAPE, progress)
    console.screen(is_error=True).print(
        f"[yellow]This is a random model of shape {RANDOM_SHAPE!r}, "
        f"{'made just now' if was_made else 'from the cache'}, in the real format but untrained: "
        f"its tokens mean nothing, its speed and its bits do.[/]"
    )
    return path


def _with_room(path: Path, options: EngineOptions, max_positions: int) -> EngineOptions:
    """Three lanes; a pool for two prompts (one comes from a file), branches and waypoints."""
    options = replace(options, max_positions=max_positions, lanes=3)
    lane = lay_out(model_of(open_checkpoint(path), options), options).arena.lanes[0]
    return replace(options, pool_bytes=3 * lane.rows.nbytes + 24 * lane.fixed.nbytes)
