"""The demo on token ids: for any checkpoint, with or without a tokenizer, at any length.

IS: a prompt of random ids, prefilled, snapshot, branched, rolled back, each state compared. IS NOT:
the agent of the bundled model (agent).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashrt.capsule.capsule import Capsule
from flashrt.commands.demo.findings import Operation, TokenFindings
from flashrt.commands.demo.report import draw
from flashrt.commands.demo.starts import State, measure_starts, state_of
from flashrt.commands.timing import Tokens, prefill, synthetic_tokens, timed
from flashrt.core.backend import Progress
from flashrt.core.region import Role
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session

LENGTHS = (512, 2048, 8192)  # prompts of the comparison cold / warm; the last is the demo's
TURN, ANSWER = 32, 48  # tokens of a tool result; of the model's answer
ROLLBACK = 17  # how far into the turn the rollback goes: no boundary was ever there
BUDGET_S = 6.0  # the prompt is halved until its prefill should fit


class TokenDemo:
    """An engine with three lanes. `main` is the agent's session. Sessions called `cold` never see a
    capsule: what they compute is the truth that all else is compared with.
    """

    def __init__(self, engine: SessionEngine, found: TokenFindings, progress: Progress) -> None:
        self.engine = engine
        self.found = found
        self.progress = progress
        self.random = np.random.default_rng(0)
        self.main = engine.session()
        self.pending: list[tuple[str, State, float, int]] = []  # steps, before they are compared

    def play(self, longest: int, *, is_fixed: bool, out: Path) -> None:
        """All acts, in order."""
        found = self.found
        n_prompt = longest if is_fixed else self._affordable(longest)
        prompt, turns = self._tokens(n_prompt), [self._tokens(TURN) for _ in range(3)]
        found.prompt_tokens, found.turn_tokens, found.answer_tokens = n_prompt, TURN, ANSWER
        found.prefill_s = prefill(self.engine, self.main, prompt, self.progress, "prompt")
        root, found.snapshot_s, _ = timed(self.engine, lambda: self.main.snapshot("prompt"))
        found.capsule_bytes = root.nbytes
        branches = self._branch(root, turns)
        self._file(branches[0])
        draw(found, self.engine, [root, *branches], {"main": branches[0]}, out)
        self._roll_back(n_prompt + ROLLBACK)
        after_turn = self._ask_the_witness(n_prompt, branches[0].tokens)
        greedy = self._rows_only(root, branches[1], turns[0], after_turn)
        for capsule in branches:
            capsule.drop()
        self.main.restore(root)
        found.full_agrees &= self._cold_answer(prompt, turns[0]) == greedy
        lengths = [*(n for n in LENGTHS if n < n_prompt), n_prompt]
        self.main.close()
        found.starts = measure_starts(self.engine, prompt, lengths, turns[0], self.progress)

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
            self.found.file_bytes = path.stat().st_size
            loaded = self.engine.load_capsule(path)
        with self.engine.session() as other:
            other.restore(loaded)
            self.found.file_agrees = state_of(other) == state_of(self.main)
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
            self.found.steps.append(Operation(what, state.position, seconds, moved, is_equal))
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
        self.found.rows_only_token = next(differing, None)
        if _has_recurrent_state(self.engine):
            self.found.rows_only_differs = wrong.logits != truth.logits
        self.found.full_agrees = right == truth
        return greedy

    def _cold_answer(self, prompt: Tokens, turn: Tokens) -> list[int]:
        """Greedy tokens after prompt and turn, without a capsule."""
        with self.engine.session() as cold:
            prefill(self.engine, cold, prompt, self.progress, "cold answer")
            cold.prefill(turn)
            return list(cold.generate(ANSWER))

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


def _has_recurrent_state(engine: SessionEngine) -> bool:
    """Whether the next logits depend on more than rows, and the hidden state of the last one."""
    return any(
        r.role is Role.FIXED and r.is_digested and r.name != "last_hidden"
        for r in engine.model.lane_regions
    )
