"""The payloads of LeRobot's async inference: what a client asks for and sees, as plain records.

IS: RemotePolicyConfig and TimedObservation of any LeRobot that has them, read field by field, and a
list of TimedAction as a client unpickles it. IS NOT: LeRobot; its classes are names here. Fields
that another version has besides are left aside and named.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PayloadError
from flashrt.base.messages import listed, printable, shown
from flashrt.policy_server.arrays import array_globals, as_array, storage_bytes
from flashrt.policy_server.pickles import Global, read_pickle

INSTRUCTIONS: Final = "RemotePolicyConfig"
OBSERVATION: Final = "TimedObservation"
ACTION: Final = "TimedAction"
# Where LeRobot has these classes: 0.4 to 0.6 and before. Any module of its package is let in, as a
# class is a name here; answers name the module that the observation named.
_MODULE = re.compile(r"lerobot(\.[A-Za-z_][A-Za-z0-9_]*){1,8}")
MOST_PER_CHUNK = 1 << 12
MOST_FEATURES = 64
_MOST_NAMES = 1 << 14  # of one feature


class Record:
    """An object of one of LeRobot's classes: its fields."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self.fields: Mapping[str, Any] | None = None

    def build(self, state: object) -> None:
        """Of a dataclass: its fields by name."""
        if not isinstance(state, dict) or self.fields is not None:
            raise PayloadError(f"a {self.name} whose state is no dict of fields")
        self.fields = state


@dataclass(frozen=True, slots=True)
class Feature:
    """A part of what the robot sees: numbers by name, or an image."""

    name: str  # observation.state, observation.images.top
    is_image: bool
    numbers: tuple[str, ...]  # names of the robot's values, in order


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a client wants: which policy, and how it sees."""

    policy_type: str
    policy: str  # a name or a path: pretrained_name_or_path
    features: tuple[Feature, ...]
    actions_per_chunk: int
    device: str
    renames: Mapping[str, str]
    unknown: tuple[str, ...]  # fields that are left aside


@dataclass(frozen=True, slots=True)
class Seen:
    """An observation as the robot made it."""

    timestamp: float  # of the client's clock, in seconds
    timestep: int
    values: Mapping[str, Any]  # numbers, arrays and text by the robot's names
    must_go: bool
    module: str  # where the client's LeRobot has its classes


def read_instructions(data: bytes) -> Instructions:
    """Raises PayloadError."""
    fields = _fields_of(_read(data, INSTRUCTIONS))
    known = {
        "policy_type", "pretrained_name_or_path", "lerobot_features", "actions_per_chunk",
        "device", "rename_map",
    }  # fmt: skip
    per_chunk = fields.get("actions_per_chunk")
    if type(per_chunk) is not int or not 1 <= per_chunk <= MOST_PER_CHUNK:
        raise PayloadError(
            f"actions_per_chunk is {shown(per_chunk)}, expected an integer from 1 to "
            f"{MOST_PER_CHUNK:,}"
        )
    renames = fields.get("rename_map") or {}
    if not isinstance(renames, dict) or not all(isinstance(to, str) for to in renames.values()):
        raise PayloadError(f"rename_map is {shown(renames)}, expected names by name")
    return Instructions(
        _text(fields, "policy_type"),
        _text(fields, "pretrained_name_or_path"),
        _features(fields.get("lerobot_features")),
        per_chunk,
        _text(fields, "device") if "device" in fields else "",
        renames,
        tuple(sorted(set(fields) - known)),
    )


def read_observation(data: bytes) -> Seen:
    """Raises PayloadError."""
    record = _read(data, OBSERVATION)
    fields = _fields_of(record)
    timestamp, timestep = fields.get("timestamp"), fields.get("timestep")
    if type(timestamp) is not float or not math.isfinite(timestamp):
        raise PayloadError(f"timestamp is {_kind(timestamp)}, expected finite seconds")
    if type(timestep) is not int or not 0 <= timestep < 1 << 62:
        raise PayloadError(f"timestep is {_kind(timestep)}, expected an integer of at least 0")
    values, must_go = fields.get("observation"), fields.get("must_go", False)
    if not isinstance(values, dict) or type(must_go) is not bool:
        raise PayloadError(
            f"observation is {_kind(values)} and must_go {_kind(must_go)}, expected values by name "
            "and a bool"
        )
    return Seen(timestamp, timestep, _plain(values), must_go, record.module)


def write_actions(
    chunk: NDArray[np.float32], timestamp: float, timestep: int, step_s: float, module: str
) -> bytes:
    """A pickled list of TimedAction of `module`: row i of the chunk [n, action_dim] for timestep
    `timestep` + i, at `timestamp` + i * step_s. Its tensors are rows of one storage.
    """
    n, dim = chunk.shape
    if _MODULE.fullmatch(module) is None:
        raise PayloadError(f"module {printable(module)} is none of LeRobot's")
    storage = storage_bytes(np.ascontiguousarray(chunk))
    # Memo: 0 the class, 1 the function that rebuilds a tensor, 2 the storage, 3 OrderedDict.
    parts = [
        b"\x80\x04",
        _word(module), _word(ACTION), b"\x93\x94",
        _word("torch._utils"), _word("_rebuild_tensor_v2"), b"\x93\x94",
        _word("torch.storage"), _word("_load_from_bytes"), b"\x93",
        b"B", struct.pack("<I", len(storage)), storage, b"\x85R\x94",
        _word("collections"), _word("OrderedDict"), b"\x93\x94",
        b"0000](",  # all four are in the memo: off the stack, and a list begins
    ]  # fmt: skip
    for i in range(n):
        parts += [
            b"h\x00)\x81}(",
            _word("timestamp"), b"G", struct.pack(">d", timestamp + i * step_s),
            _word("timestep"), _integer(timestep + i),
            _word("action"), b"h\x01(h\x02", _integer(i * dim), _integer(dim), b"\x85K\x01\x85\x89",
            b"h\x03)RtR", b"ub",
        ]  # fmt: skip
    return b"".join([*parts, b"e."])


# -- reading ---------------------------------------------------------------------------------------


def _read(data: bytes, wanted: str) -> Record:
    arrays = array_globals()

    def find(module: str, name: str) -> Global | None:
        if name == wanted and _MODULE.fullmatch(module) is not None:
            return Global(name, new=lambda: Record(module, name))
        return arrays(module, name)

    found, end = read_pickle(memoryview(data), find)
    if end != len(data):
        raise PayloadError(f"{len(data) - end:,} bytes follow the pickle's end")
    if not isinstance(found, Record):
        raise PayloadError(f"a {type(found).__name__}, expected LeRobot's {wanted}")
    return found


def _fields_of(record: Record) -> Mapping[str, Any]:
    if record.fields is None:
        raise PayloadError(f"a {record.name} without fields")
    return record.fields


def _kind(value: object) -> str:
    """A plain value as it is, of anything else its type."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return shown(value) if is_plain else f"a {type(value).__name__}"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise PayloadError(f"{name} is {_kind(value)}, expected text")
    return value


