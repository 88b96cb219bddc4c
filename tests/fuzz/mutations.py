"""Seeded ways to damage a capsule file or a file of a store: each result has to be refused.

Two kinds: damage (bits, lengths), which checksums find, and forgery of the header, whose checksum
is made again: there the structure has to be refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from flashrt.capsule import file

Mutation = Callable[[np.random.Generator, bytes], bytes]
ABSURD = (-1, 0, 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, True, None, "7", [], {})
NAMES = ("", "..", "../../etc/passwd", "/etc/passwd", "rows/../keys", "fixed/\0", "a" * 5000, "ü")


def flip(rng: np.random.Generator, whole: bytes) -> bytes:
    raw = bytearray(whole)
    raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    return bytes(raw)


def flip_header(rng: np.random.Generator, whole: bytes) -> bytes:
    raw = bytearray(whole)
    raw[int(rng.integers(header_stop(whole)))] ^= int(rng.integers(1, 256))
    return bytes(raw)


def overwrite(rng: np.random.Generator, whole: bytes) -> bytes:
    """A run of other bytes: one value, or noise."""
    raw, n = bytearray(whole), int(rng.integers(1, 200))
    at = int(rng.integers(len(raw)))
    part = rng.bytes(n) if rng.random() < 0.5 else bytes([int(rng.integers(256))]) * n
    raw[at : at + n] = part[: len(raw) - at]
    return bytes(raw)


def truncate(rng: np.random.Generator, whole: bytes) -> bytes:
    return whole[: int(rng.integers(len(whole)))]


def extend(rng: np.random.Generator, whole: bytes) -> bytes:
    return whole + rng.bytes(int(rng.integers(1, 5000)))


def move_a_part(rng: np.random.Generator, whole: bytes) -> bytes:
    a, b, c = sorted(int(n) for n in rng.integers(0, len(whole), 3))
    return whole[:a] + whole[b:c] + whole[a:b] + whole[c:]


def claim_a_length(rng: np.random.Generator, whole: bytes) -> bytes:
    claimed = int(rng.choice(np.array([0, 1, 7, 2**16, 2**31, 2**40, 2**62, 2**64 - 1], np.uint64)))
    return claimed.to_bytes(8, "little") + whole[8:]


def header_stop(whole: bytes) -> int:
    return 8 + int.from_bytes(whole[:8], "little")


def forged(change: Callable[[np.random.Generator, dict[str, Any]], None]) -> Mutation:
    """A change of the header's JSON, under a good checksum as far as one can be made."""

    def mutate(rng: np.random.Generator, whole: bytes) -> bytes:
        stop = header_stop(whole)
        header = json.loads(whole[8:stop])
        change(rng, header)
        metadata = header.get("__metadata__")
        if isinstance(metadata, dict):
            shapes = {
                name: entry["shape"]
                for name, entry in header.items()
                if name != "__metadata__" and isinstance(entry, dict) and "shape" in entry
            }
            rest = {k: v for k, v in metadata.items() if k != "header"}
            text = json.dumps([rest, shapes], sort_keys=True)
            metadata["header"] = xxhash.xxh3_128_hexdigest(text.encode())
        text = json.dumps(header)
        return len(text.encode()).to_bytes(8, "little") + text.encode() + whole[stop:]

    mutate.__name__ = f"forge_{change.__name__}"
    return mutate


def _tensor(rng: np.random.Generator, header: dict[str, Any]) -> str:
    return str(rng.choice(sorted(k for k in header if k != "__metadata__")))


def rename(rng: np.random.Generator, header: dict[str, Any]) -> None:
    name = _tensor(rng, header)
    header[str(rng.choice(np.array([*NAMES, name + "x", name[:-1]], object)))] = header.pop(name)


def swap_tensors(rng: np.random.Generator, header: dict[str, Any]) -> None:
    """Of different sizes: equal ones would be another valid capsule."""
    names = sorted(k for k in header if k != "__metadata__")
    a, b = rng.choice(names, 2, replace=False)
    while header[a]["shape"] == header[b]["shape"]:
        a, b = rng.choice(names, 2, replace=False)
    header[a], header[b] = header[b], header[a]


