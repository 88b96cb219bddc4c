"""Promise 1 and complete capsules, with rows of images among those of tokens.

What only images add: a prompt may be cut within one; its rows have places of their own; two images
of one size are two histories; and what left the memory of images is missed before anything moves.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import ImageError, TokenError
from flashrt.engine.sight import Sight
from flashrt.load import load_on
from flashrt.models.sight import words_of
from flashrt.store import opening
from flashrt.store.store import Store
from tests.property.test_exact import cold, fingerprint_of

FOLDER = Path(__file__).parents[1] / "golden" / "vision" / "qwen35"


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    made = flashrt.load(FOLDER, "cpu", max_positions=300, lanes=4, images=True)
    yield made
    made.close()


def sight_of(engine: flashrt.Engine) -> Sight:
    assert engine.sight is not None
    return engine.sight


def picture(seed: int) -> NDArray[np.uint8]:
    """Noise of 5 x 8 tokens."""
    return np.random.default_rng(seed).integers(0, 256, (40, 64, 3)).astype(np.uint8)


def history(engine: flashrt.Engine, *seeds: int) -> list[int]:
    """Some text, and images with text behind each."""
    made = [1, 2, 3, 4, 5]
    for seed in seeds:
        made += [302, *engine.image(picture(seed)).tokens.tolist(), 303, 7 + seed, 11]
    return made


def test_any_partition_of_a_prompt(engine: flashrt.Engine) -> None:
    """Cuts within images too. Fault: an offset, a place or a growth that depends on the launch."""
    tokens, rng = history(engine, 1, 2), np.random.default_rng(3)
    whole = cold(engine, tokens)
    for _ in range(6):
        cuts = sorted(rng.integers(1, len(tokens), 5).tolist())
        with engine.session() as session:
            for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
                session.prefill(tokens[start:stop])
            assert fingerprint_of(session) == whole, cuts


def test_rollback_to_any_position(engine: flashrt.Engine) -> None:
    """Fault: rows of an image that are fed again from its middle."""
    tokens = history(engine, 1, 2)
    with engine.session() as session:
        for position in (len(tokens) - 1, 60, 51, 50, 30, 6, 5, 0):
            session.prefill(tokens[session.position :])
            session.rollback(position)
            if position:
                assert fingerprint_of(session) == cold(engine, tokens[:position]), position
        session.prefill(tokens)
        assert fingerprint_of(session) == cold(engine, tokens)


def test_text_is_as_without_a_tower(engine: flashrt.Engine) -> None:
    """Places of text are positions: the same bits as of an engine that sees nothing."""
    tokens = [(5 * i * i + i) % 320 for i in range(80)]
    with flashrt.load(FOLDER, "cpu", max_positions=300) as blind, blind.session() as session:
        session.prefill(tokens)
        with engine.session() as seeing:
            seeing.prefill(tokens)
            assert seeing.logits().tobytes() == session.logits().tobytes()
            assert list(seeing.generate(20)) == list(session.generate(20))
            assert seeing.logits().tobytes() == session.logits().tobytes()


def test_capsules_are_complete(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Poison all but the capsule; a fork; a file in an engine that never saw the image."""
    tokens, path = history(engine, 4), tmp_path / "state.frt"
    with engine.session() as session:
        session.prefill(tokens)
        capsule = session.snapshot()
        capsule.save(path)
        reply = list(session.generate(12))
        after = fingerprint_of(session)
        engine.poison_lane(session.lane)
        session.restore(capsule)
        assert list(session.generate(12)) == reply
        assert fingerprint_of(session) == after
        with session.fork(capsule) as twin:
            assert list(twin.generate(12)) == reply
        capsule.drop()
    other = flashrt.load(FOLDER, "cpu", max_positions=300, lanes=2, images=True)
    with other, other.session() as session:
        session.restore(other.load_capsule(path))
        assert list(session.generate(12)) == reply
        assert fingerprint_of(session) == after
        with pytest.raises(ImageError, match="show it again"):
            session.rollback(30)
        assert fingerprint_of(session) == after
        other.image(picture(4))
        session.rollback(30)
        assert fingerprint_of(session) == cold(other, tokens[:30])


def test_where_places_stand_is_state(engine: flashrt.Engine) -> None:
    """Negative control: were `delta` not restored, the suite would notice."""
    with engine.session() as session:
        session.prefill(history(engine, 1))
        capsule, digest = session.snapshot(), session.digest()
        session.prefill([5])
        after = session.logits()
        session.restore(capsule)
        assert engine.lane_array(session.lane, "delta")[0] == 8 - 40
        engine.set_lane_array(session.lane, "delta", np.zeros(1, np.int32))
        assert session.digest() != digest
        session.prefill([5])
        assert not np.array_equal(session.logits(), after)
        capsule.drop()


def test_images_of_one_size_are_different_histories(engine: flashrt.Engine, tmp_path: Path) -> None:
    """By one level of one pixel. Fault: a capsule of the one found for the other."""
    other = picture(1)
    other[20, 30, 1] ^= 1
    tokens = history(engine, 1)
    words = engine.image(other).tokens
    changed = [*tokens[:6], *words.tolist(), *tokens[46:]]
    assert not (words == tokens[6:46]).any()
    store = Store(tmp_path / "store")
    with engine.session() as session:
        session.prefill(tokens)
        capsule = session.snapshot()
        store.save(capsule)
        capsule.drop()
    for wanted, reused in ((tokens, len(tokens)), (changed, 0)):
        opened = opening.open_session(store, engine, wanted)
        assert opened.decision.position == reused
        assert fingerprint_of(opened.session) == cold(engine, wanted)
        opened.session.close()


