"""Parcels: a capsule's bytes in memory, whole or on top of an ancestor, come out as the same state
in another engine; what is foreign, damaged or without its base is refused and changes nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.capsule.parcel import Parcel, pack, unpack

TINY = Path(__file__).parents[1] / "golden/tiny"
TOKENS = np.arange(41, dtype=np.int32)  # no multiple of a granule: the last one is shared


def opened(**options: object) -> flashrt.Engine:
    return flashrt.load(TINY, device="cpu", max_positions=96, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def here() -> flashrt.Engine:
    return opened()


@pytest.fixture
def there() -> Iterator[flashrt.Engine]:
    with opened() as engine:
        yield engine
        engine.capsules.check_integrity()


@pytest.fixture(scope="module")
def packed(here: flashrt.Engine) -> tuple[Parcel, Parcel]:
    """A trunk, and a branch packed on top of it."""
    with here.session() as session:
        session.prefill(TOKENS)
        trunk = session.snapshot()
        list(session.generate(9, temperature=1.0, seed=3))
        return pack(trunk), pack(session.snapshot(), trunk)


def sent(parcel: Parcel) -> Parcel:
    """As another process gets it: arrays over memory that is not to be written."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(b.raw()) for b in buffers])


@pytest.mark.parametrize("tier", ["host", "device"])
def test_a_parcel_is_the_state_and_goes_on_as_it_would(
    packed: tuple[Parcel, Parcel], here: flashrt.Engine, there: flashrt.Engine, tier: str
) -> None:
    """Red when a row, the fixed band or the seam between base and branch is not what it was."""
    trunk = unpack(sent(packed[0]), there.capsules, None, there.admit)
    branch = unpack(sent(packed[1]), there.capsules, trunk, there.admit)
    trunk.to(tier)
    branch.to(tier)
    with here.session() as left, there.session() as session:
        left.prefill(TOKENS)
        left_said = [*left.generate(9, temperature=1.0, seed=3)]
        session.restore(branch)
        assert session.tokens[len(TOKENS) :].tolist() == left_said
        assert branch.digest == session.digest() == left.digest() == packed[1].digest
        more = list(session.generate(7, temperature=1.0, seed=3))
        assert more == list(left.generate(7, temperature=1.0, seed=3))
        assert session.digest() == left.digest()
        session.restore(trunk)
        assert session.digest() == packed[0].digest


def test_a_branch_leaves_out_what_its_trunk_has(packed: tuple[Parcel, Parcel]) -> None:
    trunk, branch = packed
    assert (branch.base, branch.parts[0].start) == (trunk.digest, len(TOKENS))
    assert branch.nbytes < trunk.nbytes


def _flip(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[len(changed) // 2] ^= 1
    return changed


def _part(parcel: Parcel, **changes: object) -> Parcel:
    return replace(parcel, parts=(replace(parcel.parts[0], **changes),))


DAMAGE = {
    "rows": (lambda p: _part(p, rows=_flip(p.parts[0].rows)), "damaged"),
    "tokens": (lambda p: _part(p, tokens=_flip(p.parts[0].tokens)), "damaged"),
    "fixed": (lambda p: replace(p, fixed=_flip(p.fixed)), "fixed band is damaged"),
    "a part less": (lambda p: replace(p, parts=()), "do not fit"),
    "moved": (lambda p: _part(p, start=1, stop=42), "do not fit"),
    "foreign": (lambda p: replace(p, fingerprint="0" * 32), "fingerprint is 0000"),
    "too long": (lambda p: replace(p, position=97), "max_positions"),
    "without its base": (lambda p: replace(p, base="0" * 32), "is not here"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_parcel_that_is_not_whole_is_refused(
    packed: tuple[Parcel, Parcel], there: flashrt.Engine, what: str
) -> None:
    """Red when a byte reaches a capsule unchecked, or a refusal leaves something behind."""
    damage, message = DAMAGE[what]
    with pytest.raises(flashrt.CapsuleError, match=message):
        unpack(damage(packed[0]), there.capsules, None, there.admit)
    assert not there.capsules.capsules
