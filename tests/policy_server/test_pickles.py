"""The reader of pickles: what LeRobot sends is read, whatever else is refused and never run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.base.errors import PayloadError
from flashrt.policy_server import pickles
from flashrt.policy_server.arrays import storage_bytes
from flashrt.policy_server.payloads import read_instructions, read_observation, write_actions
from tests.policy_files import uniform
from tests.policy_server.payloads import (
    HELPERS,
    RemotePolicyConfig,
    TimedObservation,
    features,
    pickled,
    recorded,
)

JOINTS = tuple(f"joint_{i}.pos" for i in range(7))
JOINT_VALUES = uniform("joints", (7,), 41) * 2
IMAGE = ((uniform("camera", (48, 80, 3), 41) + 1) * 128).astype(np.uint8)


def test_instructions_are_read() -> None:
    """Fault: a field, a feature or the order of names lost."""
    found = read_instructions(recorded("instructions"))
    assert (found.policy_type, found.policy, found.actions_per_chunk) == ("act", "user/plain", 10)
    assert (found.device, found.renames, found.unknown) == ("cuda", {}, ())
    state, top = found.features
    assert (state.name, state.is_image, state.numbers) == ("observation.state", False, JOINTS)
    assert (top.name, top.is_image) == ("observation.images.top", True)


@pytest.mark.parametrize("name", ["observation", "observation-5", "tensors"])
def test_observations_are_read(name: str) -> None:
    """Arrays of protocols 4 and 5, numpy's scalars, torch's tensors with strides of their own.
    Fault: a shape, an order of bytes or a stride misread.
    """
    seen = read_observation(recorded(name))
    assert (seen.timestamp, seen.timestep, seen.must_go) == (12.5, 3, name != "tensors")
    assert seen.values["task"] == "pick the cube"
    assert np.array_equal(seen.values["top"], IMAGE)
    assert [np.float32(np.ravel(seen.values[n])[0]) for n in JOINTS] == list(JOINT_VALUES)
    if name == "tensors":
        assert seen.values["unused"].tolist() == [2, 3, 4, 5]


def test_an_answer_is_what_torch_has_read() -> None:
    """The recorded bytes were unpickled where torch and LeRobot are, and the tensors compared.
    Fault: any other byte.
    """
    chunk = uniform("answer", (3, 2), 1)
    assert write_actions(chunk, 5.0, 1 << 31, 0.25, HELPERS) == recorded("answer")


def test_modules_of_other_versions_are_let_in() -> None:
    """Fault: the module of one LeRobot alone; a class of another package."""
    older = "lerobot.scripts.server.helpers"
    data = pickled(TimedObservation(1.0, 0, {}), module=older)
    assert read_observation(data).module == older
    for module in ("lerobotics.helpers", "os", "lerobot.a b"):
        with pytest.raises(PayloadError, match="not let in"):
            read_observation(data.replace(b"\x8c\x1e" + older.encode(), word(module)))


# -- hostile ---------------------------------------------------------------------------------------


def word(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def in_observation(value: bytes) -> bytes:
    """A pickle of an observation with this stream's value in it."""
    head = b"\x80\x04" + word(HELPERS) + word("TimedObservation") + b"\x93)\x81}("
    head += word("timestamp") + b"G" + struct.pack(">d", 1.0) + word("timestep") + b"K\x00"
    return head + word("observation") + b"}" + word("x") + value + b"s" + b"ub."


def call(module: str, name: str, *arguments: str) -> bytes:
    return word(module) + word(name) + b"\x93(" + b"".join(map(word, arguments)) + b"tR"