def _features(given: object) -> tuple[Feature, ...]:
    if not isinstance(given, dict) or len(given) > MOST_FEATURES:
        raise PayloadError(
            f"lerobot_features is {_kind(given)}, expected at most {MOST_FEATURES} features by name"
        )
    found = []
    for name, about in given.items():
        kind = about.get("dtype") if isinstance(about, dict) else None
        kind = kind if isinstance(kind, str) else None
        names = about.get("names") if isinstance(about, dict) else None
        if kind in ("image", "video"):
            found.append(Feature(name, True, ()))
        elif (
            kind == "float32"
            and isinstance(names, list)
            and len(names) <= _MOST_NAMES
            and all(isinstance(n, str) for n in names)
        ):
            found.append(Feature(name, False, tuple(names)))
        else:
            raise PayloadError(
                f"lerobot_features has {printable(name)} of dtype {_kind(kind)}; known are images, "
                "and float32 numbers with a list of names"
            )
    return tuple(found)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of an observation: numbers, text, and arrays as numpy's."""
    if lost := [name for name, value in values.items() if not _is_seen(value)]:
        raise PayloadError(
            f"the observation has {listed([f'{name}: {_kind(values[name])}' for name in lost])}; "
            "let in are numbers, text, arrays and tensors"
        )
    return {
        name: value if (array := as_array(value)) is None else array
        for name, value in values.items()
    }


def _is_seen(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or as_array(value) is not None


# -- writing ---------------------------------------------------------------------------------------


def _word(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data
