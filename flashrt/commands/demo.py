"""`flashrt demo`: an agent's session, prefilled, snapshot, branched, rolled back, and checked.

IS: a story in acts with measurements and checks, told as a table and two pictures. IS NOT: a
benchmark (bench). Called by: cli.

A claim is printed with the outcome of its check beside it; one that fails makes exit code 1.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, cached_random_checkpoint, open_engine
from flashrt.commands.demo_report import show
from flashrt.commands.demo_story import Start, State, Step, Story, state_of
from flashrt.commands.plan import lay_out, model_of
from flashrt.commands.timing import Tokens, prefill, synthetic_tokens, timed
from flashrt.core.backend import Progress
from flashrt.core.capsule import Capsule
from flashrt.session.load import SessionEngine
from flashrt.session.session import Session
from flashrt.view.arena_map import arena_map, widest
from flashrt.view.session_tree import bytes_alone, session_tree
from flashrt.view.svg import save_svg
from flashrt.weights.checkpoint import open_checkpoint

SHAPE = "mini"
LENGTHS = (512, 2048, 8192)  # prompts of the comparison cold / warm; the last is the story's
TURN, ANSWER = 32, 48  # tokens of a tool result; of the model's answer
ROLLBACK = 17  # how far into the turn the rollback goes: no boundary was ever there
BUDGET_S = 6.0  # the prompt is halved until its prefill should fit
REPEATS = 3  # of a warm start; the median counts


def demo(
    checkpoint: Path | None, tokens: int | None, options: EngineOptions, out: Path, as_json: bool
) -> int:
    """The command. Returns 1 if a check failed."""
    started = time.perf_counter()
    path = checkpoint or _random_checkpoint()
    longest = max(tokens or LENGTHS[-1], 2 * TURN)
    engine = open_engine(path, _with_room(path, options, longest + TURN + ANSWER + 1))
    story = Story(str(path), checkpoint is None, engine.device)
    with console.progress_bars() as progress:
        _Stage(engine, story, progress).play(longest, is_fixed=tokens is not None, out=out)
    engine.close()
    story.seconds = time.perf_counter() - started
    if as_json:
        console.print_json({**asdict(story), "checks": story.checks})
    else:
        show(story)
    return 0 if all(story.checks.values()) else 1


def _random_checkpoint() -> Path:
    with console.progress_bars() as progress:
        path, was_made = cached_random_checkpoint(SHAPE, progress)
    console.screen(is_error=True).print(
        f"[yellow]No checkpoint given: this is a random model of shape {SHAPE!r}, "
        f"{'made just now' if was_made else 'from the cache'}, in the real format but untrained: "
        f"its tokens mean nothing, its speed and its bits do.[/]"
    )
    return path


def _with_room(path: Path, options: EngineOptions, max_positions: int) -> EngineOptions:
    """Three lanes; a pool for two prompts (one comes from a file), branches and waypoints."""
    options = replace(options, max_positions=max_positions, lanes=3)
    lane = lay_out(model_of(open_checkpoint(path), options), options).arena.lanes[0]
    return replace(options, pool_bytes=3 * lane.rows.nbytes + 24 * lane.fixed.nbytes)


class _Stage:
    """An engine with three lanes. `main` is the agent's session. Sessions called `cold` never see a
    capsule: what they compute is the truth that all else is compared with.
    """

    def __init__(self, engine: SessionEngine, story: Story, progress: Progress) -> None:
        self.engine = engine
        self.story = story
        self.progress = progress
        self.random = np.random.default_rng(0)
        self.main = engine.session()
        self.pending: list[tuple[str, State, float, int]] = []  # steps, before they are compared

    def play(self, longest: int, *, is_fixed: bool, out: Path) -> None:
        """All acts, in order."""
        story = self.story
        n_prompt = longest if is_fixed else self._affordable(longest)
        prompt, turns = self._tokens(n_prompt), [self._tokens(TURN) for _ in range(3)]
        story.prompt_tokens, story.turn_tokens, story.answer_tokens = n_prompt, TURN, ANSWER
        story.prefill_s = prefill(self.engine, self.main, prompt, self.progress, "prompt")
        root, story.snapshot_s, _ = timed(self.engine, lambda: self.main.snapshot("prompt"))
        story.capsule_bytes = root.nbytes
        branches = self._branch(root, turns)
        self._file(branches[0])
        tree = [root, *branches]
        story.tree_bytes = sum(c.nbytes for c in tree)
        story.tree_bytes_alone = sum(bytes_alone(c) for c in tree)
        self._draw(out, tree, branches[0])
        self._roll_back(n_prompt + ROLLBACK)
        after_turn = self._ask_the_witness(n_prompt, branches[0].tokens)
        greedy = self._rows_only(root, branches[1], turns[0], after_turn)
        for capsule in branches:
            capsule.drop()
        shorter = [n for n in LENGTHS if n < n_prompt]
        for length in [*shorter, n_prompt]:
            answer = self._start(root, prompt[:length], turns[0])
        self.story.full_agrees &= answer == greedy

    # -- acts -----------------------------------------------------------------------------------

    def _branch(self, root: Capsule, turns: list[Tokens]) -> list[Capsule]:
        """One branch straight on, one after a restore, one in a fork; then back to the first."""
        main = self.main
        first = self._answer(main, turns[0], "branch A")
        self._step("restore the prompt", main, lambda: main.restore(root))
        second = self._answer(main, turns[1], "branch B")
        other, seconds, moved = timed(self.engine, lambda: main.fork(root))
        self.pending.append(("fork the prompt to another lane", state_of(other), seconds, moved))
        third = self._answer(other, turns[2], "branch C")
        other.close()
        self._step("switch to branch A", main, lambda: main.restore(first))
        return [first, second, third]

    def _roll_back(self, position: int) -> None:
        what = f"roll back {self.main.position - position} tokens"
        self._step(what, self.main, lambda: self.main.rollback(position))

    def _file(self, capsule: Capsule) -> None:
        """Through a file and back, in another lane."""
        with tempfile.TemporaryDirectory(prefix="flashrt-demo-") as folder:
            path = Path(folder) / "branch-a.capsule"
            capsule.save(path)
            self.story.file_bytes = path.stat().st_size
            loaded = self.engine.load_capsule(path)
        with self.engine.session() as other:
            other.restore(loaded)
            self.story.file_agrees = state_of(other) == state_of(self.main)
        loaded.drop()

    def _ask_the_witness(self, n_prompt: int, tokens: Tokens) -> State:
        """A cold prefill of branch A, stopped wherever a step ended, and the steps compared.
        Returns the state after the turn.
        """
        truth: dict[int, State] = {}
        with self.engine.session() as cold:
            prefill(self.engine, cold, tokens[:n_prompt], self.progress, "cold prefill, to compare")
            stops = {state.position for _, state, _, _ in self.pending} | {n_prompt + TURN}
            for stop in sorted(stops):
                cold.prefill(tokens[cold.position : stop])
                truth[stop] = state_of(cold)
        for what, state, seconds, moved in self.pending:
            is_equal = state == truth[state.position]
            self.story.steps.append(Step(what, state.position, seconds, moved, is_equal))
        return truth[n_prompt + TURN]

    def _rows_only(
        self, root: Capsule, elsewhere: Capsule, turn: Tokens, truth: State
    ) -> list[int]:
        """The ablation: rows without the fixed band, then the same turn, then greedy decode."""
        found: list[tuple[State, list[int]]] = []
        for bands in (("rows",), ("fixed", "rows")):
            self.main.restore(elsewhere)
            self.main.restore(root, bands=bands)
            self.main.prefill(turn)
            found.append((state_of(self.main), list(self.main.generate(ANSWER))))
        (wrong, other), (right, greedy) = found
        differing = (i for i, (a, b) in enumerate(zip(other, greedy, strict=True)) if a != b)
        self.story.rows_only_token = next(differing, None)
        self.story.rows_only_differs = wrong.logits != truth.logits
        self.story.full_agrees = right == truth
        return greedy

    def _start(self, root: Capsule, prompt: Tokens, turn: Tokens) -> list[int]:
        """Time to first token at one length, cold and warm. Returns the greedy answer, cold."""
        with self.engine.session() as cold:
            started = time.perf_counter()
            prefill(self.engine, cold, prompt, self.progress, f"cold start at {len(prompt):,}")
            cold.prefill(turn)
            answer = list(cold.generate(1))
            cold_s = time.perf_counter() - started
            truth = state_of(cold)
            if len(prompt) == root.position:
                answer += list(cold.generate(ANSWER - 1))
        self.main.restore(root)
        self.main.rollback(len(prompt))
        capsule = root if len(prompt) == root.position else self.main.snapshot()
        runs = [self._warm(capsule, turn) for _ in range(REPEATS)]
        self.story.starts.append(
            Start(
                tokens=len(prompt),
                cold_s=cold_s,
                restore_s=statistics.median(restore_s for restore_s, _, _, _ in runs),
                restore_bytes=runs[0][2],
                warm_s=statistics.median(warm_s for _, warm_s, _, _ in runs),
                is_equal=all(state == truth for _, _, _, state in runs),
            )
        )
        if capsule is not root:
            capsule.drop()
        return answer

    def _warm(self, capsule: Capsule, turn: Tokens) -> tuple[float, float, int, State]:
        """A restore into a lane that holds something else: all bytes move. Then turn and token."""
        with self.engine.session() as other:
            other.prefill(turn[::-1])
            started = time.perf_counter()
            _, restore_s, moved = timed(self.engine, lambda: other.restore(capsule))
            other.prefill(turn)
            next(other.generate(1))
            warm_s = time.perf_counter() - started
            return restore_s, warm_s, moved, state_of(other)

    def _draw(self, out: Path, tree: list[Capsule], here: Capsule) -> None:
        engine, story = self.engine, self.story
        tapes = [engine.model.record(phase, rows) for phase, rows in engine.model.phases]
        title = f"Arena: {len(engine.lanes)} lanes of {engine.max_positions:,} positions"
        pictures = {
            "arena.svg": arena_map(engine.arena.plan, widest(tapes), title),
            "session-tree.svg": session_tree(tree, {"main": here}),
        }
        story.files = [str(save_svg(svg, out / name)) for name, svg in pictures.items()]

    # -- tools ----------------------------------------------------------------------------------

    def _tokens(self, count: int) -> Tokens:
        return synthetic_tokens(self.random, self.engine.vocab_size, count)

    def _affordable(self, longest: int) -> int:
        """A length whose prefill should fit the budget on this machine, by a short trial."""
        trial = self._tokens(min(256, longest))
        self.main.prefill(trial)  # the first touch of memory is not typical
        self.main.rollback(0)
        seconds = prefill(self.engine, self.main, trial, self.progress, "trial")
        self.main.rollback(0)
        while longest > 1024 and seconds * longest / len(trial) > BUDGET_S:
            longest //= 2
        return longest

    def _answer(self, session: Session, turn: Tokens, name: str) -> Capsule:
        session.prefill(turn)
        for _ in session.generate(ANSWER, temperature=0.8, seed=1):
            pass
        return session.snapshot(name)

    def _step(self, what: str, session: Session, act: Callable[[], None]) -> None:
        _, seconds, moved = timed(self.engine, act)
        self.pending.append((what, state_of(session), seconds, moved))