class Runs:
    """What pickle would run."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


STORAGE = storage_bytes(np.arange(6, dtype=np.float32))
HELD = b"B" + struct.pack("<I", len(STORAGE)) + STORAGE


def tensor(storage: bytes, rest: bytes) -> bytes:
    loaded = word("torch.storage") + word("_load_from_bytes") + b"\x93" + storage + b"\x85R"
    hooks = word("collections") + word("OrderedDict") + b"\x93)R"
    return (
        word("torch._utils")
        + word("_rebuild_tensor_v2")
        + b"\x93("
        + loaded
        + rest
        + hooks
        + (b"tR")
    )


def held(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    return file.getvalue()


NUMPY = word("numpy") + word("dtype") + b"\x93"
F4 = NUMPY + word("f4") + b"\x89\x88\x87R"
FROM_BUFFER = word("numpy._core.numeric") + word("_frombuffer") + b"\x93"
LAUGHS = b")" + b"".join(b"\x94h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
EVIL_STORAGE = STORAGE.replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "system": (call("os", "system", "touch MARK"), "os.system is not let in"),
    "posix": (b"cposix\nsystem\n" + b"(" + word("touch MARK") + b"tR", "posix.system is not let"),
    "eval": (call("builtins", "eval", "open('MARK', 'w')"), "builtins.eval is not let in"),
    "getattr": (call("builtins", "getattr", "a", "b"), "builtins.getattr is not let in"),
    "import": (call("numpy", "load", "MARK"), "numpy.load is not let in"),
    "runner": (call("numpy.testing", "rundocs", "MARK"), "is not let in"),
    "torch": (call("torch", "load", "MARK"), "torch.load is not let in"),
    "other of lerobot": (call(HELPERS, "get_logger", "MARK"), "get_logger is not let in"),
    "dotted": (call(HELPERS, "TimedObservation.__init__", "a"), "is not let in"),
    "called": (call(HELPERS, "TimedObservation"), "only made by its state"),
    "within a storage": (tensor(held(EVIL_STORAGE), b"K\x00)))\x89"), "os.system is not let in"),
    "INST": (b"(" + word("touch MARK") + b"ios\nsystem\n", "opcode b'i'"),
    "OBJ": (b"(" + word("os") + b"o", "opcode b'o'"),
    "EXT1": (b"\x82\x01", "opcode"),
    "NEWOBJ_EX": (word("os") + word("system") + b"\x93)}\x92", "is not let in"),
    "a class with a state": (F4[: len(NUMPY)] + b"}b", "gives a Global a state"),
    "a persistent id": (word("a") + b"Q", "persistent id"),
    "a module that is no text": (b"K\x01K\x02\x93", "no text"),
    "bytes that do not follow": (b"\x8e" + struct.pack("<Q", 1 << 60), "are announced"),
    "a bytearray likewise": (b"\x96" + struct.pack("<Q", 1 << 62), "are announced"),
    "text too long": (b"X" + struct.pack("<I", 1 << 17) + b"a" * (1 << 17), "text of 131,072"),
    "an integer too long": (b"\x8a\xff" + b"\x01" * 255, "an integer of 255 bytes"),
    "an integer in letters": (b"I" + b"9" * 5000 + b"\n", "opcode b'I'"),
    "a memo that is not there": (b"j\xff\xff\xff\xff", "was not kept"),
    "lists in lists": (b"]" * 5000 + b"a" * 4999, "more than 16 levels"),
    "tuples in tuples": (b")" + b"\x85" * 5000, "more than 16 levels"),
    "a billion laughs": (LAUGHS, "more than 16 levels"),
    "in itself": (b"]\x94h\x00a", "contains itself"),
    "in itself, roundabout": (b"]\x94]\x94h\x00ah\x00h\x01a", "no new list"),
    "a key that is no text": (b"})K\x01s", "a key of tuple"),
    "marks without end": (b"(" * (pickles.MOST_OPCODES + 1), "more than 65,536 opcodes"),
    "nothing on the stack": (b"a" * 9, "a value is missing|adds to what"),
    "an object dtype": (NUMPY + word("O") + b"\x89\x88\x87R", "numpy.dtype"),
    "a dtype with fields": (NUMPY + word("V8") + b"\x89\x88\x87R", "numpy.dtype"),
    "more numbers than bytes": (
        FROM_BUFFER + b"(C\x04abcd" + F4 + b"J\x00\x00\x00\x7f\x85" + word("C") + b"tR",
        "in 4 bytes",
    ),
    "a negative shape": (
        FROM_BUFFER + b"(C\x04abcd" + F4 + b"J\xff\xff\xff\xff\x85" + word("C") + b"tR", "shape",
    ),
    "an array as a flag": (
        NUMPY + word("f4") + FROM_BUFFER + b"(C\x08abcdefgh" + F4 + b"K\x02\x85" + word("C")
        + b"tR\x88\x87R",
        "numpy.dtype",
    ),
    "a tensor beyond its storage": (
        tensor(HELD, b"K\x03K\x04\x85K\x01\x85\x89"), "ends at 6 of 6"
    ),
    "a tensor of one number, many times": (
        tensor(HELD, b"K\x00J\x00\x00\x00\x01\x85K\x00\x85\x89"), "16,777,216 numbers in 6"
    ),
    "a negative stride": (tensor(HELD, b"K\x05K\x02\x85J\xff\xff\xff\xff\x85\x89"), "shape"),
    "a zip file": (tensor(held(zipped()), b"K\x00)))\x89"), "zip file"),
    "a storage that breaks off": (tensor(held(STORAGE[:-4]), b"K\x00)))\x89"), "6 numbers in"),
    "tensors without end": (
        b"(" + HELD + b"\x94"
        + (word("torch.storage") + word("_load_from_bytes") + b"\x93h\x00\x85R") * 300 + b"t",
        "more than 256 tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: an opcode or a global more than the list has; a limit that is not looked at. The
    message names what was found.
    """
    monkeypatch.chdir(tmp_path)
    value, message = HOSTILE[name]
    with pytest.raises(PayloadError, match=message):
        read_observation(in_observation(value))
    assert not (tmp_path / "MARK").exists()


