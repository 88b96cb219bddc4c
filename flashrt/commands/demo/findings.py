"""What the demo's agent said and what was measured: every answer with the truth beside it, every
claim with the outcome of its check.

IS: data. IS NOT: the acts (demo_acts) or how they are shown (demo_report). Called by: both, demo.

Answers of the model may be wrong: they are counted and shown. Checks are about bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashrt.commands.demo.starts import Start, Step


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a branch; `truth` where there is one to compare with, else None."""

    role: str
    text: str
    truth: str | None = None

    @property
    def is_right(self) -> bool | None:
        """None where there is nothing to compare with."""
        return None if self.truth is None else self.text == self.truth


@dataclass(frozen=True, slots=True)
class Branch:
    """A conversation that went on from the prompt's capsule."""

    name: str
    how: str  # how its session came to the prompt
    turns: list[Turn]
    position: int
    own_bytes: int  # of its capsule
    is_equal: bool  # its end, against a cold prefill of its tokens


@dataclass(frozen=True, slots=True)
class Mishap:
    """A tool call that failed: left in the context, and taken back."""

    request: str
    failed: list[Turn]  # call and result
    kept: list[Turn]  # how the agent goes on with the failure in its context
    is_done_kept: bool  # whether the thing was brought then
    retried: list[Turn]  # how it goes on when it was taken back
    is_done: bool
    dropped_tokens: int  # that the conversation no longer carries


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to a state that was restored whole, and to each of its halves."""

    kind: str
    question: str
    truth: str
    full: str
    rows_only: str
    state_only: str


@dataclass(frozen=True, slots=True)
class NewProcess:
    """What another process found in the store; seconds from its first line to each event."""

    question: str
    answer: str
    answer_here: str  # this process's, from the same capsule
    saved_bytes: int
    loaded_s: float  # engine ready
    restored_s: float  # seconds of opening the store and restoring alone
    answered_s: float  # question and answer alone
    is_equal: bool  # digests


@dataclass(slots=True)
class Story:
    """Everything that the demo found out. Seconds and bytes."""

    model: str
    parameters: int
    device: str
    seed: int
    prompt: str = ""  # how it begins
    facts: int = 0
    hints: int = 0
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    snapshot_s: float = 0.0
    capsule_bytes: int = 0
    answers: list[Asked] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    mishap: Mishap | None = None
    steps: list[Step] = field(default_factory=list)
    process: NewProcess | None = None
    rows_only_differs: bool = False  # logits after a KV-only restore and a question
    starts: list[Start] = field(default_factory=list)
    turn_tokens: int = 0
    tree_bytes: int = 0  # of all capsules, rows shared
    tree_bytes_alone: int = 0  # of all capsules, if each held its own rows
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def scores(self) -> dict[str, tuple[int, int, int, int]]:
        """By kind of question: right after a full, KV-only and state-only restore; asked."""
        found: dict[str, tuple[int, int, int, int]] = {}
        for a in self.answers:
            full, rows, state, asked = found.get(a.kind, (0, 0, 0, 0))
            right = (a.full == a.truth, a.rows_only == a.truth, a.state_only == a.truth)
            found[a.kind] = (full + right[0], rows + right[1], state + right[2], asked + 1)
        return found

    @property
    def checks(self) -> dict[str, bool]:
        """Every claim about bits, with its outcome."""
        made = {f"{s.what}: bits equal to a cold prefill": s.is_equal for s in self.steps}
        made |= {
            f"branch {b.name}: bits equal to a cold prefill": b.is_equal for b in self.branches
        }
        if self.process is not None:
            p = self.process
            made["a new process restored the same digest"] = p.is_equal
            made["a new process gave the same answer"] = p.answer == p.answer_here
        made |= {
            f"warm start after {s.tokens:,} tokens: bits equal": s.is_equal for s in self.starts
        }
        made["KV-only restore and a question: other logits"] = self.rows_only_differs
        made["branches share the rows of their prompt"] = self.tree_bytes < self.tree_bytes_alone
        return made
