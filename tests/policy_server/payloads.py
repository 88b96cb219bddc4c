"""Payloads as LeRobot's client makes them, without LeRobot: the recorded ones, and such by hand.

IS: the bytes of tests/policy_server/recorded, classes under LeRobot's names for Python's pickle,
and messages of the transport. IS NOT: in need of flashrt.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "recorded"
HELPERS = "lerobot.async_inference.helpers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
BEGIN, MIDDLE, END = 1, 2, 3


def recorded(name: str) -> bytes:
    return (GOLDEN / f"{name}.pickle").read_bytes()


@dataclass
class RemotePolicyConfig:
    policy_type: Any
    pretrained_name_or_path: Any
    lerobot_features: Any
    actions_per_chunk: Any
    device: str = "cpu"
    rename_map: Any = field(default_factory=dict)


@dataclass
class TimedObservation:
    timestamp: Any
    timestep: Any
    observation: Any
    must_go: Any = False


@contextmanager
def named(module: str) -> Iterator[None]:
    """These classes are LeRobot's for Python's pickle, meanwhile."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    fakes = {name: types.ModuleType(name) for name in names}
    for kind in (RemotePolicyConfig, TimedObservation):
        setattr(fakes[module], kind.__name__, kind)
        kind.__module__ = module
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def pickled(value: object, protocol: int = 4, module: str = HELPERS) -> bytes:
    with named(module):
        return pickle.dumps(value, protocol)


def features(numbers: Mapping[str, int], images: tuple[str, ...] = ()) -> dict[str, Any]:
    """As LeRobot describes a robot: vectors of values `NAME.0`, `NAME.1`, and cameras."""
    found: dict[str, Any] = {
        name: {"dtype": "float32", "shape": (n,), "names": [f"{name}.{i}" for i in range(n)]}
        for name, n in numbers.items()
    }
    return found | {
        f"observation.images.{name}": {
            "dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"],
        }
        for name in images
    }  # fmt: skip


# -- messages --------------------------------------------------------------------------------------


def message(data: bytes) -> bytes:
    """Of bytes alone, field 1."""
    return b"\x0a" + varint(len(data)) + data


def pieces(data: bytes, size: int = 1 << 20) -> list[bytes]:
    """A stream of observations' pieces, as LeRobot cuts them."""
    cut = [data[at : at + size] for at in range(0, len(data), size)]
    states = [BEGIN, *[MIDDLE] * (len(cut) - 2), END] if len(cut) > 1 else [END]
    return [
        b"\x08" + bytes([state]) + b"\x12" + varint(len(piece)) + piece
        for state, piece in zip(states, cut, strict=True)
    ]


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


@dataclass
class TimedAction:
    timestamp: float = 0.0
    timestep: int = 0
    action: Any = None


def actions_of(answer: bytes) -> list[TimedAction]:
    """Of a message with actions, as torch would rebuild them: by Python's pickle, with functions in
    place of torch's.
    """
    if not answer:
        return []
    size, shift, at = 0, 0, 1
    assert answer[0] == 0x0A
    while True:
        size |= (answer[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if answer[at - 1] < 128:
            break
    assert len(answer) == at + size

    def rebuild(storage: bytes, offset: int, shape: Any, strides: Any, *rest: Any) -> Any:
        count = int.from_bytes(storage[:8], "little")
        values = np.frombuffer(storage[8:], "<f4")
        assert len(values) == count
        assert strides == (1,)
        return values[offset : offset + shape[0]]

    def load(data: bytes) -> bytes:
        """The count and the numbers, behind five pickles."""
        stream = io.BytesIO(data)
        for _ in range(3):
            pickle.load(stream)
        seen = []

        class Storage(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                assert (module, name) == ("torch", "FloatStorage")
                return name

            def persistent_load(self, about: Any) -> Any:
                seen.append(about)
                return about

        Storage(stream).load()
        keys = pickle.load(stream)
        assert keys == [seen[0][2]]
        return stream.read()

    known = {
        (HELPERS, "TimedAction"): TimedAction,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch.storage", "_load_from_bytes"): load,
        ("collections", "OrderedDict"): dict,
    }

    class Answers(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return known[module, name]

    found: list[TimedAction] = Answers(io.BytesIO(answer[at:])).load()
    return found


def rows_of(answer: bytes) -> Any:
    """Actions [n, action_dim]."""
    return np.stack([timed.action for timed in actions_of(answer)])