def test_pickle_itself_would_have_run_it(tmp_path: Path) -> None:
    """The bytes are dangerous: else the tests above say nothing."""
    mark = tmp_path / "mark"
    data = pickle.dumps(Runs(os.system, f"touch {mark}"))
    with pytest.raises(PayloadError, match="system is not let in"):
        read_observation(data)
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()


def test_a_payload_of_another_kind_is_refused() -> None:
    """Fault: instructions taken for an observation, something after the end."""
    with pytest.raises(PayloadError, match="RemotePolicyConfig is not let in"):
        read_observation(recorded("instructions"))
    with pytest.raises(PayloadError, match="3 bytes follow"):
        read_observation(recorded("observation") + b"abc")
    with pytest.raises(PayloadError, match="a dict, expected LeRobot's TimedObservation"):
        read_observation(pickle.dumps({}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("act", "p", {}, 0), "actions_per_chunk is 0"),
        (("act", "p", {}, True), "actions_per_chunk is True"),
        (("act", "", {}, 1), "pretrained_name_or_path is ''"),
        ((b"act", "p", {}, 1), "policy_type is a memoryview"),
        (("act", "p", [], 1), "lerobot_features is a list"),
        (("act", "p", {"observation.state": {"dtype": "float64"}}, 1), "of dtype 'float64'"),
        (("act", "p", {"observation.state": {"dtype": np.zeros(3)}}, 1), "of dtype None"),
        (("act", "p", {}, 1, "cpu", {"a": 1}), "rename_map"),
    ],
)
def test_instructions_that_say_nothing_are_refused(fields: Any, message: str) -> None:
    """Fault: a field that is trusted."""
    with pytest.raises(PayloadError, match=message):
        read_instructions(pickled(RemotePolicyConfig(*fields)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((float("nan"), 0, {}), "timestamp is nan"),
        ((1.0, -1, {}), "timestep is -1"),
        ((1.0, 0, []), "observation is a list"),
        ((1.0, 0, {"a": [1]}), "a: a list"),
        ((1.0, 0, {}, 1), "must_go 1"),
    ],
)
def test_observations_that_say_nothing_are_refused(fields: Any, message: str) -> None:
    """Fault: a field that is trusted."""
    with pytest.raises(PayloadError, match=message):
        read_observation(pickled(TimedObservation(*fields)))


def test_damage_is_refused_or_read() -> None:
    """Cut off anywhere, or with bytes changed: a PayloadError or another observation, nothing else.
    Fault: an error of numpy or of Python that a stream can cause.
    """
    small = {"a": 1.0, "b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.float64(2)}
    whole = [pickled(TimedObservation(1.0, 3, small), protocol) for protocol in (4, 5)]
    whole.append(in_observation(tensor(HELD, b"K\x01K\x02K\x02\x86K\x02K\x01\x86\x89")))
    whole.append(pickled(RemotePolicyConfig("act", "p", features({"observation.state": 3}), 5)))
    chance = random.Random(7)
    for data in whole:
        for end in range(len(data)):
            with pytest.raises(PayloadError):
                read_observation(data[:end])
    n_read = 0
    for _ in range(6000):
        damaged = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        for read in (read_observation, read_instructions):
            try:
                read(bytes(damaged))
                n_read += 1
            except PayloadError:
                pass
    assert n_read > 100
    assert not {"lerobot", "torch"} & set(sys.modules)