def drop_tensor(rng: np.random.Generator, header: dict[str, Any]) -> None:
    del header[_tensor(rng, header)]


def change_dtype(rng: np.random.Generator, header: dict[str, Any]) -> None:
    header[_tensor(rng, header)]["dtype"] = str(rng.choice(["F32", "I8", "u8", "", "BF16"]))


def change_shape(rng: np.random.Generator, header: dict[str, Any]) -> None:
    shape = header[_tensor(rng, header)]["shape"]
    value = ABSURD[int(rng.integers(len(ABSURD)))]
    i = int(rng.integers(len(shape)))
    shape[i] = value if value != shape[i] or type(value) is bool else 12345


def change_rank(rng: np.random.Generator, header: dict[str, Any]) -> None:
    entry = header[_tensor(rng, header)]
    entry["shape"] = [[1] * 1000, [], None, [*entry["shape"], 1], [entry["shape"]]][
        int(rng.integers(5))
    ]


def change_offsets(rng: np.random.Generator, header: dict[str, Any]) -> None:
    """Overlaps, gaps, and places outside the file."""
    offsets = header[_tensor(rng, header)]["data_offsets"]
    i, value = int(rng.integers(2)), ABSURD[int(rng.integers(len(ABSURD)))]
    if rng.random() < 0.5:
        value = offsets[i] + int(rng.choice([-256, -1, 1, 64, 4096]))
    offsets[i] = value if value != offsets[i] or type(value) is bool else -5


def change_position(rng: np.random.Generator, header: dict[str, Any]) -> None:
    metadata = header["__metadata__"]
    position = int(metadata["position"])
    others = [position + 1, position - 1, 0, -1, 2**31, 10**20, "x", "", None, [], 1.5, "٣"]
    value = others[int(rng.integers(len(others)))]
    metadata["position"] = str(value) if isinstance(value, int) else value


def change_metadata(rng: np.random.Generator, header: dict[str, Any]) -> None:
    metadata = header["__metadata__"]
    keys = ("format", "fingerprint", "position", "digest")
    key = str(rng.choice([*keys, *(k for k in metadata if k.startswith("xxh3:"))]))
    if rng.random() < 0.5 and key != "digest":
        del metadata[key]
    elif key != "digest":
        metadata[key] = ["", "0" * 32, None, 5, [], {}][int(rng.integers(6))]
    else:
        header["__metadata__"] = [None, [], "x", 5, {}][int(rng.integers(5))]


DAMAGE: tuple[Mutation, ...] = (flip, overwrite, truncate, extend, move_a_part)
FORGERY: tuple[Mutation, ...] = tuple(
    forged(change)
    for change in (
        rename, swap_tensors, drop_tensor, change_dtype, change_shape, change_rank, change_offsets,
        change_position, change_metadata,
    )
)  # fmt: skip
CAPSULE_FILE: tuple[Mutation, ...] = (*DAMAGE, flip_header, claim_a_length, *FORGERY)
assert file.FORMAT == "flashrt-capsule-1", "the forgeries know this header"


def forge_a_line(rng: np.random.Generator, whole: bytes) -> bytes:
    """A recording of a session: one value of one line, at any depth, is another; or it is gone."""
    lines = whole.split(b"\n")[:-1]
    i = int(rng.integers(len(lines)))
    record = json.loads(lines[i])
    holder: Any = record
    while True:
        key = (
            list(holder)[int(rng.integers(len(holder)))]
            if isinstance(holder, dict)
            else int(rng.integers(len(holder)))
        )
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.4:
            break
        holder = inner
    values = (*ABSURD, float("nan"), 1e400, [[1]], {"a": []}, "x" * 300, "prefill", [2**70], ["1"])
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = values[int(rng.integers(len(values)))]
    lines[i] = json.dumps(record).encode()
    return b"\n".join(lines) + b"\n"


def swap_lines(rng: np.random.Generator, whole: bytes) -> bytes:
    lines = whole.split(b"\n")[:-1]
    order = rng.permutation(len(lines))
    return b"\n".join(lines[int(i)] for i in order) + b"\n"


SESSION_RECORDING: tuple[Mutation, ...] = (*DAMAGE, *[forge_a_line] * 5, swap_lines)
