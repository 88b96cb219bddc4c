"""Replay: write down what a session was told, and run it again to the same bits.

IS: a recorder around a session, the journal file, and the check of tokens and digests at every
boundary. IS NOT: a log for people. Called by: users, cli.

A journal is JSON lines: a head (model, position and digest at the start), then one line per call:
prefill, generate (parameters, what was yielded, how it ended) or rollback, each with the position
and the digest after it. A line is written when its call is over; a last line that a crash cut short
is left out of the replay, and the report says so.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import SessionError
from flashrt.capsule.capsule import Capsule
from flashrt.session.session import Session, as_tokens

if TYPE_CHECKING:
    from flashrt.session.engine import SessionEngine

FORMAT = "flashrt-journal-1"
OPTIONS = frozenset(inspect.signature(Session.generate).parameters) - {"self", "max_tokens"}
LIMIT, STOPPED, INTERRUPTED = "limit", "stop", "interrupt"


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a journal."""

    fingerprint: str
    checkpoint: str
    device: str
    max_positions: int
    position: int
    digest: str


@dataclass(frozen=True, slots=True)
class Step:
    """One call, from line `line` of a journal."""

    line: int
    do: str
    fields: Mapping[str, Any]
    position: int
    digest: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a replay found; `mismatch` is None when every boundary agreed."""

    steps: int
    tokens: int
    boundaries: int
    mismatch: str | None
    is_cut_short: bool  # the journal's last line is incomplete


class Recorder:
    """A session whose calls go into a journal. Use it in place of the session."""

    def __init__(
        self, engine: SessionEngine, session: Session, path: str | os.PathLike[str]
    ) -> None:
        """Starts the journal at the session's present state. Raises SessionError when `path` exists
        or cannot be written.
        """
        self.session = session
        head = Head(
            fingerprint=engine.fingerprint,
            checkpoint=str(engine.checkpoint.path.absolute()),
            device=engine.device,
            max_positions=engine.max_positions,
            position=session.position,
            digest=session.digest(),
        )
        try:
            self._file = Path(path).open("x", encoding="utf-8")  # noqa: SIM115 - see close
        except OSError as error:
            raise SessionError(f"cannot start a journal at {path}: {error}") from error
        self._write({"format": FORMAT, **asdict(head)})

    def prefill(self, tokens: Iterable[int] | NDArray[np.integer]) -> None:
        """See Session.prefill."""
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        self.session.prefill(array)
        self._step("prefill", tokens=array.tolist())

    def generate(self, max_tokens: int, **options: Any) -> Iterator[int]:
        """See Session.generate for the options, by name; the line is written when the iterator
        ends or is closed.
        """
        plain = {**options, "stop": sorted(int(token) for token in options.get("stop", ()))}
        if plain.get("logit_bias") is not None:
            plain["logit_bias"] = sorted(plain["logit_bias"].items())
        stream = self.session.generate(max_tokens, **{**options, "stop": plain["stop"]})
        return self._recorded(stream, max_tokens, plain)

    def rollback(self, position: int) -> None:
        """See Session.rollback."""
        self.session.rollback(position)
        self._step("rollback", to=position)

    def close(self) -> None:
        """Close the journal; the session stays open."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _recorded(
        self, stream: Iterator[int], max_tokens: int, options: Mapping[str, object]
    ) -> Iterator[int]:
        out: list[int] = []
        end = INTERRUPTED
        try:
            for token in stream:
                out.append(token)
                yield token
            end = LIMIT if len(out) == max_tokens else STOPPED
        finally:
            self._step("generate", max_tokens=max_tokens, options=options, tokens=out, end=end)

    def _step(self, do: str, **fields: object) -> None:
        position, digest = self.session.position, self.session.digest()
        self._write({"do": do, **fields, "position": position, "digest": digest})

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise SessionError(f"cannot write to journal {self._file.name}: {error}") from error


