"""The table of gym-pusht as a world: exact to go back to, words that decide, its physics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from flashrt.base.errors import FlashrtError
from flashrt.robot import PlainState

gym_pusht = pytest.importorskip("gym_pusht.envs.pusht")
from flashrt.worlds import pusht  # noqa: E402
from flashrt.worlds.pusht import INSTRUCTIONS, NAMES, PushT  # noqa: E402

TICKS = 25


def pushes(seed: int, world: PushT) -> np.ndarray:
    """Actions that take the pusher into the T and through it, [TICKS, 2]."""
    world.reset(seed=seed)
    state = world.get_state()
    pusher, block = state[[pusht.X, pusht.Y]], state[[pusht.T_X, pusht.T_Y]]
    rng = np.random.default_rng(seed)
    share = np.linspace(0.2, 1.6, TICKS)[:, None]
    return (pusher + share * (block - pusher) + rng.normal(0, 12, (TICKS, 2))).astype(np.float32)


def test_what_is_seen_and_done_lies_in_the_spaces() -> None:
    """Red when an observation's dtype, shape or words are not what the spaces say."""
    world = PushT()
    observation, _ = world.reset(seed=1)
    assert world.observation_space.contains(observation)
    after, reward, is_there, is_late, info = world.step(np.array([500.0, 12.0], np.float32))
    assert world.observation_space.contains(after)
    assert reward == pytest.approx(-info["distance"] / 512)
    assert not is_there
    assert not is_late
    assert world.render().shape == (512, 512, 3)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_state_that_is_put_back_goes_on_to_the_bit(seed: int) -> None:
    """Through contacts, in the same world and in another one. Red when anything that decides the
    physics (a contact cache, a pending correction, the order of shapes) outlives a tick.
    """
    world, other = PushT(), PushT()
    actions = pushes(seed, world)
    first, states = [], []
    for action in actions:
        states.append(PlainState(world).save_state())
        seen, *_ = world.step(action)
        first.append((world.get_state().tobytes(), seen["observation.image"].tobytes()))
    moved = np.abs(world.get_state() - _first_state(seed))[[pusht.T_X, pusht.T_Y, pusht.T_ANGLE]]
    assert moved[:2].max() > 20, "the T was pushed"
    assert moved[2] > 0.01, "and turned"
    for at in (TICKS - 3, TICKS // 2, 0):
        for back in (world, other):
            PlainState(back).load_state(states[at])
            again = []
            for action in actions[at:]:
                seen, *_ = back.step(action)
                again.append((back.get_state().tobytes(), seen["observation.image"].tobytes()))
            assert again == first[at:]


def _first_state(seed: int) -> np.ndarray:
    world = PushT()
    world.reset(seed=seed)
    return world.get_state()


def test_the_controller_and_the_shapes_are_gym_pushts() -> None:
    """Red when the pusher is steered in another way than PushTEnv does, or the T is another."""
    theirs = gym_pusht.PushTEnv(obs_type="state")
    start = np.array([80.0, 100.0, 300.0, 320.0, 0.4])
    theirs.reset(options={"reset_to_state": start})
    state = np.zeros(pusht.STATE_DIM)
    state[[pusht.X, pusht.Y]] = theirs.agent.position
    block = theirs.block
    state[[pusht.T_X, pusht.T_Y]] = block.local_to_world(block.center_of_gravity)
    state[pusht.T_ANGLE] = block.angle
    theirs_corners = [block.local_to_world(v) for s in block.shapes for v in s.get_vertices()]
    ours_corners = pusht.corners(state)
    for corner in theirs_corners:  # shapes of a body come in any order
        assert np.hypot(*(ours_corners - corner).T).min() < 1e-6
    for target in ([150.0, 60.0], [90.0, 200.0], [60.0, 60.0]):
        theirs.step(np.array(target))
        state = pusht.advance(state, np.array(target))
    np.testing.assert_allclose(state[[pusht.X, pusht.Y]], theirs.agent.position, atol=1e-9)
    np.testing.assert_allclose(state[[pusht.VX, pusht.VY]], theirs.agent.velocity, atol=1e-9)


def test_places_are_in_the_words_alone() -> None:
    """Red when a picture tells the place, or the words do not."""
    world = PushT()
    world.reset(seed=7)
    seen = [world.instruct(name) for name in NAMES]
    assert len({s["observation.image"].tobytes() for s in seen}) == 1
    assert [s["task"] for s in seen] == list(INSTRUCTIONS.values())
    gaps = set()
    for name in NAMES:
        world.instruct(name)
        gaps.add(world.step(np.zeros(2, np.float32))[4]["distance"])
    assert len(gaps) == len(NAMES)


def test_an_episode_ends_at_the_place_or_when_time_is_up() -> None:
    """Red when success is of another place, or there is no last tick."""
    world = PushT()
    world.reset(seed=9)
    state = world.get_state()
    state[[pusht.X, pusht.Y]] = 30.0
    state[[pusht.T_X, pusht.T_Y]] = pusht.PLACES["down"]
    state[pusht.PLACE] = NAMES.index("down")
    world.set_state(state)
    stay = np.array([30.0, 30.0], np.float32)
    assert world.step(stay)[2:4] == (True, False)
    world.instruct("up")
    for _ in range(int(pusht.TICKS - world.get_state()[pusht.TICK]) - 1):
        assert world.step(stay)[2:4] == (False, False)
    assert world.step(stay)[2:4] == (False, True)


def test_the_scripted_expert_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when the task cannot be solved any more: what the policy was cloned from."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools/train_policy"))
    import push_expert

    for seed in range(6):
        state = pusht.initial_state(np.random.default_rng(seed))
        while pusht.distance(state) > pusht.REACHED and state[pusht.TICK] < pusht.TICKS:
            state = pusht.advance(state, push_expert.act(state))
        assert pusht.distance(state) <= pusht.REACHED


def test_symmetries_of_the_table_are_symmetries_of_the_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Red when a turned demonstration shows another task: words, picture and chunk must agree."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools/train_policy"))
    import push_demonstrations as shown

    frames = shown.demonstrate(np.random.default_rng(2), 1, 4)
    frames = shown.Frames(*(getattr(frames, name)[:1] for name in shown.Frames.__slots__))
    for symmetry in range(8):
        found = shown.turned(frames, symmetry)
        state = np.zeros(pusht.STATE_DIM)
        state[[pusht.X, pusht.Y, pusht.VX, pusht.VY]] = found.state[0]
        state[[pusht.T_X, pusht.T_Y]] = found.block[0, :2]
        state[pusht.T_ANGLE] = np.arctan2(-found.block[0, 2], found.block[0, 3])
        state[pusht.PLACE] = found.place[0]
        np.testing.assert_allclose(shown.chunk_from(state, 4), found.chunk[0], atol=2.5)
        picture = shown.seen(pusht.picture(state)).astype(int)
        assert np.abs(picture - found.image[0]).mean() < 2.0


def test_without_gym_pusht_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when it dies with a ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    monkeypatch.delitem(sys.modules, "flashrt.worlds.pusht")
    with pytest.raises(FlashrtError, match=r"pip install 'flashrt\[pusht\]'"):
        import flashrt.worlds.pusht  # noqa: F401