def test_lanes_share_launches(engine: flashrt.Engine) -> None:
    """Fault: rows, places or delta of another lane's image."""
    prompts = [history(engine, 5), [1, 2, 3], history(engine, 6)]
    sessions = [engine.session() for _ in prompts]
    for start in range(0, max(map(len, prompts)), 13):
        runs = [
            (session.lane, np.array(piece, np.int32))
            for session, prompt in zip(sessions, prompts, strict=True)
            if (piece := prompt[start : start + 13])
        ]
        engine.step(runs)
    streams = [s.generate(9, temperature=0.8, seed=i) for i, s in enumerate(sessions)]
    found: list[list[int]] = [[] for _ in prompts]
    for index, token in flashrt.together(*streams):
        found[index].append(token)
    for session, prompt, reply in zip(sessions, prompts, found, strict=True):
        assert fingerprint_of(session) == cold(engine, prompt + reply)
        session.close()


def test_memory_of_images_is_bounded(engine: flashrt.Engine) -> None:
    """The one that was used longest ago leaves; shown again, it is the same."""
    sight = sight_of(engine)
    before, first = sight.most_bytes, engine.image(picture(1))
    sight.most_bytes = 3 * 40 * 64 * 4  # of three images
    try:
        for seed in (2, 3, 1, 4):
            engine.image(picture(seed))
        assert sight.nbytes <= sight.most_bytes
        with engine.session() as session:
            session.prefill(first.tokens)
            with pytest.raises(ImageError, match="not in memory"):
                session.prefill(words_of(picture(2), 40))
            assert session.position == 40
        assert np.array_equal(engine.image(picture(2)).tokens, words_of(picture(2), 40))
    finally:
        sight.most_bytes = before


def test_steps_come_between_launches_of_the_tower(
    engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where both have the same threads. Fault: tokens wait for a whole image, of which
    one step has room before it and one after. Several images, since a busy machine may let a thread
    sleep through one.
    """
    sight, begun, ended = sight_of(engine), threading.Event(), threading.Event()
    draw, replay = np.random.default_rng(9), sight.tower.replay

    def noted(*arguments: Any) -> None:
        begun.set()
        replay(*arguments)
        ended.set()

    monkeypatch.setattr(sight.tower, "replay", noted)
    most = 0
    with engine.session() as session:
        for _ in range(40):
            image = sight.glance(draw.integers(0, 256, (128, 128, 3)).astype(np.uint8))
            looking = threading.Thread(target=sight.look, args=[image])
            session.rollback(0)
            session.prefill([1, 2, 3])
            stream = session.generate(250)
            next(stream)
            begun.clear()
            ended.clear()
            looking.start()
            assert begun.wait(30)
            n = 0
            while not ended.is_set():
                n += next(stream, None) is not None
            looking.join()
            stream.close()
            most = max(most, n)
            if most >= 8:
                break
    assert most >= 8, "it has some thirty launches"


def test_an_image_that_is_held_stays(engine: flashrt.Engine) -> None:
    """Whatever comes meanwhile; and a glance costs no run of the tower before it is fed."""
    sight = sight_of(engine)
    before, seen = sight.most_bytes, sight.counters.seen
    sight.most_bytes = 1
    try:
        held = [engine.glance(picture(seed)) for seed in (60, 61, 62)]
        assert sight.counters.seen == seen
        tokens = [t for image in held for t in (1, *image.tokens.tolist())]
        with engine.session() as session:
            session.prefill(tokens)
            found = fingerprint_of(session)
            assert sight.counters.seen == seen + 3
            session.rollback(50)
            session.prefill(tokens[50:])
            assert fingerprint_of(session) == found and sight.counters.seen == seen + 3
            del held
            with pytest.raises(ImageError, match="show it again"):
                session.rollback(50)
    finally:
        sight.most_bytes = before


def test_what_is_no_image(engine: flashrt.Engine, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    for wrong, said in (
        (tmp_path / "x.png", "cannot be read as an image"),
        (tmp_path / "absent.png", "cannot be read"),
        (b"", "cannot be read as an image"),
        (np.zeros((3, 3), np.uint8), "expected uint8"),
        (np.zeros((1, 201, 3), np.uint8), "200 times"),
    ):
        with pytest.raises(ImageError, match=said):
            engine.image(wrong)
    with flashrt.load(FOLDER, "cpu", max_positions=64) as blind:
        with pytest.raises(ImageError, match="images=True"):
            blind.image(picture(1))
        with blind.session() as session, pytest.raises(TokenError):
            session.prefill(engine.image(picture(1)).tokens)


def test_pieces_under_random_schedules_of_threads() -> None:
    """The same on the CUDA kernels. Fault: bits depend on rows, or on the order of threads."""
    seen = set()
    for seed, cuts in ((0, [0, 26]), (1, [0, 3, 4, 17, 26])):
        engine = load_on(
            lambda seed=seed: SimtDevice("bfloat16", seed=seed), FOLDER, max_positions=64,
            prefill_rows=64, images=True,
        )  # fmt: skip
        with engine, engine.session() as session:
            words = engine.image(picture(1)[:24, :40]).tokens.tolist()
            tokens = [1, 2, 3, 302, *words, 303, *range(7, 7 + 21 - len(words))]
            for start, stop in itertools.pairwise(cuts):
                session.prefill(tokens[start:stop])
            before = fingerprint_of(session)
            seen.add((*before, *session.generate(2), *words))
    assert len(seen) == 1
