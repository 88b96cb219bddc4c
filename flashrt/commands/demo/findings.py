"""What a demo found out: measurements, answers with the truth beside them, claims with outcomes.

IS: data. IS NOT: the acts (agent, random_ids) or how they are shown (report).

Answers of the model may be wrong: they are counted and shown. Checks are about bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that was done with a capsule, and whether the state is that of a cold prefill."""

    what: str
    position: int
    seconds: float
    moved_bytes: int
    is_equal: bool


@dataclass(frozen=True, slots=True)
class Start:
    """Time to first token of a turn after a prompt of `tokens`, cold and warm."""

    tokens: int
    cold_s: float
    restore_s: float
    restore_bytes: int
    warm_s: float
    is_equal: bool  # state after the first token, warm against cold


@dataclass(slots=True, kw_only=True)
class Findings:
    """What every demo finds out. Seconds and bytes; `*_tokens` are counts."""

    device: str
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    snapshot_s: float = 0.0
    capsule_bytes: int = 0
    turn_tokens: int = 0
    steps: list[Operation] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    tree_bytes: int = 0  # of all capsules, rows shared
    tree_bytes_alone: int = 0  # of all capsules, if each held its own rows
    # Whether logits after a KV-only restore and a turn are others; None: not asked, since a model
    # without recurrent state has nothing to lose.
    rows_only_differs: bool | None = None
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def own_checks(self) -> dict[str, bool]:
        """Claims of this demo alone, with their outcomes."""
        raise NotImplementedError

    @property
    def checks(self) -> dict[str, bool]:
        """Every claim about bits, with its outcome."""
        lost = self.rows_only_differs
        half = {} if lost is None else {"KV-only restore and a turn: other logits": lost}
        return {
            **{f"{s.what}: bits equal to a cold prefill": s.is_equal for s in self.steps},
            **{
                f"warm start after {s.tokens:,} tokens: bits equal": s.is_equal for s in self.starts
            },
            **self.own_checks,
            **half,
            "branches share the rows of their prompt": self.tree_bytes < self.tree_bytes_alone,
        }


# -- on random token ids --------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class TokenFindings(Findings):
    """Of the demo on random token ids."""

    checkpoint: str
    is_random: bool
    answer_tokens: int = 0
    rows_only_token: int | None = None  # first greedy token that differs; None: none of them
    full_agrees: bool = False  # logits and greedy tokens after the same turn on a full restore
    file_agrees: bool = False
    file_bytes: int = 0

    @property
    def own_checks(self) -> dict[str, bool]:
        """See Findings."""
        return {
            "full restore and a turn: same logits, same greedy tokens": self.full_agrees,
            "capsule file, saved and loaded: bits equal": self.file_agrees,
        }


# -- of an agent ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a branch; `truth` where there is one to compare with, else None."""

    role: str
    text: str
    truth: str | None = None


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


@dataclass(slots=True, kw_only=True)
class ChatFindings(Findings):
    """Of a demo of conversations."""

    model: str
    parameters: int
    prompt: str = ""  # how it begins
    branches: list[Branch] = field(default_factory=list)
    process: NewProcess | None = None

    @property
    def own_checks(self) -> dict[str, bool]:
        """See Findings."""
        made = {f"branch {b.name}: bits equal to a cold prefill": b.is_equal for b in self.branches}
        if (p := self.process) is not None:
            made["a new process restored the same digest"] = p.is_equal
            made["a new process gave the same answer"] = p.answer == p.answer_here
        return made


@dataclass(slots=True, kw_only=True)
class AgentFindings(ChatFindings):
    """Of the demo that plays an agent."""

    seed: int
    facts: int = 0
    hints: int = 0
    answers: list[Asked] = field(default_factory=list)
    mishap: Mishap | None = None

    @property
    def scores(self) -> dict[str, tuple[int, int, int, int]]:
        """By kind of question: right after a full, KV-only and state-only restore; asked."""
        found: dict[str, tuple[int, int, int, int]] = {}
        for a in self.answers:
            full, rows, state, asked = found.get(a.kind, (0, 0, 0, 0))
            right = (a.full == a.truth, a.rows_only == a.truth, a.state_only == a.truth)
            found[a.kind] = (full + right[0], rows + right[1], state + right[2], asked + 1)
        return found


# -- of a document --------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class DocumentFindings(ChatFindings):
    """Of the demo that reads a document."""

    document: str  # its name
    taken_back: list[Turn] = field(default_factory=list)
    dropped_tokens: int = 0  # of what was taken back
