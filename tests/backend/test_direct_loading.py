"""Promise: what the cpu reads, hashes and packs itself is what goes through logical arrays else.

Files hold random bytes: every code and every scale, NaN among them, must come where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import xxhash

from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import BackendError, CheckpointError
from flashrt.core.arena import Arena
from flashrt.core.direct import FileHash, FilePart
from flashrt.core.planner import plan_band
from flashrt.ops.table import OPS
from flashrt.weights import loader
from flashrt.weights.formats.blocks import BLOCK_TYPES
from flashrt.weights.formats.stored import Tensor
from flashrt.weights.gguf.checkpoint import GgufCheckpoint
from flashrt.weights.gguf.names import Placement
from flashrt.weights.loader import LoadReport, fill_weights
from flashrt.weights.rules import WeightRule, as_stored, dense, matrix, vector
from tests.backend.runner import rng_for

SIZES = {"BF16": (1, 2), "F16": (1, 2), "F32": (1, 4)}
SIZES |= {name: (kind.elements, kind.layout.itemsize) for name, kind in BLOCK_TYPES.items()}
DIRECT = ("BF16", "F16", "F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
K = 768  # three slices


@dataclass(frozen=True)
class Stored:
    name: str
    kind: str
    rows: int
    columns: int = K
    turns: int = 0  # rows are in another order inside each run of so many


def checkpoint_of(folder: Path, stored: Sequence[Stored]) -> GgufCheckpoint:
    path, placed, raw = folder / "w.bin", {}, bytearray(b"x" * 5)
    for s in stored:
        elements, nbytes = SIZES[s.kind]
        size = s.rows * s.columns // elements * nbytes
        shape = (s.rows, s.columns) if s.rows > 1 else (s.columns,)
        tensor = Tensor(f"blk.{s.name}", s.kind, shape, path, len(raw), size)
        raw += rng_for(s.name, s.kind).bytes(size)
        order = np.arange(s.rows)
        if s.turns:
            order = order.reshape(-1, s.turns)[:, ::-1].reshape(-1)
        placed[s.name] = Placement(tensor, rows=order if s.turns else None)
    path.write_bytes(raw)
    tensors = {name: placement.tensor for name, placement in placed.items()}
    return GgufCheckpoint(path, {}, {}, tensors, placed=placed)


class Filled:
    """Weights of a device, filled."""

    def __init__(
        self, device: CpuDevice, rules: Sequence[WeightRule], checkpoint: GgufCheckpoint, **how: Any
    ) -> None:
        rules = as_stored(rules, checkpoint.stored)
        self.band = plan_band([rule.region for rule in rules], device.storage)
        self.memory = device.allocate("weights", self.band.nbytes)
        backend = how.get("backend", device)
        arena = SimpleNamespace(backend=backend, weights=self.band, weight_memory=self.memory)
        self.report: LoadReport = fill_weights(
            rules, checkpoint, cast(Arena, arena), how.get("progress")
        )
        raw = np.empty(self.band.nbytes, np.uint8)
        device.read(self.memory.address, raw)
        self.bytes = [
            raw[s.offset : s.offset + s.storage.nbytes].tobytes() for s in self.band.slots
        ]


def through_arrays(device: CpuDevice) -> Any:
    """The same device, as one that cannot read files."""
    return SimpleNamespace(pack=device.pack, write=device.write, storage=device.storage)


@pytest.fixture(params=[1, 3])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loader, "_LEAST_DIRECT_NBYTES", 1024)
    made = CpuDevice(request.param)
    made.build(OPS)
    yield made
    made.close()


@pytest.mark.parametrize("kind", sorted(SIZES))
@pytest.mark.parametrize("part_nbytes", [1, 100_000])
def test_rows_of_a_file_are_packed_as_arrays_are(
    device: CpuDevice, kind: str, part_nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a code, a scale or a bit of the hash of one type, row or part is another's.

    Sources that are stacked begin inside a panel; the last panel is short; rows are turned round.
    """
    monkeypatch.setattr(loader, "_PART_NBYTES", part_nbytes)
    stored = [
        Stored("a", kind, 64), Stored("b", kind, 16), Stored("c", kind, 21),
        Stored("turned", kind, 512, 256, turns=64), Stored("norm", "F32", 1, 300_000),
        Stored("last", kind, 70, 256),
    ]  # fmt: skip
    rules = [
        matrix("abc", K, ("a", 64), ("b", 16), ("c", 21)),
        matrix("turned", 256, ("turned", 512)),
        vector("norm", "norm", 300_000),
        matrix("last", 256, ("last", 70)),
    ]
    calls: list[FilePart] = []
    real = device.load_parts

    def load_parts(parts: Sequence[FilePart], hash_: FileHash) -> tuple[int, int] | None:
        calls.extend(parts)
        return real(parts, hash_)

    monkeypatch.setattr(device, "load_parts", load_parts)
    checkpoint = checkpoint_of(tmp_path, stored)
    seen: list[tuple[str, int, int]] = []
    got = Filled(device, rules, checkpoint, progress=lambda *told: seen.append(told))
    wanted = Filled(device, rules, checkpoint, backend=through_arrays(device))
    assert got.bytes == wanted.bytes
    assert got.report == wanted.report
    assert seen[-1] == ("weights", got.report.source_nbytes, got.report.source_nbytes)
    assert [n for _, n, _ in seen] == sorted(n for _, n, _ in seen)
    assert any(part.file >= 0 for part in calls) is (kind in DIRECT)


