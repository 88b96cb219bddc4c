"""What the demo on token ids found out: measurements, every claim with the outcome of its check.

IS: data. IS NOT: the acts (demo_bits) or the table (demo_bits_report). Called by: both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashrt.commands.demo.starts import Start, Step


@dataclass(slots=True)
class Story:
    """Everything that the demo found out. Seconds and bytes; `*_tokens` are counts."""

    checkpoint: str
    is_random: bool
    device: str
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    snapshot_s: float = 0.0
    capsule_bytes: int = 0
    turn_tokens: int = 0
    answer_tokens: int = 0
    steps: list[Step] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    tree_bytes: int = 0  # of all capsules, rows shared
    tree_bytes_alone: int = 0  # of all capsules, if each held its own rows
    rows_only_differs: bool = False  # logits after a turn on a KV-only restore, against cold
    rows_only_token: int | None = None  # first greedy token that differs; None: none of them
    full_agrees: bool = False  # logits and greedy tokens after the same turn on a full restore
    file_agrees: bool = False
    file_bytes: int = 0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)

    @property
    def checks(self) -> dict[str, bool]:
        """Every claim, with its outcome."""
        return {
            **{f"{s.what}: bits equal to a cold prefill": s.is_equal for s in self.steps},
            **{
                f"warm start after {s.tokens:,} tokens: bits equal": s.is_equal for s in self.starts
            },
            "full restore and a turn: same logits, same greedy tokens": self.full_agrees,
            "KV-only restore and a turn: other logits": self.rows_only_differs,
            "capsule file, saved and loaded: bits equal": self.file_agrees,
            "branches share the rows of their prompt": self.tree_bytes < self.tree_bytes_alone,
        }
