"""The pool allocator: blocks tile the band, all or nothing, coalescing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.base.errors import PlanError, PoolFull
from flashrt.capsule.pool import Pool


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_blocks_never_overlap_and_all_comes_back(steps: list[tuple[bool, int]]) -> None:
    pool = Pool(512, 16384)
    held: dict[int, int] = {}
    for is_take, n in steps:
        if is_take:
            try:
                (offset,) = pool.take(n)
            except PoolFull:
                continue
            if offset >= 0:
                assert all(offset + n <= o or o + m <= offset for o, m in held.items())
                assert offset >= 512 and offset + n <= 512 + 16384
                held[offset] = n
        elif held:
            offset = sorted(held)[n % len(held)]
            pool.give(offset)
            del held[offset]
        pool.check_integrity()
    for offset in held:
        pool.give(offset)
    assert pool.take(16384) == (512,)


def test_all_blocks_or_none() -> None:
    pool = Pool(0, 1024)
    with pytest.raises(PoolFull, match="pool_bytes"):
        pool.take(512, 1024)
    assert pool.free_nbytes == 1024
    pool.check_integrity()


def test_a_block_is_given_back_once() -> None:
    pool = Pool(0, 1024)
    (block,) = pool.take(100)
    pool.give(block)
    with pytest.raises(PlanError, match="not a block in use"):
        pool.give(block)
