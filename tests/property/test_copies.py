"""Copy lists: exactly those are refused in which a byte is written twice, or written and read."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashrt.base.errors import PlanError
from flashrt.core.copylist import Copy, CopyList

NBYTES = 80
ROOM = st.integers(0, 40)
HEIGHT, PITCH = st.sampled_from([3, 3, 3, 1, 4]), st.sampled_from([10, 10, 10, 9])


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    """Small, so that they often touch; pitches are often equal, as in rows of one region."""
    width, height = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pitch = st.one_of(st.just(8), st.integers(width, 10))
    return Copy(draw(ROOM), draw(ROOM), width, height, draw(pitch), draw(pitch))


@st.composite
def combs(draw: st.DrawFn) -> list[Copy]:
    """Rows of one region from several segments, with odd ones among them: they interleave."""
    starts = draw(st.lists(st.integers(0, 9), max_size=5))
    return [
        Copy(draw(ROOM), 20 + start, draw(st.integers(1, 3)), draw(HEIGHT), 3, draw(PITCH))
        for start in starts
    ]


def footprint(first: int, width: int, height: int, pitch: int) -> set[int]:
    return {first + row * pitch + i for row in range(height) for i in range(width)}


@given(st.lists(copies(), max_size=3), combs(), st.booleans())
@example([], [Copy(0, 20, 2, 3, 3, 10), Copy(0, 22, 2, 3, 3, 9)], False)  # another pitch
@example([Copy(0, 24, 1, 2, 3, 11)], [Copy(0, 20, 2, 3, 3, 10), Copy(0, 25, 1, 3, 3, 10)], False)
@settings(max_examples=600, deadline=None)
def test_overlap_is_found_exactly(some: list[Copy], comb: list[Copy], is_same_memory: bool) -> None:
    """Against sets of bytes. Red in every direction in which the check errs; before it was made,
    no overlap was found at all.
    """
    moves = [*comb, *some]
    written = [footprint(c.dst, c.width, c.height, c.dst_pitch) for c in moves]
    read = set().union(*(footprint(c.src, c.width, c.height, c.src_pitch) for c in moves))
    together: set[int] = set().union(*written)
    collide = sum(map(len, written)) > len(together) or (is_same_memory and bool(together & read))
    listed = CopyList(moves)
    if collide:
        with pytest.raises(PlanError, match=r"write the same bytes|writes what"):
            listed.check(NBYTES, None if is_same_memory else NBYTES)
    else:
        assert listed.check(NBYTES, None if is_same_memory else NBYTES) is listed
