"""Weights without a file: drawn on the device for benchmarks, or on the host, as a file would hold
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.extra_ops import BYTE_SUM_DEVIATION, add_kernels, random_fill
from flashrt.backends.cuda.layouts import K_CHUNK, ROW_TILE
from flashrt.base.errors import CheckpointError
from flashrt.commands.bench.gpu.engine import load_synthetic
from flashrt.core.backend import BoundLaunch
from flashrt.ops import OPS
from flashrt.weights.checkpoint import Tensor, open_checkpoint
from flashrt.weights.random_checkpoint import SHAPES, write_random_checkpoint
from flashrt.weights.synthetic import SyntheticCheckpoint, synthetic_checkpoint
from tests.gpu.conftest import open_named

VECTORS = 3000


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def reference(seed: int, deviation: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        key = mixed(np.array([seed + 0x9E3779B9], np.uint64).astype(np.uint32))
        r = mixed(mixed(np.arange(8 * VECTORS, dtype=np.uint32)) ^ key)
    total = r.view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int32) - 510
    scale = np.float32(deviation / BYTE_SUM_DEVIATION)
    return (total.astype(np.float32) * scale).astype(ml_dtypes.bfloat16).view(np.uint16)


def test_fill_is_the_reference_to_the_bit(device_name: str) -> None:
    device = open_named(device_name)
    try:
        add_kernels(device)
        device.build(OPS)
        at = device.allocate("w", 16 * (VECTORS + 1)).address
        device.fill(at, 16 * (VECTORS + 1), 0xA5)
        device.eager([random_fill(at, 16 * VECTORS, seed=7, deviation=0.02)])
        found = np.empty(8 * (VECTORS + 1), np.uint16)
        device.read(at, found.view(np.uint8))
    finally:
        device.close()
    assert np.array_equal(found[:-8], reference(7, 0.02))
    assert (found[-8:] == 0xA5A5).all()
    values = found[:-8].view(ml_dtypes.bfloat16).astype(np.float64)
    assert abs(values.mean()) < 0.02 * 4 / np.sqrt(values.size)
    assert values.std() == pytest.approx(0.02, rel=0.03)


def test_a_synthetic_checkpoint_holds_what_a_written_one_holds(tmp_path: Path) -> None:
    written = open_checkpoint(write_random_checkpoint(tmp_path / "random", "tiny", seed=5))
    drawn = synthetic_checkpoint("tiny", seed=5)
    assert dict(drawn.config) == dict(written.config)
    assert {n: t.shape for n, t in drawn.tensors.items()} == {
        n: t.shape for n, t in written.tensors.items()
    }
    for name, tensor in drawn.tensors.items():
        if written.tensors[name].dtype != tensor.dtype:
            continue  # vectors: rounded to bfloat16 in the file
        ours, theirs = bytearray(tensor.nbytes), bytearray(tensor.nbytes)
        drawn.read_into(tensor, 0, memoryview(ours))
        written.read_into(written.tensors[name], 0, memoryview(theirs))
        assert ours == theirs, name
        tail = bytearray(2)
        drawn.read_into(tensor, tensor.nbytes - 2, memoryview(tail))
        assert tail == theirs[-2:]
    with pytest.raises(CheckpointError, match="leave its"):
        drawn.read_into(next(iter(drawn.tensors.values())), 0, memoryview(bytearray(1 << 20)))
    written.close()


@pytest.mark.parametrize(
    ("shape", "billions"), [("0.8b", 0.752), ("4b", 4.206), ("9b", 8.953), ("27b", 26.896)]
)
def test_named_shapes_have_as_many_parameters_as_their_models(shape: str, billions: float) -> None:
    tensors = synthetic_checkpoint(shape).tensors.values()
    n_parameters = sum(t.nbytes // (4 if t.dtype == "F32" else 2) for t in tensors)
    assert n_parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert SHAPES[shape].vocab_size == 248320


def test_no_matrix_of_whole_tiles_is_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when the engine does not call the fill that it was given: every weight is then drawn on
    the host, which takes an hour for a large shape.
    """
    read: set[str] = set()
    filled: list[str] = []
    read_into, eager = SyntheticCheckpoint.read_into, CudaDevice.eager

    def reading(self: SyntheticCheckpoint, tensor: Tensor, first: int, out: memoryview) -> None:
        read.add(tensor.stored_name)
        read_into(self, tensor, first, out)

    def launching(self: CudaDevice, launches: Sequence[BoundLaunch]) -> None:
        filled.extend(bound.launch.op.name for bound in launches)
        eager(self, launches)

    monkeypatch.setattr(SyntheticCheckpoint, "read_into", reading)
    monkeypatch.setattr(CudaDevice, "eager", launching)
    made = load_synthetic(lambda: open_named("simt"), "tiny", max_positions=128)
    made.engine.close()
    whole = {
        source.name
        for rule in made.engine.model.weights
        if rule.is_matrix and rule.region.shape[1] % K_CHUNK == 0
        if all(source.shape[0] % ROW_TILE == 0 for source in rule.sources)
        for source in rule.sources
    }
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"} <= whole
    assert filled == ["random_fill"] * len(whole)
    assert read == set(synthetic_checkpoint("tiny").tensors) - whole


def test_weights_spread_as_in_a_written_checkpoint(device_name: str) -> None:
    """Tiny has matrices of both kinds: filled on the device, and loaded (heads off the tiles)."""
    made = load_synthetic(lambda: open_named(device_name), "tiny", max_positions=128)
    engine = made.engine
    try:
        base = engine.arena.weight_memory.address
        for slot in engine.arena.weights.slots:
            raw = np.empty(slot.storage.nbytes, np.uint8)
            made.gpu.read(base + slot.offset, raw)
            array = made.gpu.unpack(slot.region, raw)
            is_matrix = array.dtype == np.uint16
            values = array.view(ml_dtypes.bfloat16) if is_matrix else array
            assert np.isfinite(values.astype(np.float32)).all(), slot.region.name
            if slot.region.name == "layers.0.gate_up":
                spread = values.astype(np.float64).std() * np.sqrt(values.shape[1])
                assert spread == pytest.approx(1.2, rel=0.05)
        with engine.session() as session:
            session.prefill(range(20))
            logits = session.logits()
        assert np.isfinite(logits).all()
        assert 0.5 < logits.std() < 10
    finally:
        engine.close()
