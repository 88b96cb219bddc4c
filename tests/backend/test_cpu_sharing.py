"""Promise: who computes what on the CPU may depend on timing; that all of it is computed once, and
to the same bits, does not. And the memory that they walk through is fit for it.

Weights here are large enough to be handed out in pieces (common.h, `claim`), and have an odd end.
"""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt.backends.cache import Binary
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import device as cpu_device
from flashrt.backends.cpu.device import CpuDevice
from flashrt.ops.table import OPS
from tests.backend.cases import attention, linear
from tests.backend.runner import Runner


class Claim(ctypes.Structure):
    """As in common.h."""

    _fields_ = (
        ("n", ctypes.c_int64), ("most", ctypes.c_int64), ("least", ctypes.c_int64),
        ("nt", ctypes.c_int), ("begin", ctypes.c_int64), ("end", ctypes.c_int64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel library once more: a pool, a workspace and a count of claims of its own."""
    path = toolchain.library(OPS).path
    return Path(shutil.copy(path, tmp_path_factory.mktemp("library") / "copy.so"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test makes of the process's pool is undone."""
    yield
    CpuDevice().build(OPS)


@given(
    n=st.integers(0, 300), most=st.integers(1, 40), least=st.integers(1, 40),
    nt=st.integers(1, 5), order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_unit_is_claimed_once(
    copy: Path, n: int, most: int, least: int, nt: int, order: random.Random
) -> None:
    library = ctypes.CDLL(str(copy))
    for size in (1, 2, 1):  # starting and stopping threads forgets what was claimed
        assert library.flashrt_pool_start(size) == 0
    claims = [Claim(n=n, most=most, least=least, nt=nt) for _ in range(nt)]
    units: list[int] = []
    while claims:
        claim = order.choice(claims)
        if not library.flashrt_claim(ctypes.byref(claim)):
            claims.remove(claim)
            continue
        piece = claim.end - claim.begin
        assert min(least, most, n - claim.begin) <= piece <= most
        units += range(claim.begin, claim.end)
    assert units == list(range(n))


@pytest.mark.parametrize("rows", [1, 4, 13, 60])
def test_large_weights_give_the_same_bits_with_any_number_of_threads(
    threads: None, rows: int
) -> None:
    case = linear(64, rows, K=1030, N=2070)
    results = [Runner(CpuDevice(threads=n)).run(case)["y"] for n in (1, 2, 3)]
    assert np.isfinite(results[0][:rows]).all()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_many_key_blocks_give_the_same_bits_with_any_number_of_threads(
    threads: None, rows: int
) -> None:
    case = attention(rows, rows, heads=(4, 2), D=32, position=3000, S=3100, kv="bf16")
    results = [Runner(CpuDevice(threads=n)).run(case)["y"] for n in (1, 2, 3)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].view(np.uint32), other.view(np.uint32))


def test_without_room_to_pack_them_rows_go_one_by_one(
    copy: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = linear(8, 5, K=1030, N=2070)
    usual = Runner(CpuDevice(threads=2)).run(case)["y"]
    library = Binary(copy, copy.read_bytes(), "", was_cached=True)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: library)
    monkeypatch.setattr(cpu_device, "_workspace_nbytes", lambda *_: 0)
    other = Runner(CpuDevice(threads=2)).run(case)["y"]
    np.testing.assert_array_equal(usual[:5].view(np.uint32), other[:5].view(np.uint32))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_the_arena_may_have_huge_pages() -> None:
    """Linux gives them to private memory alone; mmap shares by default."""
    memory = cpu_device.HostMemory(1 << 20)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags, *_ = line.split()
        first, end = (int(word, 16) for word in span.split("-"))
        if first <= memory.address < end:
            assert flags == "rw-p"
            return
    raise AssertionError("the arena is in no mapping")