def test_what_is_not_stored_as_it_is_wanted_goes_through_arrays(
    device: CpuDevice, tmp_path: Path
) -> None:
    """Fault: bytes of blocks are taken for float32."""
    checkpoint = checkpoint_of(tmp_path, [Stored("wide", "Q8_0", 48), Stored("a", "F32", 40)])
    rules = [dense("wide", "wide", 48, K), dense("a", "a", 40, K)]
    got = Filled(device, rules, checkpoint)
    wanted = Filled(device, rules, checkpoint, backend=through_arrays(device))
    assert (got.bytes, got.report) == (wanted.bytes, wanted.report)


def test_a_file_that_was_cut_is_named(device: CpuDevice, tmp_path: Path) -> None:
    """Fault: the error of a thread that reads is lost, or threads that wait for it wait on."""
    checkpoint = checkpoint_of(tmp_path, [Stored("a", "Q4_0", 4096), Stored("b", "Q4_0", 64)])
    path = checkpoint.path
    path.write_bytes(path.read_bytes()[:-1000])
    rules = [matrix("a", K, ("a", 4096)), matrix("b", K, ("b", 64))]
    with pytest.raises(CheckpointError, match=r"w\.bin: ends inside blk\.b; fetch the file again"):
        Filled(device, rules, checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"w\.bin: cannot read blk\.a: No such file"):
        Filled(device, rules, checkpoint)


def test_an_error_that_does_not_come_again_is_told(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "load_parts", lambda parts, hash_: (0, 5))
    checkpoint = checkpoint_of(tmp_path, [Stored("a", "Q4_0", 64)])
    with pytest.raises(CheckpointError, match=r"cannot read blk\.a: Input/output error"):
        Filled(device, [matrix("a", K, ("a", 64))], checkpoint)


def test_the_hash_is_xxh3(device: CpuDevice) -> None:
    """Fault: a stripe is taken twice, or not, where parts meet."""
    rng = rng_for("hash")
    for _ in range(300):
        sizes = rng.choice([0, 1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 5000], 6)
        parts = [rng.bytes(int(n)) for n in (*sizes, 241)]
        hash_ = device.new_hash()
        assert device.load_parts([FilePart(part) for part in parts], hash_) is None
        assert hash_.hexdigest() == xxhash.xxh3_128_hexdigest(b"".join(parts))


def test_memory_of_others_is_no_room(device: CpuDevice) -> None:
    memory = device.allocate("weights", 100)
    assert device.room(memory.address + 10, 90).nbytes == 90
    for address, nbytes in ((memory.address + 10, 91), (memory.address - 1, 1)):
        with pytest.raises(BackendError, match="not in memory of this device"):
            device.room(address, nbytes)
