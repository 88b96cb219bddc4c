"""One suite for every backend: what core.backend promises, byte by byte, on cpu, simt and cuda.

Kernels of models are tested elsewhere; here the only launch is `advance`: memory is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.cuda.device import Capacities, CudaDevice, open_device
from flashrt.backends.cuda.graph import CudaGraph
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError, SealedError
from flashrt.core.backend import Backend, BoundLaunch, Bytes
from flashrt.core.copylist import Copy, CopyList, Upload
from flashrt.core.digest import DigestTerm, digest_reference, region_seed
from flashrt.core.op import bind
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.ops.table import ADVANCE, CURSOR_WORDS, OPS

ARENA_BYTES = 4 << 20
# Small staging, so that every ring and table wraps in these tests.
SMALL = Capacities(staging_bytes=64 << 10, copies=16, terms=4)
OPENERS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: CpuDevice(2),
    "simt": lambda: SimtDevice(capacities=SMALL),
    "simt-shuffled": lambda: SimtDevice("high", seed=7, capacities=SMALL),
    "cuda": open_device,
}


@dataclass(slots=True)
class Bench:
    """A built backend, its arena, and a host mirror of what the arena should hold."""

    backend: Backend
    base: int
    mirror: Bytes

    def write(self, offset: int, data: Bytes) -> None:
        self.backend.write(self.base + offset, data)
        self.mirror[offset : offset + data.size] = data.reshape(-1)

    def fill(self, offset: int, nbytes: int, byte: int) -> None:
        self.backend.fill(self.base + offset, nbytes, byte)
        self.mirror[offset : offset + nbytes] = byte

    def copy(self, *copies: Copy) -> None:
        moves = CopyList(copies).check(ARENA_BYTES)
        self.backend.copy(moves, self.base, self.base)
        for c in copies:
            for row in range(c.height):
                src, dst = c.src + row * c.src_pitch, c.dst + row * c.dst_pitch
                self.mirror[dst : dst + c.width] = self.mirror[src : src + c.width]

    def read(self, offset: int = 0, nbytes: int = ARENA_BYTES) -> Bytes:
        out = np.full(nbytes, 0xEE, np.uint8)
        self.backend.read(self.base + offset, out)
        return out

    def check(self) -> None:
        got = self.read()
        wrong = np.flatnonzero(got != self.mirror)
        assert not wrong.size, f"{wrong.size} bytes differ, the first at {wrong[0]}"


@pytest.fixture(scope="module", params=[
    "cpu", "simt", "simt-shuffled", pytest.param("cuda", marks=pytest.mark.gpu),
])  # fmt: skip
def opened(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One device per module: opening and building is not what these tests are about."""
    backend = OPENERS[request.param]()
    backend.build(OPS)
    memory = backend.allocate("arena", ARENA_BYTES)
    yield Bench(backend, memory.address, np.zeros(ARENA_BYTES, np.uint8))
    backend.close()


@pytest.fixture
def bench(opened: Bench) -> Bench:
    opened.write(0, random_bytes(ARENA_BYTES))
    return opened