def read_journal(path: str | os.PathLike[str]) -> tuple[Head, list[Step], bool]:
    """The head, the steps, and whether the last line is cut short. Raises SessionError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SessionError(f"cannot read journal {path}: {error}") from error
    is_cut_short = lines.pop() != ""
    if not lines:
        raise SessionError(f"{path} is not a journal: it has no whole line")
    try:
        first = json.loads(lines[0])
        if first.pop("format") != FORMAT:
            raise ValueError(f"this version reads {FORMAT!r}")
        head = Head(**first)
        steps = [_step(number, json.loads(text)) for number, text in enumerate(lines[1:], 2)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SessionError(f"{path} is not a journal that can be replayed: {error!r}") from error
    return head, steps, is_cut_short


def replay(engine: SessionEngine, capsule: Capsule | None, path: str | os.PathLike[str]) -> Report:
    """Run a journal again, from a capsule or from nothing, and compare at every boundary.

    Stops at the first difference. Raises SessionError for a journal of another model or one that
    does not start where the capsule is.
    """
    head, steps, is_cut_short = read_journal(path)
    if head.fingerprint != engine.fingerprint:
        raise SessionError(
            f"{path}: recorded with fingerprint {head.fingerprint}, the engine's is "
            f"{engine.fingerprint}"
        )
    with engine.session() as session:
        if capsule is not None:
            session.restore(capsule)
        if (session.position, session.digest()) != (head.position, head.digest):
            raise SessionError(
                f"{path}: starts at position {head.position} with digest {head.digest}, the "
                f"capsule is at {session.position} with {session.digest()}"
            )
        tokens = 0
        for done, step in enumerate(steps):
            mismatch = _run(session, step, engine.vocab_size)
            tokens += len(step.fields.get("tokens", ()))
            if mismatch is not None:
                text = f"{path}, line {step.line} ({step.do}): {mismatch}"
                return Report(done, tokens, done, text, is_cut_short)
    return Report(len(steps), tokens, len(steps) + 1, None, is_cut_short)


def _run(session: Session, step: Step, vocab_size: int) -> str | None:
    """One step again; what differs, or None."""
    fields = step.fields
    if step.do == "prefill":
        session.prefill(as_tokens(fields["tokens"], vocab_size))
    elif step.do == "rollback":
        session.rollback(fields["to"])
    else:
        options = dict(fields["options"])
        if options.get("logit_bias") is not None:
            options["logit_bias"] = dict(options["logit_bias"])
        stream = session.generate(fields["max_tokens"], **options)
        expected = fields["tokens"]
        for i, token in enumerate(expected):
            found = next(stream, None)
            if found != token:
                return f"token {i} is {found}, recorded {token}"
        if fields["end"] != INTERRUPTED and (more := next(stream, None)) is not None:
            return f"went on with token {more}, recorded the end after {len(expected)}"
    if session.position != step.position:
        return f"position {session.position}, recorded {step.position}"
    if (digest := session.digest()) != step.digest:
        return f"digest {digest} at position {step.position}, recorded {step.digest}"
    return None


def _step(line: int, fields: dict[str, Any]) -> Step:
    wanted: dict[str, set[str]] = {
        "prefill": {"tokens"},
        "rollback": {"to"},
        "generate": {"max_tokens", "options", "tokens", "end"},
    }
    do, position, digest = fields.pop("do"), fields.pop("position"), fields.pop("digest")
    if set(fields) != wanted[do]:
        raise ValueError(f"line {line}: {do} has {sorted(fields)}, expected {sorted(wanted[do])}")
    if "tokens" in fields and not isinstance(fields["tokens"], list):
        raise ValueError(f"line {line}: tokens is a list of ids")
    if do == "generate":
        if not isinstance(fields["max_tokens"], int):
            raise ValueError(f"line {line}: max_tokens is {fields['max_tokens']!r}")
        if unknown := set(fields["options"]) - OPTIONS:
            raise ValueError(f"line {line}: unknown options {sorted(unknown)}")
    return Step(line, do, fields, int(position), str(digest))
