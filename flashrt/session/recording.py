"""Recordings of sessions: each call of a session written down, and run again to the same bits.

IS: a recorder around a session, its file, and the check of tokens and digests at every boundary.
IS NOT: a log for people, nor a recording of a control loop (robot.recording).

A recording is JSON lines: a head (model, position and digest at the start), then one line per call:
prefill, generate (parameters, what was yielded, how it ended) or rollback, each with the position
and the digest after it. A line is written when its call is over; a last line that a crash cut short
is left out of the replay, and the report says so.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import SessionError
from flashrt.base.messages import listed
from flashrt.capsule.capsule import Capsule
from flashrt.session.engine import SessionEngine
from flashrt.session.session import EndReason, Generation, Session, as_tokens

FORMAT = "flashrt-journal-1"
OPTIONS = frozenset(inspect.signature(Session.generate).parameters) - {"self", "max_tokens"}
LIMIT, STOPPED, INTERRUPTED = "limit", "stop", "interrupt"


@dataclass(frozen=True, slots=True)
class RecordingHead:
    """The first line of a recording."""

    fingerprint: str
    checkpoint: str
    device: str
    max_positions: int
    position: int
    digest: str


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call, from line `line` of a recording."""

    line: int
    do: str
    fields: Mapping[str, Any]
    position: int
    digest: str


@dataclass(frozen=True, slots=True)
class SessionReplay:
    """What a replay found; `mismatch` is None when every boundary agreed."""

    steps: int
    tokens: int
    boundaries: int
    mismatch: str | None
    is_cut_short: bool  # the recording's last line is incomplete


class SessionRecorder:
    """A session whose calls go into a recording. Use it in place of the session."""

    def __init__(
        self, engine: SessionEngine, session: Session, path: str | os.PathLike[str]
    ) -> None:
        """Starts the recording at the session's present state. Raises SessionError when `path`
        exists or cannot be written.
        """
        self.session = session
        head = RecordingHead(
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
            raise SessionError(f"cannot start a recording at {path}: {error}") from error
        self._write({"format": FORMAT, **asdict(head)})

    def prefill(self, tokens: Iterable[int] | NDArray[np.integer]) -> None:
        """See Session.prefill."""
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        self.session.prefill(array)
        self._call("prefill", tokens=array.tolist())

    def generate(self, max_tokens: int, **options: Any) -> Generation:
        """See Session.generate for the options, by name; the line is written when the iterator
        ends or is closed.
        """
        stop = list(options.get("stop", ()))
        stream = self.session.generate(max_tokens, **{**options, "stop": stop})
        plain = {**options, "stop": sorted(int(token) for token in stop)}
        if plain.get("logit_bias") is not None:
            plain["logit_bias"] = sorted(plain["logit_bias"].items())
        return Generation(
            self.session.turn, self.session.lock, self._recorded(stream, max_tokens, plain)
        )

    def rollback(self, position: int) -> None:
        """See Session.rollback."""
        self.session.rollback(position)
        self._call("rollback", to=position)

    def close(self) -> None:
        """Close the recording; the session stays open."""
        self._file.close()

    def __enter__(self) -> SessionRecorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _recorded(
        self, stream: Generation, max_tokens: int, options: Mapping[str, object]
    ) -> Generator[int, None, EndReason]:
        out: list[int] = []
        end = INTERRUPTED
        try:
            for token in stream:
                out.append(token)
                yield token
            end = LIMIT if len(out) == max_tokens else STOPPED
        finally:
            stream.close()
            self._call("generate", max_tokens=max_tokens, options=options, tokens=out, end=end)
        assert stream.reason is not None  # it ended by itself
        return stream.reason

    def _call(self, do: str, **fields: object) -> None:
        position, digest = self.session.position, self.session.digest()
        self._write({"do": do, **fields, "position": position, "digest": digest})

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            self._file.write(json.dumps(line, default=_plain) + "\n")
            self._file.flush()
        except OSError as error:
            raise SessionError(
                f"cannot write to recording {self._file.name}: {error}; it ends before this call"
            ) from error


def read_recording(
    path: str | os.PathLike[str],
) -> tuple[RecordingHead, list[RecordedCall], bool]:
    """The head, the calls, and whether the last line is cut short. Raises SessionError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SessionError(f"cannot read recording {path}: {error}") from error
    is_cut_short = lines.pop() != ""
    if not lines:
        raise SessionError(f"{path} is not a recording: it has no whole line")
    try:
        first = json.loads(lines[0])
        if first.pop("format") != FORMAT:
            raise ValueError(f"this version reads {FORMAT!r}")
        head = RecordingHead(**first)
        calls = [_call_of(number, json.loads(text)) for number, text in enumerate(lines[1:], 2)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SessionError(f"{path} is not a recording that can be replayed: {error!r}") from error
    return head, calls, is_cut_short


def replay(
    engine: SessionEngine, capsule: Capsule | None, path: str | os.PathLike[str]
) -> SessionReplay:
    """Run a recording again, from a capsule or from nothing, and compare at every boundary.

    Stops at the first difference. Raises SessionError for a recording of another model or one that
    does not start where the capsule is.
    """
    head, calls, is_cut_short = read_recording(path)
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
        for done, call in enumerate(calls):
            mismatch = _run(session, call, engine.vocab_size)
            tokens += len(call.fields.get("tokens", ()))
            if mismatch is not None:
                text = f"{path}, line {call.line} ({call.do}): {mismatch}"
                return SessionReplay(done, tokens, done, text, is_cut_short)
    return SessionReplay(len(calls), tokens, len(calls) + 1, None, is_cut_short)


def _run(session: Session, call: RecordedCall, vocab_size: int) -> str | None:
    """One call again; what differs, or None."""
    fields = call.fields
    if call.do == "prefill":
        session.prefill(as_tokens(fields["tokens"], vocab_size))
    elif call.do == "rollback":
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
    if session.position != call.position:
        return f"position {session.position}, recorded {call.position}"
    if (digest := session.digest()) != call.digest:
        return f"digest {digest} at position {call.position}, recorded {call.digest}"
    return None


def _call_of(line: int, fields: dict[str, Any]) -> RecordedCall:
    wanted: dict[str, set[str]] = {
        "prefill": {"tokens"},
        "rollback": {"to"},
        "generate": {"max_tokens", "options", "tokens", "end"},
    }
    do, position, digest = fields.pop("do"), fields.pop("position"), fields.pop("digest")
    if set(fields) != wanted[do]:
        raise ValueError(
            f"line {line}: {do} has {listed(sorted(fields))}, expected {sorted(wanted[do])}"
        )
    if "tokens" in fields and not isinstance(fields["tokens"], list):
        raise ValueError(f"line {line}: tokens is a list of ids")
    if do == "generate":
        if not isinstance(fields["max_tokens"], int):
            raise ValueError(f"line {line}: max_tokens is {fields['max_tokens']!r}")
        if unknown := set(fields["options"]) - OPTIONS:
            raise ValueError(f"line {line}: unknown options {listed(sorted(unknown))}")
    return RecordedCall(line, do, fields, int(position), str(digest))


def _plain(value: object) -> object:
    """Numpy's scalars as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be recorded")