def random_bytes(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def test_write_then_read(bench: Bench) -> None:
    for offset, nbytes in ((0, 1), (3, 7), (255, 257), (100_001, 65_537), (1 << 20, 1_000_003)):
        bench.write(offset, random_bytes(nbytes, offset))
    bench.check()
    for offset, nbytes in ((1, 1), (70_001, 131_072), (5, 262_143)):
        assert (bench.read(offset, nbytes) == bench.mirror[offset : offset + nbytes]).all()


def test_write_takes_the_bytes_at_once(bench: Bench) -> None:
    """The caller may reuse its array as soon as write returns, however far behind the device is."""
    data = np.empty(3000, np.uint8)
    for i in range(200):  # several times the staging
        data[:] = i
        bench.write(4096 + 3000 * i, data)
    data[:] = 255
    bench.check()


def test_writes_and_fills_take_effect_in_order(bench: Bench) -> None:
    for i in range(50):
        bench.write(1000, np.full(64, i, np.uint8))
        bench.fill(1016, 16, 255 - i)
        bench.copy(Copy(1000, 2000 + 64 * i, 64))
    bench.check()


@pytest.mark.parametrize("src_skew", [0, 1, 4, 8, 15])
@pytest.mark.parametrize("dst_skew", [0, 2, 4, 13])
def test_copies_at_any_alignment(bench: Bench, src_skew: int, dst_skew: int) -> None:
    sizes = [1, 2, 3, 7, 15, 16, 17, 64, 255, 4097]
    copies = [
        Copy(8192 * i + src_skew, (1 << 20) + 8192 * i + dst_skew, n) for i, n in enumerate(sizes)
    ]
    bench.copy(*copies)
    bench.check()


@pytest.mark.parametrize(
    ("width", "src_pitch", "dst_pitch"),
    [(64, 64, 64), (48, 64, 256), (48, 256, 64), (5, 7, 9), (16, 16, 48), (1, 3, 2), (33, 40, 64)],
)
@pytest.mark.parametrize("n_copies", [1, 3])
def test_copies_of_any_pitch(
    bench: Bench, width: int, src_pitch: int, dst_pitch: int, n_copies: int
) -> None:
    bench.copy(
        *(
            Copy(i * 65_536 + 16 * i, (1 << 20) + i * 65_536 + i, width, 60, src_pitch, dst_pitch)
            for i in range(n_copies)
        )
    )
    bench.check()


def test_plan_larger_than_a_table(bench: Bench) -> None:
    bench.copy(*(Copy(2000 * i, (2 << 20) + 2001 * i, 1 + 41 * i) for i in range(45)))
    bench.check()


def test_large_and_small_copies_in_one_plan(bench: Bench) -> None:
    bench.copy(
        Copy(0, 2 << 20, 1 << 20),
        Copy(3 << 20, (3 << 20) + 1000, 3),
        Copy(1 << 20, 3_300_000, 4096),
    )
    bench.check()


def test_rows_of_an_upload_go_together() -> None:
    """Counted by the driver. Red where a restore from host memory is a call per row."""
    device = SimtDevice(capacities=SMALL)
    device.build(OPS)
    memory = device.allocate("arena", 1 << 20)
    source = random_bytes(64 * 500)
    device.fill(memory.address, 1 << 20, 0)
    before = device.driver.counts.copy()
    moves = CopyList((Copy(20, 1000, 300, 64, 500 - 3, 4096),))
    device.upload([Upload(source, moves)], memory.address)
    used = device.driver.counts - before
    per_section = SMALL.staging_bytes // 300
    assert used["cuMemcpy2DAsync"] == -(-64 // per_section)
    assert not used["cuMemcpyHtoDAsync"]
    out = np.empty(1 << 20, np.uint8)
    device.read(memory.address, out)
    for row in range(64):
        at = 1000 + 4096 * row
        assert (out[at : at + 300] == source[20 + 497 * row :][:300]).all()
        assert not out[at + 300 : at + 4096].any()
    device.close()


def test_an_empty_list_does_nothing(bench: Bench) -> None:
    before = replace(bench.backend.counters)
    bench.copy()
    bench.check()
    assert bench.backend.counters == before


def test_bases_are_added_to_each_side(bench: Bench) -> None:
    moves = CopyList((Copy(10, 20, 30), Copy(100, 200, 40, 2, 50, 60)))
    bench.backend.copy(moves, bench.base + 1000, bench.base + 5000)
    for c in moves:
        for row in range(c.height):
            src, dst = 1000 + c.src + row * c.src_pitch, 5000 + c.dst + row * c.dst_pitch
            bench.mirror[dst : dst + c.width] = bench.mirror[src : src + c.width]
    bench.check()


def test_uploads_take_rows_out_of_host_bytes(bench: Bench) -> None:
    source = np.random.default_rng(3).integers(0, 256, 300_000, np.uint8)
    other = ~source[:5000]
    uploads = [
        Upload(source, CopyList((Copy(7, 9, 90_001), Copy(100_000, 200_000, 30, 40, 33, 1000)))),
        Upload(other, CopyList((Copy(1, 100_000, 4000),))),
    ]
    expected = [source.copy(), other.copy()]
    bench.backend.upload(uploads, bench.base)
    source[:], other[:] = 0, 0  # they may change as soon as the call returns
    for upload, host in zip(uploads, expected, strict=True):
        for c in upload.moves.check(ARENA_BYTES, host.size):
            for row in range(c.height):
                src, dst = c.src + row * c.src_pitch, c.dst + row * c.dst_pitch
                bench.mirror[dst : dst + c.width] = host[src : src + c.width]
    bench.check()


@pytest.mark.parametrize("how", ["write", "fill", "copy", "copies", "upload"])
def test_reads_that_have_begun_are_not_overtaken(bench: Bench, how: str) -> None:
    """Two at once, one of them longer than the staging; their ranges are overwritten at once."""
    bench.write(0, np.random.default_rng(8).integers(0, 256, 900_000, np.uint8))
    expected = bench.mirror[:900_000].copy()
    long, short = (
        bench.backend.begin_read(bench.base, 700_000),
        bench.backend.begin_read(bench.base + 800_000, 70_001),
    )
    if how == "write":
        bench.write(0, np.zeros(900_000, np.uint8))
    elif how == "fill":
        bench.fill(0, 900_000, 7)
    elif how == "copy":
        bench.copy(Copy(1 << 20, 0, 900_000))
    elif how == "copies":
        bench.copy(Copy(1 << 20, 0, 800_000), Copy(2 << 20, 800_000, 100_000))
    else:
        zeros = np.zeros(900_000, np.uint8)
        bench.backend.upload([Upload(zeros, CopyList((Copy(0, 0, 900_000),)))], bench.base)
        bench.mirror[:900_000] = 0
    bench.check()
    assert np.array_equal(short(), expected[800_000:870_001])
    assert np.array_equal(long(), expected[:700_000])
    assert np.array_equal(short(), expected[800_000:870_001])


def test_reads_begin_after_what_was_asked_before(bench: Bench) -> None:
    bench.write(5, np.arange(200, dtype=np.uint8))
    assert np.array_equal(bench.backend.begin_read(bench.base, 210)(), bench.mirror[:210])


def test_fill_of_any_extent(bench: Bench) -> None:
    for offset, nbytes, byte in ((0, 1, 0), (33, 5, 255), (70_000, 100_001, 0x5A), (9, 0, 1)):
        bench.fill(offset, nbytes, byte)
    bench.check()


def test_work_behind_a_busy_stream_stays_in_order(bench: Bench) -> None:
    """Large copies keep the device busy; what follows must see their results, and only those."""
    half = ARENA_BYTES // 2
    for i in range(24):
        bench.fill(0, half, i)
        bench.copy(Copy(0, half, half))
        bench.write(half + 1000 * i, np.full(10, 200 + i, np.uint8))
    assert (bench.read(half, 16) == bench.mirror[half : half + 16]).all()
    bench.check()


# ---- planted faults: what the driver double is for


def test_an_upload_ring_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimtDevice(capacities=SMALL)
    memory = device.allocate("arena", 1 << 20)
    monkeypatch.setattr(device.driver, "event_sync", lambda event: None)
    for i in range(16):  # each fills a section of the ring, of which there are four
        device.write(memory.address + 65_536 * i, np.full(65_536, i, np.uint8))
    monkeypatch.undo()
    out = np.empty(1 << 20, np.uint8)
    device.read(memory.address, out)
    assert (out[::65_536] != np.arange(16)).sum() == 12, "the last four writes alone survive"
    device.close()


def test_a_readback_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimtDevice(capacities=SMALL)
    memory = device.allocate("arena", 4096)
    device.write(memory.address, np.full(4096, 5, np.uint8))
    monkeypatch.setattr(device.driver, "event_sync", lambda event: None)
    out = np.empty(4096, np.uint8)
    device.read(memory.address, out)
    assert not (out == 5).any()
    monkeypatch.undo()
    device.close()


def test_close_twice_is_fine() -> None:
    device = SimtDevice(capacities=SMALL)
    device.close()
    device.close()


# ---- digest


def term(offset: int, region: str, bits: np.ndarray, pitch: int, **rows: int) -> DigestTerm:
    planes, n_rows, cols = bits.shape
    start, origin = rows.get("start", 0), rows.get("origin", 0)
    return DigestTerm(
        offset, region_seed(region), planes, start, start + n_rows, origin, cols, pitch,
        bits.itemsize, layout=0,
    )  # fmt: skip


def test_digest_is_the_reference(bench: Bench) -> None:
    rng = np.random.default_rng(1)
    terms, wanted, offset = [], [], 0
    for i, (planes, rows, cols, dtype) in enumerate(
        [(1, 1, 1, np.uint32), (1, 1, 5000, np.uint32), (3, 17, 24, np.uint16),
         (2, 1, 7, np.uint16),         (4, 33, 16, np.uint32), (1, 64, 128, np.uint16)]
    ):  # fmt: skip
        bits = rng.integers(0, 1 << (8 * np.dtype(dtype).itemsize), (planes, rows, cols), dtype)
        padding, start = 5 * cols * bits.itemsize, 3 * i
        pitch = rows * cols * bits.itemsize + padding  # other rows follow, which do not count
        for plane in range(planes):
            bench.write(offset + plane * pitch, bits[plane].reshape(-1).view(np.uint8))
        terms.append(term(offset, f"r{i}", bits, pitch, start=start, origin=start))
        wanted.append(digest_reference(bits, region_seed(f"r{i}"), start))
        offset += planes * pitch + 256 - (planes * pitch) % 256
    assert bench.backend.digest(terms, bench.base) == wanted
    assert bench.backend.digest([], bench.base) == []


def test_digest_sees_rows_of_a_segment_where_they_are(bench: Bench) -> None:
    """Rows [start, stop) of a store whose first row is `origin`."""
    bits = np.random.default_rng(2).integers(0, 1 << 16, (2, 40, 8), np.uint16)
    bench.write(0, bits.reshape(-1).view(np.uint8))
    pitch = 40 * 8 * 2
    part = DigestTerm(0, 99, 2, 37, 60, 32, 8, pitch, 2, 0)
    assert bench.backend.digest([part], bench.base) == [digest_reference(bits[:, 5:28], 99, 37)]


# ---- storage


@pytest.mark.parametrize(
    "region",
    [
        Region("plain", (5, 7), DType.F32, Role.FIXED),
        Region("state", (3, 9, 20), DType.F32, Role.FIXED, Layout.COLUMN_BLOCKS),
        Region("matrix", (40, 70), DType.BF16, Role.WEIGHT, Layout.MATRIX),
        Region("keys", (2, 64, 24), DType.BF16, Role.ROWS, Layout.ROWS_IN_LANES),
        Region("values", (2, 64, 40), DType.BF16, Role.ROWS, Layout.COLS_IN_LANES),
        Region("tokens", (1, 64, 1), DType.I32, Role.ROWS),
    ],
    ids=lambda region: region.name,
)
def test_storage_round_trip(bench: Bench, region: Region) -> None:
    storage = bench.backend.storage(region)
    assert storage.nbytes >= storage.lead_nbytes > 0
    rng = np.random.default_rng(3)
    if region.dtype is DType.BF16:
        array: np.ndarray = rng.integers(0, 1 << 16, region.shape, np.uint16)
    else:
        array = rng.integers(0, 1 << 30, region.shape).astype(np.int32)
        array = array if region.dtype is DType.I32 else array.view(np.float32)
    raw = np.zeros(storage.nbytes, np.uint8)
    bench.backend.pack(region, array, raw)
    back = bench.backend.unpack(region, raw)
    assert back.shape == region.shape
    assert back.view(np.uint8).tobytes() == array.view(np.uint8).tobytes()


# ---- launches


def advance(bench: Bench, offset: int = 0) -> BoundLaunch:
    cursor = Region("cursor", (CURSOR_WORDS,), DType.I32, Role.FIXED)
    return BoundLaunch(bind(ADVANCE, {"cursor": cursor}, {}), (bench.base + offset,))


def set_cursor(bench: Bench, position: int, rows: int) -> None:
    cursor = np.zeros(CURSOR_WORDS, np.int32)
    cursor[:2] = position, rows
    bench.backend.write(bench.base, cursor.view(np.uint8))


def position(bench: Bench) -> int:
    return int(bench.read(0, 4).view(np.int32)[0])


def test_replay_equals_eager(bench: Bench) -> None:
    launches = [advance(bench)] * 3
    set_cursor(bench, 100, 7)
    bench.backend.eager(launches)
    assert position(bench) == 121
    set_cursor(bench, 100, 7)
    graph = bench.backend.capture(launches)
    bench.backend.sync()
    assert position(bench) == 100, "capture runs nothing"
    assert graph.n_launches == 3
    for _ in range(5):
        bench.backend.replay(graph)
    assert position(bench) == 100 + 5 * 21


def test_replay_sees_earlier_writes_and_not_later_ones(bench: Bench) -> None:
    graph = bench.backend.capture([advance(bench)])
    for i in range(100):
        set_cursor(bench, i, 1000)
        bench.backend.replay(graph)
        bench.backend.copy(CopyList((Copy(0, 4096 + 4 * i, 4),)), bench.base, bench.base)
    bench.backend.sync()
    got = bench.read(4096, 400).view(np.int32)
    assert (got == np.arange(100) + 1000).all()


# ---- counters, seal, errors


@pytest.fixture(params=["cpu", "simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def fresh(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A device of its own, for tests that seal or break it."""
    backend = OPENERS[request.param]()
    yield backend
    backend.close()


def test_counters_count(fresh: Backend) -> None:
    fresh.build(OPS)
    memory = fresh.allocate("arena", ARENA_BYTES)
    bench = Bench(fresh, memory.address, np.zeros(ARENA_BYTES, np.uint8))
    set_cursor(bench, 0, 1)
    before = replace(fresh.counters)
    graph = fresh.capture([advance(bench)])
    fresh.replay(graph)
    fresh.replay(graph)
    fresh.eager([advance(bench)])
    fresh.copy(CopyList((Copy(0, 100, 10), Copy(200, 300, 5, 2, 10, 10))), bench.base, bench.base)
    now = fresh.counters
    assert fresh.counters.allocations == before.allocations == 1
    assert (now.captures, now.replays) == (before.captures + 1, before.replays + 2)
    assert now.launches == before.launches + 1
    assert (now.copies, now.copied_bytes) == (before.copies + 1, before.copied_bytes + 20)


def test_sealed_device_allocates_compiles_and_captures_nothing(fresh: Backend) -> None:
    fresh.build(OPS)
    memory = fresh.allocate("arena", ARENA_BYTES)
    bench = Bench(fresh, memory.address, np.zeros(ARENA_BYTES, np.uint8))
    set_cursor(bench, 0, 1)
    graph = fresh.capture([advance(bench)])
    fresh.seal()
    for forbidden in (
        lambda: fresh.build(OPS),
        lambda: fresh.allocate("more", 1),
        lambda: fresh.capture([advance(bench)]),
    ):
        with pytest.raises(SealedError, match="after seal"):
            forbidden()
    frozen = replace(fresh.counters)
    calls = fresh.driver.counts.copy() if isinstance(fresh, CudaDevice) else {}
    for i in range(20):
        bench.write(1 << 20, random_bytes(100_000, i))
        fresh.replay(graph)
        bench.copy(*(Copy(100 * j, (2 << 20) + 100 * j, 50) for j in range(1, 40)))
        fresh.digest([DigestTerm(0, 1, 1, 0, 1, 0, 16, 64, 4, 0)] * 9, bench.base)
        bench.read(0, 200_000)
    now = fresh.counters
    assert (now.allocations, now.compilations, now.captures) == (
        frozen.allocations, frozen.compilations, frozen.captures,
    )  # fmt: skip
    assert now.replays == frozen.replays + 20
    assert position(bench) == 20
    if isinstance(fresh, CudaDevice):
        used = fresh.driver.counts - calls
        assert used["cuGraphLaunch"] == 20
        made = [name for name in used if "Alloc" in name or "Module" in name or "Create" in name]
        assert not made, f"after seal the driver was asked for {made}"


def test_use_before_build_says_so(fresh: Backend) -> None:
    memory = fresh.allocate("arena", 4096)
    bench = Bench(fresh, memory.address, np.zeros(4096, np.uint8))
    with pytest.raises(BackendError, match=r"build\(\)"):
        fresh.eager([advance(bench)])


def test_used_up_memory_says_how_much_was_wanted(fresh: Backend) -> None:
    with pytest.raises(BackendError, match=r"1125899906842624|1,125,899,906,842,624"):
        fresh.allocate("arena", 1 << 50)


def test_device_memory_that_is_full(tmp_path: Path) -> None:
    del tmp_path
    device = SimtDevice(memory_bytes=32 << 20)
    device.allocate("weights", 16 << 20)
    with pytest.raises(BackendError, match=r"arena: .*OUT_OF_MEMORY, 16,777,216 bytes wanted"):
        device.allocate("arena", 16 << 20)
    device.allocate("arena", 1 << 20)  # the device is as good as before
    device.close()


def test_kernel_digest_tells_devices_apart(fresh: Backend) -> None:
    fresh.build(OPS)
    first = fresh.kernel_digest
    assert len(first) >= 32
    assert fresh.kernel_digest == first


def test_graph_as_graphviz(tmp_path: Path) -> None:
    device = SimtDevice(capacities=SMALL)
    device.build(OPS)
    memory = device.allocate("arena", 4096)
    bench = Bench(device, memory.address, np.zeros(4096, np.uint8))
    graph = device.capture([advance(bench)] * 2)
    assert isinstance(graph, CudaGraph)
    assert [node.name for node in graph.nodes] == ["advance", "advance"]
    graph.write_dot(tmp_path / "graph.dot")
    assert "node0 -> node1" in (tmp_path / "graph.dot").read_text()
    device.close()
