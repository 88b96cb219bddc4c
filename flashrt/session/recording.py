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
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import GrammarError, SessionError
from flashrt.base.files import PRIVATE, opened
from flashrt.base.messages import listed, shown
from flashrt.base.system import NO_FOLLOW
from flashrt.base.tensor_file import parse_json
from flashrt.capsule.capsule import Capsule
from flashrt.engine.tokens import as_tokens
from flashrt.session.engine import SessionEngine
from flashrt.session.session import EndReason, Generation, Session
from flashrt.text.grammar import grammar_of

FORMAT = "flashrt-journal-1"
_MOST_HEAD_NBYTES, _MOST_LINE_NBYTES = 1 << 20, 64 << 20
_MOST_COUNT = 1 << 31
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
        self._path = path
        head = RecordingHead(
            fingerprint=engine.fingerprint,
            checkpoint=str(engine.checkpoint.path.absolute()),
            device=engine.device,
            max_positions=engine.max_positions,
            position=session.position,
            digest=session.digest(),
        )
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
            handle = os.open(path, flags, PRIVATE)  # it holds prompts
            self._file = os.fdopen(handle, "w", encoding="utf-8")
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
        if plain.get("grammar") is not None:
            plain["grammar"] = asdict(plain["grammar"])
        steps = self._recorded(stream, max_tokens, plain)
        return Generation(stream.session, stream.choice, stream.draft, max_tokens, steps)

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
                f"cannot write to recording {self._path}: {error}; it ends before this call"
            ) from error


def read_recording(
    path: str | os.PathLike[str],
) -> tuple[RecordingHead, list[RecordedCall], bool]:
    """The head, the calls, and whether the last line is cut short. Raises SessionError."""
    number = 0
    try:
        with opened(path) as (handle, _), os.fdopen(handle, "rb", closefd=False) as file:
            head, calls, is_cut_short = None, list[RecordedCall](), False
            while line := file.readline(_MOST_LINE_NBYTES if number else _MOST_HEAD_NBYTES):
                number += 1
                is_cut_short = not line.endswith(b"\n")
                if is_cut_short and file.read(1):
                    raise ValueError(f"it has more than {len(line):,} bytes")
                if is_cut_short:
                    break
                fields = parse_json(line)
                if not isinstance(fields, dict):
                    raise ValueError("it is no object")
                if head is None:
                    head = _head_of(fields)
                else:
                    calls.append(_call_of(number, fields))
    except OSError as error:
        raise SessionError(f"cannot read recording {path}: {error.strerror}") from error
    except ValueError as error:
        raise SessionError(
            f"{path} is not a recording that can be replayed: line {number}: {error}"
        ) from error
    if head is None:
        raise SessionError(f"{path} is not a recording: it has no whole line")
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
        if options.get("grammar") is not None:
            options["grammar"] = grammar_of(options["grammar"])
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


def _head_of(fields: dict[str, Any]) -> RecordingHead:
    """Raises ValueError."""
    if (found := fields.pop("format", None)) != FORMAT:
        raise ValueError(f"format {shown(found)}, this version reads {FORMAT!r}")
    _need(fields, _HEAD)
    return RecordingHead(**fields)


def _call_of(line: int, fields: dict[str, Any]) -> RecordedCall:
    """Raises ValueError."""
    do = fields.pop("do", None)
    if not isinstance(do, str) or do not in _CALLS:
        raise ValueError(f"there is no call {shown(do)}")
    _need(fields, {"position": _COUNT, "digest": _TEXT, **_CALLS[do]})
    return RecordedCall(line, do, fields, fields.pop("position"), fields.pop("digest"))


def _need(fields: Mapping[str, Any], wanted: Mapping[str, _Kind]) -> None:
    """Exactly the fields that are wanted, each of its kind. Raises ValueError."""
    if set(fields) != set(wanted):
        raise ValueError(f"it has {listed(sorted(fields))}, expected {listed(sorted(wanted))}")
    for name, (kind, is_one) in wanted.items():
        if not is_one(fields[name]):
            raise ValueError(f"{name} is {shown(fields[name])}, expected {kind}")


def _are_options(value: object) -> bool:
    """As far as `generate` would not find out: what JSON can hold in place of a number."""
    if not isinstance(value, dict) or set(value) - OPTIONS:
        return False
    rest = {k: v for k, v in value.items() if k not in ("stop", "logit_bias", "grammar")}
    return (
        _are_integers(value.get("stop", []))
        and (value.get("logit_bias") is None or _are_biases(value["logit_bias"]))
        and (value.get("grammar") is None or _is_grammar(value["grammar"]))
        and not any(isinstance(v, list | dict) for v in rest.values())
    )


def _are_biases(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in value
    )


def _is_grammar(value: object) -> bool:
    try:
        grammar_of(value)
    except GrammarError:
        return False
    return True


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


_Kind = tuple[str, Callable[[Any], bool]]
_TEXT: _Kind = ("a text", lambda v: isinstance(v, str))
_COUNT: _Kind = ("a count", lambda v: type(v) is int and 0 <= v < _MOST_COUNT)
_TOKENS: _Kind = ("a list of ids", _are_integers)
_OPTIONS: _Kind = (f"options among {sorted(OPTIONS)}", _are_options)
_END: _Kind = ("how it ended", lambda v: v in (LIMIT, STOPPED, INTERRUPTED))
_HEAD: Mapping[str, _Kind] = {
    "fingerprint": _TEXT, "checkpoint": _TEXT, "device": _TEXT, "max_positions": _COUNT,
    "position": _COUNT, "digest": _TEXT,
}  # fmt: skip
_CALLS: Mapping[str, Mapping[str, _Kind]] = {
    "prefill": {"tokens": _TOKENS},
    "rollback": {"to": _COUNT},
    "generate": {"max_tokens": _COUNT, "options": _OPTIONS, "tokens": _TOKENS, "end": _END},
}


def _plain(value: object) -> object:
    """Numpy's scalars as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be recorded")
