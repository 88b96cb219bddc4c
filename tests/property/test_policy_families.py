"""Robot policies of every family: capsules are the whole state of a lane, and every way to a state
gives its bits. A new family is a line in tests/policy_families.

On small random policies. Engines are shared by the cases of a family: each case begins on lanes
that are poisoned, and leaves nothing behind. What is particular to a family stands in a file of its
own: test_act_exact, test_smolvla_exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import CapsuleError, ObservationError, SessionError
from flashrt.capsule.lineage import Lane
from flashrt.core.backend import Backend
from flashrt.core.region import Role
from flashrt.engine.actions import ActionEngine
from flashrt.engine.numbers import Given
from flashrt.models.policies import policy_for
from flashrt.models.prefix import LOOK, READ, READ_STATE
from flashrt.robot import PolicyAgent, record, replay, tick_together
from flashrt.weights.checkpoint import open_checkpoint
from tests.policy_families import (
    ACT,
    ACT_ENSEMBLE,
    FAMILIES,
    PI05,
    READING,
    SEEING,
    SMALL,
    SMOLVLA,
    STATE,
    TASK,
    Family,
    of,
)
from tests.property.test_control import LANES, Lives, walk

# What rows are of. Without it they are made again, to the same bits: see the last case.
OF_ROWS = {"journal", "state"}


class Shared:
    """The policies of a module, each written once, and its engines, each loaded once."""

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        self._folder, self._closing = folder, closing
        self._engines: dict[tuple[str, str], ActionEngine] = {}

    def policy(self, family: Family) -> Path:
        root = self._folder / family.name
        return root if root.exists() else family.write(root)

    def engine(self, family: Family, device: str) -> Iterator[ActionEngine]:
        """For one case, as if nobody had used it, and nobody will."""
        found = self._engines.get((family.name, device))
        if found is None:
            lanes = 6 if device == "cpu" else 2
            made = flashrt.load_policy(self.policy(family), device=device, lanes=lanes)
            found = self._engines[family.name, device] = self._closing.enter_context(made)
        for lane in found.lanes:
            found.poison_lane(lane)
            found.reset(lane)
        found.arena.poison_scratch()
        yield found
        for lane in found.lanes:
            found.release(lane)
        for capsule in list(found.capsules.capsules):
            capsule.drop()
        found.capsules.check_integrity()
        found.arena.check_guards()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with ExitStack() as closing:
        yield Shared(tmp_path_factory.mktemp("policies"), closing)


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def policy(shared: Shared, family: Family) -> Path:
    return shared.policy(family)


@pytest.fixture
def engine(shared: Shared, family: Family) -> Iterator[ActionEngine]:
    """On the CPU, of six lanes."""
    yield from shared.engine(family, "cpu")


@pytest.fixture(params=["cpu", "simt"])
def each(request: pytest.FixtureRequest, shared: Shared, family: Family) -> Iterator[ActionEngine]:
    """On either device, of two lanes at least."""
    yield from shared.engine(family, request.param)


def opened(policy: Path, backend: Backend, lanes: int = 1) -> ActionEngine:
    return ActionEngine(*policy_for(open_checkpoint(policy)), backend, lanes=lanes)


def plan(engine: ActionEngine, lane: Lane, observation: Any, **rest: Any) -> bytes:
    engine.observe(lane, observation)
    engine.plan(lane, **rest)
    return engine.chunk(lane).tobytes()


def finish(engine: ActionEngine, lane: Lane) -> None:
    while not engine.continue_plan(lane):
        pass


def rows_made(engine: ActionEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Phases of rows that the engine replays from here on."""
    phases: list[str] = []
    replayed = engine.replay

    def noted(phase: str, *rest: Any) -> None:
        phases.extend([phase] * (phase in (LOOK, READ, READ_STATE)))
        replayed(phase, *rest)

    monkeypatch.setattr(engine, "replay", noted)
    return phases


# -- random lives against an oracle ---------------------------------------------------------------


def live(family: Family, engine: ActionEngine, overlaps: int, steps: int, seed: int) -> None:
    of_family = family

    class FamilyLives(Lives):
        overlap = overlaps

        def seen(self, at: int) -> Any:
            return of_family.seen(at)

    FamilyLives.engine = engine
    walk(FamilyLives, steps, seed)


