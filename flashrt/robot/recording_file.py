"""The file of a recording: a safetensors file, written whole, checked before anything is believed.

IS: the format, and the refusal of everything that is not it. IS NOT: recording or replaying
(recording): a file that was damaged or forged is found here, before a loop runs it.

Tensors: observations float32 [T, O], actions float32 [T, A], outcomes uint8 [T]; events int64
[E, 3] (tick, what, value) and event_digests uint8 [E, 16], in the order in which they happened: an
event at tick t came before the (t + 1)-th tick. Metadata: format, fingerprint, seed, the loop's
options, and an xxh3-128 over all of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import RecordingError
from flashrt.base.files import PRIVATE, opened, outcome, read_exactly, replacing
from flashrt.base.messages import listed, shown
from flashrt.base.tensor_file import parse_json, read_table, write_tensors

FORMAT = "flashrt-recording-1"
ON_TIME, LATE, HELD = 0, 1, 2  # outcomes: sent; sent late, or raised; something else was executed
DIGEST = "digest"  # the state is as recorded here
WHAT = (DIGEST, "reset", "set_seed", "interrupt", "snapshot", "restore", "rewind")
NO_DIGEST = "0" * 32
MOST_HEADER_NBYTES = 1 << 20
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
}
_TENSORS = {  # dtypes and ranks
    "observations": ("F32", 2), "actions": ("F32", 2), "outcomes": ("U8", 1), "events": ("I64", 2),
    "event_digests": ("U8", 2),
}  # fmt: skip
_OPTIONS = ("hz", "overlap", "keep_seconds", "boundary_seconds", "seed")


@dataclass(frozen=True, slots=True)
class Event:
    """Something between two ticks: after `tick` of them."""

    tick: int
    what: str
    value: int = 0
    digest: str = NO_DIGEST


@dataclass(frozen=True, slots=True)
class Recording:
    """What a loop took in, and what it answered."""

    fingerprint: str
    seed: int  # of the state that it begins with
    hz: float
    overlap: int
    keep_seconds: float
    boundary_seconds: float
    observations: NDArray[np.float32]  # [T, O]
    actions: NDArray[np.float32]  # [T, A], as executed
    outcomes: NDArray[np.uint8]  # [T]
    events: tuple[Event, ...]

    def check(self) -> None:
        """Raises ValueError unless all of it makes sense."""
        n = len(self.outcomes)
        if self.observations.shape[0] != n or self.actions.shape[0] != n:
            raise ValueError("observations, actions and outcomes are not of as many ticks")
        if not np.isfinite(self.observations).all() or (self.outcomes > HELD).any():
            raise ValueError("an observation is not finite, or an outcome is unknown")
        ticks = [e.tick for e in self.events]
        if ticks != sorted(ticks) or not all(0 <= t <= n for t in ticks):
            raise ValueError("events are not in order")
        if not self.events or self.events[0].what != DIGEST:
            raise ValueError("it does not begin with a digest")


def write_recording(recording: Recording, path: Path) -> None:
    """The file appears whole or not at all. Raises RecordingError when it cannot be written."""
    events = recording.events
    table = [(e.tick, WHAT.index(e.what), e.value) for e in events]
    digests = b"".join(bytes.fromhex(e.digest) for e in events)
    tensors: dict[str, NDArray[np.generic]] = {
        "observations": recording.observations,
        "actions": recording.actions,
        "outcomes": recording.outcomes,
        "events": np.array(table, np.int64).reshape(len(events), 3),
        "event_digests": np.frombuffer(digests, np.uint8).reshape(len(events), 16),
    }
    options = {name: getattr(recording, name) for name in _OPTIONS}
    metadata = {
        "format": FORMAT,
        "fingerprint": recording.fingerprint,
        "options": json.dumps(options, sort_keys=True),
    }
    metadata["sum"] = _sum(metadata, tensors)
    try:
        with replacing(path, is_durable=True, mode=PRIVATE) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        raise RecordingError(f"cannot write {path}: {error}; {outcome(error)}") from error


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """Raises RecordingError for anything but a whole recording."""
    try:
        with opened(path) as (handle, nbytes):
            table = read_table(handle, nbytes, MOST_HEADER_NBYTES)
            metadata = dict(table.metadata)
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise ValueError(f"format {shown(found)}, this version reads {FORMAT!r}")
            if {n: (t.dtype, len(t.shape)) for n, t in table.tensors.items()} != _TENSORS:
                raise ValueError(f"its tensors are {listed(sorted(table.tensors))}")
            tensors = {
                name: read_exactly(handle, t.nbytes, t.offset)
                .view(_DTYPES[t.dtype])
                .reshape(t.shape)
                for name, t in table.tensors.items()
            }
        if metadata.pop("sum") != _sum(metadata, tensors):
            raise ValueError("the checksum differs: it is damaged")
        recording = _recording(metadata, tensors)
        recording.check()
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RecordingError(f"{path} is not a whole recording: {error}") from error
    return recording


def _recording(metadata: dict[str, str], tensors: dict[str, NDArray[np.generic]]) -> Recording:
    table, digests = tensors["events"], tensors["event_digests"]
    if table.shape != (len(digests), 3) or digests.shape != (len(table), 16):
        raise ValueError(f"events {table.shape}, digests {digests.shape}")
    if not np.isin(table[:, 1], range(len(WHAT))).all():
        raise ValueError("an event is unknown")
    events = tuple(
        Event(int(tick), WHAT[int(what)], int(value), bytes(digest).hex())
        for (tick, what, value), digest in zip(table, digests, strict=True)
    )
    options = parse_json(metadata["options"])
    if not isinstance(options, dict) or set(options) != set(_OPTIONS):
        raise ValueError(f"its options are {shown(options)}")
    return Recording(
        fingerprint=metadata["fingerprint"],
        seed=int(options["seed"]),
        hz=float(options["hz"]),
        overlap=int(options["overlap"]),
        keep_seconds=float(options["keep_seconds"]),
        boundary_seconds=float(options["boundary_seconds"]),
        observations=np.asarray(tensors["observations"], np.float32),
        actions=np.asarray(tensors["actions"], np.float32),
        outcomes=np.asarray(tensors["outcomes"], np.uint8),
        events=events,
    )


def _sum(metadata: dict[str, str], tensors: dict[str, NDArray[np.generic]]) -> str:
    state = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        state.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        state.update(tensor.tobytes())
    return state.hexdigest()
