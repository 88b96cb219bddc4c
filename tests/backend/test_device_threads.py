"""A device in several threads: each finds its own bytes, whatever the others move meanwhile.

An engine gives its turn up while a kernel runs, so that verbs of other threads come in between.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flashrt.core.backend import Backend
from flashrt.core.copylist import Copy, CopyList, Upload
from flashrt.core.digest import DigestTerm
from flashrt.ops import OPS
from tests.backend.conftest import BACKENDS, make_backend

THREADS, ROUNDS = 6, 25
RANGE = 64 << 10


@pytest.fixture(params=BACKENDS)
def fresh(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend, interval = make_backend(request.param), sys.getswitchinterval()
    backend.build(OPS)
    sys.setswitchinterval(1e-6)
    yield backend
    sys.setswitchinterval(interval)
    backend.close()


def term(nbytes: int) -> DigestTerm:
    """A plain row of `nbytes` at offset 0 of what is digested."""
    return DigestTerm(
        offset=0, seed=3, planes=1, start=0, stop=1, origin=0, cols=nbytes // 4, pitch=nbytes,
        elem_nbytes=4, layout=0,
    )  # fmt: skip


def test_verbs_of_threads_do_not_mix(fresh: Backend) -> None:
    """Red before, on cuda and simt: the table of one thread's copies was another's by the time of
    the launch, and sections of the rings were used twice.
    """
    memory = fresh.allocate("arena", THREADS * RANGE)
    pieces = [Copy(i * 512, RANGE // 2 + (31 - i) * 512, 300) for i in range(32)]

    def work(mine: int) -> bool:
        base, rng = memory.address + mine * RANGE, np.random.default_rng(mine)
        out = np.empty(RANGE // 2, np.uint8)
        for _ in range(ROUNDS):
            data = rng.integers(0, 256, RANGE // 2, np.uint8)
            expected = np.zeros(RANGE // 2, np.uint8)
            for piece in pieces:
                to = piece.dst - RANGE // 2
                expected[to : to + piece.width] = data[piece.src : piece.src + piece.width]
            fresh.write(base, data)
            fresh.fill(base + RANGE // 2, RANGE // 2, 0)
            fresh.copy(CopyList(tuple(pieces)), base, base)
            arrive = fresh.begin_read(base + RANGE // 2, RANGE // 2)
            (sums,) = fresh.digest([term(RANGE // 2)], base + RANGE // 2)
            fresh.fill(base + RANGE // 2, RANGE // 2, 0)
            fresh.upload([Upload(expected, CopyList((Copy(0, RANGE // 2, RANGE // 2),)))], base)
            (again,) = fresh.digest([term(RANGE // 2)], base + RANGE // 2)
            fresh.read(base + RANGE // 2, out)
            if sums != again or (arrive() != expected).any() or (out != expected).any():
                return False
        return True

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