@pytest.mark.parametrize(
    ("family", "overlaps"),
    [*((name, n) for name in SMALL for n in (0, 1, 3)), (ACT_ENSEMBLE, 0), (ACT_ENSEMBLE, 1)],
    indirect=["family"],
)
def test_a_long_life(family: Family, policy: Path, overlaps: int) -> None:
    """Fault: a bit that depends on what a lane planned before, where, or in which slices; of an
    ensemble, where every tick makes a chunk, an average that is no state or outlives an interrupt.
    """
    with flashrt.load_policy(policy, device="cpu", lanes=LANES) as engine:
        live(family, engine, overlaps, 40, seed=overlaps)


@pytest.mark.slow
@of(ACT)
def test_a_life_on_simt(family: Family, policy: Path) -> None:
    with ActionEngine(
        *policy_for(open_checkpoint(policy)), SimtDevice(seed=3), lanes=LANES
    ) as engine:
        live(family, engine, 2, 12, seed=3)


@pytest.mark.parametrize("forgotten", ["average", "counts"])
@of(ACT_ENSEMBLE)
def test_a_life_notices_a_forgotten_region(
    family: Family, policy: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the lives."""
    family.forget(forgotten, monkeypatch)
    with (
        flashrt.load_policy(policy, device="cpu", lanes=LANES) as engine,
        pytest.raises((AssertionError, flashrt.FlashrtError)),
    ):
        live(family, engine, 0, 40, seed=0)


# -- a capsule is the whole state -----------------------------------------------------------------


def whole_state(family: Family, engine: ActionEngine) -> None:
    """Capsules between any two verbs, inside a plan too, are brought back over poison; what follows
    is compared: the rest of a plan, or an interrupt and a tick that is held, then a chunk from the
    rows that the capsule has, and ticks. On the shim, where a plan takes long, not the interrupt,
    and no other chunks.
    """
    is_long = engine.device == "cpu"
    lane, seen = engine.lanes[0], family.seen

    def step(at: int) -> bytes:
        if not engine.cursor(lane).remaining:
            plan(engine, lane, seen(at))
        return engine.tick(lane, seen(at)).tobytes()

    def go_on(*, is_cut: bool) -> tuple[list[bytes], str]:
        taken = [engine.action(lane).tobytes()]
        if is_cut:
            engine.cut(lane)
            taken.append(engine.tick(lane, seen(4), hold=True).tobytes())
        while engine.cursor(lane).plan_steps_left:
            if engine.cursor(lane).remaining:
                taken.append(step(5))
            engine.continue_plan(lane)
        # From what the capsule's rows are of, but for the vectors.
        taken.append(plan(engine, lane, seen(3), committed=min(1, engine.cursor(lane).remaining)))
        taken += [step(12 + i) for i in range(5 if is_long else 1)]
        return taken, engine.digest(lane)

    for is_planning, is_cut in ((False, False), (True, False), (False, True))[: 2 + is_long]:
        engine.reset(lane)
        plan(engine, lane, seen(2))
        step(9)
        step(1)
        if is_planning:
            engine.observe(lane, seen(3))
            engine.begin_plan(lane, committed=min(1, engine.cursor(lane).remaining))
            if engine.config.num_inference_steps > 1:
                engine.continue_plan(lane)
        capsule = engine.snapshot(lane)
        assert capsule.digest == engine.digest(lane)
        first = go_on(is_cut=is_cut)
        engine.poison_lane(lane)
        engine.arena.poison_scratch()
        engine.restore(lane, capsule)
        assert go_on(is_cut=is_cut) == first
        capsule.drop()


def alone_on_cpu(policy: Path) -> ActionEngine:
    """Of one lane, on the calling thread."""
    return ActionEngine(
        *policy_for(open_checkpoint(policy)), CpuDevice(alone_nbytes=1 << 30), lanes=1
    )


def test_a_capsule_is_the_whole_state(family: Family, each: ActionEngine) -> None:
    """Fault: something that the kernels write and later read is in no capsule."""
    whole_state(family, each)


@of(ACT_ENSEMBLE)
def test_a_capsule_of_an_ensemble_is_the_whole_state(family: Family, engine: ActionEngine) -> None:
    whole_state(family, engine)


@pytest.mark.parametrize(
    ("family", "forgotten"),
    [
        *((name, region) for name in SMALL for region in FAMILIES[name].state),
        *((name, region) for name in READING for region in FAMILIES[name].rows),
        *((ACT_ENSEMBLE, region) for region in ("average", "counts")),
    ],
    indirect=["family"],
)
def test_a_forgotten_region_is_noticed(
    family: Family, policy: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with one region that is no state the test above must fail."""
    family.forget(forgotten, monkeypatch)
    with opened(policy, CpuDevice(alone_nbytes=1 << 30)) as engine:
        if forgotten in family.rows:  # rows cannot be other than rows: they are lost
            region = engine.arena.lane(0).rows.slot(forgotten).region
            restore = engine.restore

            def without_rows(lane: Lane, capsule: Any) -> None:
                restore(lane, capsule)
                lost = np.full(region.shape, np.nan, np.float32)
                engine.set_lane_array(lane, forgotten, lost)

            monkeypatch.setattr(engine, "restore", without_rows)
        with pytest.raises((AssertionError, flashrt.FlashrtError)):
            whole_state(family, engine)


@of(ACT, ACT_ENSEMBLE, SMOLVLA, PI05)
def test_every_region_of_state_is_left_out_in_turn(family: Family, engine: ActionEngine) -> None:
    """Fault: a region is added to a lane's state, and no case above fails without it."""
    regions = engine.policy.lane_regions
    state = {r.name for r in regions if r.role in (Role.FIXED, Role.ROWS)}
    assert state - OF_ROWS == {*family.state, *family.rows}


def test_an_observation_is_no_state(family: Family, each: ActionEngine) -> None:
    """A plan from elsewhere observes first; red where it would take what another state saw."""
    a, b = each.lanes[:2]
    each.observe(a, family.seen(1))
    capsule, digest = each.snapshot(a), each.digest(a)
    each.fork(a, b)
    for lane in (a, b):
        if lane is a:
            each.restore(a, capsule)
        with pytest.raises(SessionError, match=r"the observation of tick 0 is not here.*observe"):
            each.plan(lane)
        assert each.digest(lane) == digest
        plan(each, lane, family.seen(1))
    assert each.digest(a) == each.digest(b) != digest


def test_a_capsule_file_goes_to_another_engine(
    family: Family, policy: Path, engine: ActionEngine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Fault: a file lacks something of the state, or brings it to a policy of other weights."""
    loop, path = flashrt.ControlLoop(engine), tmp_path / "reach.capsule"
    for at in range(5):
        loop.tick(family.seen(at))
    loop.snapshot().save(path)
    following = loop.tick(family.seen(6))
    with flashrt.load_policy(policy, device="cpu") as other:
        again = flashrt.ControlLoop(other)
        again.restore(other.load_capsule(path))
        assert np.array_equal(again.tick(family.seen(6)), following)
        if family.tasks:
            monkeypatch.setattr(other.policy, "most_prefix_rows", 2)
            with pytest.raises(CapsuleError, match="an observation has 2 at most"):
                other.load_capsule(path)
    foreign = family.write(tmp_path / "foreign")
    tensors = safetensors.numpy.load_file(foreign / "model.safetensors")
    doubled = {name: 2 * values for name, values in tensors.items()}
    safetensors.numpy.save_file(doubled, foreign / "model.safetensors")
    with (
        flashrt.load_policy(foreign, device="cpu") as other,
        pytest.raises(CapsuleError, match="fingerprint"),
    ):
        other.load_capsule(path)


# -- every way to a state gives its bits ----------------------------------------------------------


def test_slices_and_forks_have_the_bits_of_the_whole(family: Family, engine: ActionEngine) -> None:
    """Fault: a step of a plan reads what only the plan at once has, or what was observed or
    executed meanwhile; or a fork lacks a row.
    """
    whole, sliced, forked, observing = engine.lanes[:4]
    for lane in (whole, sliced):
        engine.reset(lane, seed=5)
        plan(engine, lane, family.seen(1))
        engine.tick(lane, family.seen(2))
    engine.plan(whole, committed=2)
    engine.begin_plan(sliced, committed=2)
    if engine.config.num_inference_steps > 1:
        engine.continue_plan(sliced)
    for lane in (forked, observing):
        engine.fork(sliced, lane)
    engine.tick(sliced, family.seen(11))  # which is not planned from
    engine.observe(observing, family.seen(19))  # nor this
    for lane in (sliced, forked, observing):
        finish(engine, lane)
    queue = engine.lane_array(whole, "queue")
    assert np.array_equal(engine.lane_array(sliced, "queue"), queue)
    assert engine.digest(forked) == engine.digest(whole)
    for lane in (whole, observing):
        engine.observe(lane, family.seen(3))
    assert engine.digest(observing) == engine.digest(whole)


def test_promised_actions_stay_to_the_bit(family: Family, each: ActionEngine) -> None:
    lane = each.lanes[0]
    plan(each, lane, family.seen(0))
    before = each.lane_array(lane, "queue").copy()
    each.tick(lane, family.seen(1))
    each.plan(lane, committed=3)
    after = each.lane_array(lane, "queue")
    assert np.array_equal(before[:3], after[:3]) and not np.isclose(before[3:], after[3:]).all()
    assert each.cursor(lane).stop == 7


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_lanes_together_are_lanes_alone(family: Family, engine: ActionEngine, overlap: int) -> None:
    """Fault: what lanes share, in ticks or in plans, changes a bit of one."""
    together, alone = (
        [flashrt.ControlLoop(engine, overlap=overlap) for _ in range(3)] for _ in range(2)
    )
    for at in range(0, 20, 2):
        row = [family.seen(at + i) for i in range(3)]
        shared = tick_together(together, [engine.pack(seen) for seen in row] if at % 4 else row)
        each = [loop.tick(seen) for loop, seen in zip(alone, row, strict=True)]
        assert [a.tobytes() for a in shared] == [a.tobytes() for a in each]
    assert [loop.digest() for loop in together] == [loop.digest() for loop in alone]


@of(*SEEING)
def test_threads_and_schedules_change_no_bit(
    family: Family, policy: Path, each: ActionEngine
) -> None:
    """On one thread and on three; in order and in a random one. Fault: a sum that depends on how
    its rows were dealt out, or a race.
    """
    plan(each, each.lanes[0], family.seen(4))
    wanted = each.digest(each.lanes[0])
    on_cpu = each.device == "cpu"
    others: list[Backend] = [CpuDevice(1), CpuDevice(3)] if on_cpu else [SimtDevice(seed=9)]
    for backend in others:
        with opened(policy, backend) as other:
            plan(other, other.lanes[0], family.seen(4))
            assert other.digest(other.lanes[0]) == wanted


# -- loops ----------------------------------------------------------------------------------------


@of(*SEEING)
def test_a_loop_comes_back_to_the_bit(family: Family, engine: ActionEngine, tmp_path: Path) -> None:
    """Rewind, restore, fork, a chunk that is looked at, a recording: nothing changes a bit. The
    recording has numbers where the loop had images as they came; and of ticks that no chunk was
    made from the loop keeps no image.
    """
    stream = [family.seen(at) for at in range(0, 24, 2)]
    loop = flashrt.ControlLoop(engine, hz=20, overlap=0, boundary_seconds=0.25)
    with record(loop, tmp_path / "run.recording"):
        first = [loop.tick(observation).tobytes() for observation in stream]
        loop.slack()
    digest, every = loop.digest(), engine.config.n_action_steps
    kept = [loop._history.past_tick(tick).observation.size for tick in range(len(stream))]
    assert [size > 0 for size in kept] == [tick % every == 0 for tick in range(len(stream))]
    loop.rewind_ticks(7)
    capsule = loop.snapshot()
    assert not np.allclose(loop.predict_chunk(stream[9]), loop.predict_chunk(stream[2]))
    for again in (loop, loop.fork()[0]):
        assert [again.tick(seen).tobytes() for seen in stream[5:]] == first[5:]
        assert again.digest() == digest
        again.restore(capsule)
    loop.close()
    assert replay(engine, tmp_path / "run.recording").mismatch is None


def failing_once(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch, phase: str, *, is_done: bool
) -> None:
    """The next replay of a phase is interrupted: after it, or before it does anything."""
    replayed = engine.replay

    def failing(asked: str, *rest: Any) -> None:
        if asked != phase or is_done:
            replayed(asked, *rest)
        if asked == phase:
            monkeypatch.setattr(engine, "replay", replayed)
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "replay", failing)


of_every_phase = pytest.mark.parametrize(
    ("family", "phase"),
    [(name, phase) for name in SMALL for phase in FAMILIES[name].phases],
    indirect=["family"],
)
before_and_after = pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])


@before_and_after
@of_every_phase
def test_an_exception_while_a_chunk_is_made_is_survived(
    family: Family, engine: ActionEngine, phase: str, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a replay, or after it and before its rows are known. Fault: rows that a lane is said
    to have, or to share with a capsule, or a camera that the tower is said to have seen; whether
    the plan is asked for again, or another that stands on what was there before.
    """
    lane, fresh = engine.lanes[:2]
    stories = [(14, False, (14, 1)), (14, False, (1, 14)), (14, True, (0, 14))]
    if phase in family.phases[-2:]:  # those that other vectors alone lead to
        stories.append((1, True, (0, 1)))
    for interrupted, is_restored, following in stories:
        for each in (lane, fresh):
            engine.reset(each)
            plan(engine, each, family.seen(0))
        capsule = engine.snapshot(lane)
        engine.observe(lane, family.seen(interrupted))
        failing_once(engine, monkeypatch, phase, is_done=is_done)
        with pytest.raises(KeyboardInterrupt):
            engine.plan(lane)
        if is_restored:
            engine.restore(lane, capsule)
        for at in following:
            for each in (lane, fresh):
                engine.cut(each)  # nothing guides
                plan(engine, each, family.seen(at))
            assert engine.digest(lane) == engine.digest(fresh)


@before_and_after
@of_every_phase
def test_a_loop_survives_an_exception(
    family: Family, engine: ActionEngine, phase: str, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a tick that did not happen, or happened by half, is in what the loop goes on from."""
    loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
    stream = [family.seen(at) for at in (0, 1, 2, 3, 14, 15)]
    for observation in stream[:4]:
        assert loop.tick(observation).tobytes() == fresh.tick(observation).tobytes()
    failing_once(engine, monkeypatch, phase, is_done=is_done)
    with pytest.raises(KeyboardInterrupt):
        loop.tick(stream[4])
    for observation in stream[4:]:
        assert loop.tick(observation).tobytes() == fresh.tick(observation).tobytes()
    assert loop.digest() == fresh.digest()


@of(*SEEING)
def test_the_interface_of_lerobots_policies(family: Family, engine: ActionEngine) -> None:
    """Batches of one, a queue, a chunk that promises nothing; and what is wrong is named."""
    whole = family.observation(2)
    batch: dict[str, Any] = {name: whole[name][None] for name in family.vectors}
    for name in family.cameras:
        channels_first = whole[name].transpose(2, 0, 1)[None]
        batch[name] = (channels_first / np.float32(255)).astype(np.float32)
    twice = {name: np.concatenate([values, values]) for name, values in batch.items()}
    if family.tasks:
        batch[TASK], twice[TASK] = [whole[TASK]], whole[TASK]
    agent, config = PolicyAgent(flashrt.ControlLoop(engine, overlap=0)), engine.config
    chunk = agent.predict_action_chunk(batch)
    assert chunk.shape == (1, config.chunk_size, config.action_dim) and agent.loop.position == 0
    assert np.array_equal(agent.predict_action_chunk(whole), chunk[0])
    actions = [agent.select_action(batch) for _ in range(config.n_action_steps)]
    assert np.allclose(np.stack(actions, 1), chunk[:, : config.n_action_steps], atol=1e-6)
    before = agent.loop.digest()
    camera, vector = family.cameras[0], family.vectors[0]
    image, numbers, dim = whole[camera], whole[vector], config.observation_dim
    (height, width, _), size = image.shape, len(numbers) - 1
    for wrong, said in (
        ({n: v for n, v in whole.items() if n not in family.cameras}, f"lacks {camera}"),
        ({n: v for n, v in whole.items() if n != vector}, f"lacks {vector}"),
        ({**whole, "observation.touch": numbers}, "has observation.touch, which the policy does"),
        (
            {**whole, camera: image[:-1]},
            rf"uint8 \({height - 1}, {width}, 3\), expected an image",
        ),
        ({**whole, camera: image.astype(np.int32)}, "int32; uint8 from 0 to 255"),
        ({**whole, camera: image * np.float32(np.nan)}, "some pixels are not finite"),
        ({**whole, vector: numbers[:-1]}, rf"{vector}: float32 \({size},\)"),
        (twice, "a batch of 2"),
        (numbers, rf"float32 \({size + 1},\), expected float32 \({dim},\)"),
    ):
        with pytest.raises(ObservationError, match=said):
            agent.select_action(wrong)
    assert agent.loop.digest() == before


# -- what a plan stands on ------------------------------------------------------------------------


@of(*READING)
def test_tasks_and_cameras_that_do_not_fit_are_named(family: Family, engine: ActionEngine) -> None:
    loop, whole = flashrt.ControlLoop(engine), family.observation(2)
    before, n = loop.digest(), len(family.cameras)
    for wrong, said in (
        ({**whole, TASK: 3}, "task is 3, expected a text"),
        ({n: v for n, v in whole.items() if n in (STATE, TASK)}, "one of which is needed at least"),
        (np.zeros(engine.config.observation_dim, np.float32), f"expected bits of {n} cameras"),
    ):
        with pytest.raises(ObservationError, match=said):
            loop.tick(wrong)
    assert loop.digest() == before


@of(*READING)
def test_a_chunk_from_given_noise(family: Family, engine: ActionEngine) -> None:
    """Fault: noise of its own, which a batch or a seed would change; or noise of another shape."""
    agent, whole = PolicyAgent(flashrt.ControlLoop(engine, overlap=0)), family.observation(2)
    noise = family.noise(1)
    chunk = agent.predict_action_chunk(whole, noise=noise)
    assert np.array_equal(agent.predict_action_chunk(whole, noise=noise[None]), chunk)
    agent.loop.set_seed(7)
    assert np.array_equal(agent.predict_action_chunk(whole, noise=noise), chunk)
    assert not np.allclose(agent.predict_action_chunk(whole), chunk)
    before, shape = agent.loop.digest(), str(noise.shape).replace("(", r"\(").replace(")", r"\)")
    for wrong, said in (
        (noise[:3], rf"noise: float32 \(3, {noise.shape[1]}\), expected float32 {shape}"),
        (noise * np.float32(np.inf), "not finite"),
    ):
        with pytest.raises(ObservationError, match=said):
            agent.predict_action_chunk(whole, noise=wrong)
    assert agent.loop.digest() == before


@of(*READING)
def test_another_task_is_an_interrupt_away(family: Family, engine: ActionEngine) -> None:
    """Fault: a task that is kept from the plan before."""
    loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
    seen = family.seen(0)
    for _ in range(2):
        loop.tick(seen)
        fresh.tick({**seen, TASK: "wait"})
    other = {**seen, TASK: "stop now"}
    going_on = loop.predict_chunk(seen)
    for each in (loop, fresh):
        each.interrupt()
    assert np.array_equal(loop.predict_chunk(other), fresh.predict_chunk(other))
    assert not np.allclose(loop.predict_chunk(other), going_on)


@of(*READING)
def test_rows_are_made_when_what_they_are_of_has_changed(
    family: Family, engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And else not, to the bits of a lane that makes all. Fault: rows that are made twice, or not
    anew.
    """
    lane, fresh = engine.lanes[:2]
    engine.reset(lane, seed=9)
    phases = rows_made(engine, monkeypatch)
    chunks, news = set(), family.news()
    for observation, wanted in news:
        phases.clear()
        engine.cut(lane)  # nothing guides
        chunk = plan(engine, lane, observation)
        assert phases == wanted
        engine.poison_lane(fresh)
        engine.reset(fresh, seed=9)
        assert plan(engine, fresh, observation) == chunk
        assert engine.digest(fresh) == engine.digest(lane)
        chunks.add(chunk)
    assert len(chunks) == len(news) - (3 if family.name == SMOLVLA else 2)


@of(*READING)
def test_rows_that_a_capsule_brings_back_are_not_made_again(
    family: Family, engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this lane and in another; fault: a restore that leaves rows that nobody knows."""
    lane, other = engine.lanes[:2]
    first = plan(engine, lane, family.seen(0))
    capsule = engine.snapshot(lane)
    plan(engine, lane, family.seen(30))
    phases = rows_made(engine, monkeypatch)
    for target in (lane, other):
        engine.restore(target, capsule)
        assert plan(engine, target, family.seen(0), given=Given(family.noise(3))) != first
    assert phases == []
    assert engine.chunk(lane).tobytes() == engine.chunk(other).tobytes()


@of(SMOLVLA)
def test_a_forgotten_state_is_made_again(
    family: Family, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: bits do not show this one."""
    family.forget("state", monkeypatch)
    with (
        flashrt.load_policy(policy, device="cpu", lanes=2) as engine,
        pytest.raises(AssertionError),
    ):
        test_rows_that_a_capsule_brings_back_are_not_made_again(family, engine, monkeypatch)
