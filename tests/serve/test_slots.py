"""Promise: a lane's state that was saved comes back whole, to its owner alone, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import flashrt
from flashrt.serve.ask import BadSlotFile, NoSlot, NoSlotFile
from flashrt.serve.core import Core
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint
from tests.serve.conftest import LIMIT, load
from tests.serve.listening import alone, ask

Serving = Callable[..., Core]
PROMPT = list(range(90))


def positions(core: Core) -> list[int]:
    return [lane.position for lane in core.status().result(10).lanes]


def forget_entries(store: Store) -> None:
    """What is found without a restore goes, so that only the slot can make a prompt warm."""
    for name in store.refs():
        if "/slot/" not in name:
            store.remove(name)


def test_a_slot_comes_back_after_a_restart(
    serving: Serving, other: flashrt.Engine, tmp_path: Path
) -> None:
    """Fault: a restored state is not found by the next request, or is not the one saved."""
    store = Store(tmp_path / "store")
    core = serving(load(lanes=1), store=store)
    said = ask(core, PROMPT, 6).wait().tokens[0]
    saved = core.slots.save("ann", 0, "walk.bin").result(30)
    assert saved.n_tokens == 96 and saved.nbytes > 0
    core.close()
    forget_entries(store)
    again = serving(load(lanes=2), store=Store(tmp_path / "store"))
    asked = [*PROMPT, *said, 7]
    read = again.slots.restore("ann", 1, "walk.bin").result(30)
    assert (read.n_tokens, read.nbytes) == (96, saved.nbytes)
    assert positions(again) == [0, 96]
    strange = ask(again, asked, 0, owner="bob").wait()
    assert (strange.cached_tokens, positions(again)) == (0, [97, 96]), "the other lane is taken"
    heard = ask(again, asked, 12).wait()
    assert heard.cached_tokens == 96 and heard.tokens[0] == alone(other, asked, 12)
    ask(again, [5], 3, n=2).wait()  # both lanes have other states: the index knows it still
    assert ask(again, asked[:96], 0).wait().cached_tokens == 96


def test_a_slot_is_its_owners(serving: Serving, tmp_path: Path) -> None:
    """Fault: a state is saved, found or erased by another key than its own."""
    core = serving(load(lanes=1), store=Store(tmp_path / "store"))
    ask(core, PROMPT, 6).wait()
    for owner, lane, words in (("bob", 0, "no state of yours"), ("ann", 3, "no slot 3")):
        with pytest.raises(NoSlot, match=words):
            core.slots.save(owner, lane, "a").result(30)
    assert core.slots.erase("bob", 0).result(30) == 0 and positions(core) == [96]
    core.slots.save("ann", 0, "a").result(30)
    with pytest.raises(NoSlotFile, match="'a'"):
        core.slots.restore("bob", 0, "a").result(30)
    assert core.slots.erase("ann", 0).result(30) == 96 and positions(core) == [0]
    with pytest.raises(NoSlot, match="no state of yours"):
        core.slots.save("ann", 0, "a").result(30)
    assert ask(core, PROMPT, 0).wait().cached_tokens == 0, "the end of the turn is forgotten"
    core.slots.restore("ann", 0, "a").result(30)
    assert positions(core) == [96]
    core.engine.capsules.check_integrity()
    for name in ("", ".", "../a", "a/b", "a\\b", "-a", "a\n", "é", "x" * 101):
        with pytest.raises(BadSlotFile, match="is not a name"):
            core.slots.restore("ann", 0, name)


def test_a_busy_slot_is_waited_for(serving: Serving, tmp_path: Path) -> None:
    """Fault: a state is saved in the midst of a step, or the next request is before it."""
    core = serving(load(lanes=1), store=Store(tmp_path / "store"))
    running = ask(core, PROMPT, 100)
    assert running.has_token.wait(30)
    after = ask(core, [1, 2, 3], 3)
    saved, cancelled = core.slots.save("ann", 0, "a"), core.slots.save("ann", 0, "b")
    assert cancelled.cancel()
    assert saved.result(60).n_tokens == 190 and running.done.wait(30)
    assert after.wait().reasons == {0: "length"}
    running = ask(core, PROMPT, 100)
    assert running.has_token.wait(30)
    erased = core.slots.erase("ann", 0)
    core.close()
    assert erased.result(0) == 190, "a server that ends carries it out"
    assert [name.rpartition("/")[2] for name in core.store.refs() if "/slot/" in name] == ["a"]  # type: ignore[union-attr]


def test_what_does_not_fit_leaves_the_lane_as_it_was(
    serving: Serving, other: flashrt.Engine, tmp_path: Path
) -> None:
    """Fault: half a state, or another model's, is in the lane."""
    root = tmp_path / "store"
    with flashrt.load(
        bundled_checkpoint(), device="cpu", max_positions=LIMIT, lanes=1, precision="fast"
    ) as engine:
        strange = serving(engine, store=Store(root))
        ask(strange, PROMPT, 0).wait()
        strange.slots.save("ann", 0, "strange").result(30)
        strange.close()
    core = serving(load(lanes=1), store=Store(root))
    ask(core, PROMPT, 0).wait()
    core.slots.save("ann", 0, "broken").result(30)
    assert core.slots.erase("ann", 0).result(30) == 90
    said = ask(core, [9, 8, 7], 3).wait().tokens[0]
    assert core.store is not None
    place = core.store.named(
        next(name for name in core.store.refs() if name.endswith("/slot/broken"))
    )
    assert place is not None
    (rows, *_), so_far = core.store.manifest(place).segments, [9, 8, 7, *said]
    path = next(root.rglob(rows.rows.digest[2:]))
    path.chmod(0o600)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for name, words in (("strange", "another model"), ("broken", "damaged")):
        with pytest.raises(BadSlotFile, match=words):
            core.slots.restore("ann", 0, name).result(30)
    assert positions(core) == [6]
    heard = ask(core, [*so_far, 4], 9).wait()
    assert heard.cached_tokens == 6 and heard.tokens[0] == alone(other, [*so_far, 4], 9)
    core.engine.capsules.check_integrity()
