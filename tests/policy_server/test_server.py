"""What the four calls do to sessions: resets that leave nothing, lanes, the filter, refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import (
    CheckpointError,
    FlashrtError,
    LaneBusy,
    ObservationError,
    PayloadError,
)
from flashrt.engine.actions import ActionEngine
from flashrt.models.actions import Part
from flashrt.policy_server.clients import ServerOptions, Session
from flashrt.policy_server.observations import Sight
from flashrt.policy_server.payloads import read_instructions, read_observation
from flashrt.policy_server.policies import Policies
from flashrt.policy_server.refusal import Refusal
from flashrt.policy_server.server import PolicyServer
from tests.act_policies import SETS, observation_of, write_set
from tests.policy_families import FAMILIES, SMOLVLA
from tests.policy_server.payloads import (
    RemotePolicyConfig,
    TimedObservation,
    actions_of,
    features,
    message,
    pickled,
    pieces,
    recorded,
    rows_of,
)

STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
A, B, C = "ipv4:10.0.0.1:1000", "ipv4:10.0.0.2:1000", "ipv4:10.0.0.3:1000"
WAIT_S = 0.05  # of a call that comes back empty; others come back as soon as there is something


def policy_in(folder: Path, name: str) -> Path:
    return write_set(name, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of policies: two without a camera."""
    root = tmp_path_factory.mktemp("policies")
    policy_in(root, "no-camera")
    policy_in(root, "ensemble")
    return root


def policies_of(folder: Path, lanes: int) -> Policies:
    return Policies(
        lambda path: flashrt.load_policy(path, device="cpu", lanes=lanes, pool_bytes=0),
        {"small": str(folder / "no-camera")},
        folder,
    )


@pytest.fixture(scope="module")
def policies(folder: Path) -> Iterator[Policies]:
    """Of two lanes; engines are loaded once."""
    found = policies_of(folder, 2)
    yield found
    found.close()


@pytest.fixture
def server(policies: Policies) -> Iterator[PolicyServer]:
    """Without clients."""
    found = PolicyServer(policies, ServerOptions(wait_s=WAIT_S))
    yield found
    found.close()


def instructions(policy: str = "small", **fields: Any) -> bytes:
    sizes = fields.pop("sizes", {STATE: 6, ENVIRONMENT: 3})
    wanted = {"policy_type": "act", "actions_per_chunk": 5, **fields}
    return message(
        pickled(
            RemotePolicyConfig(
                pretrained_name_or_path=policy, lerobot_features=features(sizes), **wanted
            )
        )
    )


def values_of(seed: int, name: str = "no-camera") -> dict[str, float]:
    seen = observation_of(SETS[name][0], seed)
    return {f"{part}.{i}": float(v) for part, values in seen.items() for i, v in enumerate(values)}


def observation(seed: int, timestep: int = 0, must_go: bool = True, **more: Any) -> list[bytes]:
    values = {**values_of(seed), **more}
    return pieces(pickled(TimedObservation(100.0, timestep, values, must_go)))


def begin(server: PolicyServer, peer: str = A, **fields: Any) -> None:
    assert server.ready(peer) == b""
    assert server.instruct(peer, instructions(**fields)) == b""


def chunk_of(seed: int, folder: Path, name: str = "no-camera") -> Any:
    with flashrt.load_policy(folder / name, device="cpu") as engine:
        engine.reset(engine.lanes[0])
        engine.observe(engine.lanes[0], observation_of(SETS[name][0], seed))
        engine.plan(engine.lanes[0])
        return engine.chunk(engine.lanes[0])


def test_an_observation_becomes_timed_actions(server: PolicyServer, folder: Path) -> None:
    """Fault: another number of actions, wrong times, another lane's chunk."""
    begin(server)
    server.observe(A, observation(5, timestep=7))
    actions = actions_of(server.actions(A))
    assert [a.timestep for a in actions] == [7, 8, 9, 10, 11]
    assert np.allclose([a.timestamp - 100 for a in actions], np.arange(5) / 30)
    assert np.array_equal(np.stack([a.action for a in actions]), chunk_of(5, folder)[:5])
    assert server.actions(A) == b""  # it was taken


# -- resets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["ready", "instruct"])
def test_a_reset_empties_everything(server: PolicyServer, again: str) -> None:
    """What waits, what was seen and which timesteps have actions. Fault: a session that goes on."""
    begin(server)
    server.observe(A, observation(5, timestep=0))
    assert rows_of(server.actions(A)).shape == (5, 2)
    server.observe(A, observation(6, timestep=3))
    reset(server, again)
    assert server.actions(A) == b""
    server.observe(A, observation(7, timestep=0, must_go=False))  # a timestep of the one before
    assert actions_of(server.actions(A))[0].timestep == 0


def reset(server: PolicyServer, how: str) -> None:
    if how == "ready":
        server.ready(A)
    else:
        server.instruct(A, instructions())


@pytest.mark.parametrize("again", ["ready", "instruct"])
def test_an_observation_under_way_at_a_reset_is_not_the_new_sessions(
    server: PolicyServer, again: str
) -> None:
    """Fault: the session looked up after the pieces came."""
    begin(server)

    def slowly() -> Iterator[bytes]:
        first, *rest = pieces(pickled(TimedObservation(1.0, 9, values_of(1), True)), 50)
        yield first
        reset(server, again)
        yield from rest

    server.observe(A, slowly())
    assert server.actions(A) == b""


def test_a_chunk_under_way_at_a_reset_is_not_answered(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready comes while a chunk is made. Fault: actions of one episode sent in the next."""
    begin(server)
    is_planning, may_go_on = threading.Event(), threading.Event()
    plan = ActionEngine.plan

    def slow(*arguments: Any) -> None:
        is_planning.set()
        assert may_go_on.wait(30)
        plan(*arguments)

    is_ended, end = threading.Event(), Session.end

    def noted(session: Session) -> None:
        end(session)
        is_ended.set()

    monkeypatch.setattr(ActionEngine, "plan", slow)
    monkeypatch.setattr(Session, "end", noted)
    server.observe(A, observation(5))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(server.actions, A)
        assert is_planning.wait(30)
        ready = pool.submit(server.ready, A)
        assert is_ended.wait(30)
        may_go_on.set()
        assert ready.result(30) == b""
        assert answer.result(30) == b""
    server.observe(A, observation(5, must_go=False))
    assert rows_of(server.actions(A)).shape == (5, 2)


def test_an_observation_taken_before_a_reset_is_not_planned_from_after_it(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call has taken it and waits for instructions that are just coming in force. Fault: a lane
    that remembers what was seen before its reset.
    """
    begin(server)
    server.observe(A, observation(5))
    is_resetting, is_taken, n_plans = threading.Event(), threading.Event(), []
    reset_lane = ActionEngine.reset

    def slow(*arguments: Any) -> None:
        is_resetting.set()
        assert is_taken.wait(30)
        reset_lane(*arguments)

    monkeypatch.setattr(ActionEngine, "reset", slow)
    monkeypatch.setattr(ActionEngine, "plan", lambda *arguments: n_plans.append(1))
    with ThreadPoolExecutor(2) as pool:
        again = pool.submit(server.instruct, A, instructions())
        assert is_resetting.wait(30)
        answer = pool.submit(server.actions, A, lambda: is_taken.set() or True)
        assert again.result(30) == answer.result(30) == b""
    assert not n_plans


def test_a_call_that_waits_ends_with_its_session(policies: Policies) -> None:
    """Of a server whose calls wait for a minute. Fault: a waiter of one session that gets the next
    one's observation, or hangs.
    """
    server = PolicyServer(policies, ServerOptions(wait_s=60.0))
    begin(server)

    def waits(pool: ThreadPoolExecutor) -> Future[bytes]:
        """A call for actions that has its session."""
        has_begun = threading.Event()
        call = pool.submit(server.actions, A, when_gone=lambda wake: has_begun.set())
        assert has_begun.wait(30)
        return call

    with ThreadPoolExecutor(1) as pool:
        for end in ("ready", "instruct"):
            answer = waits(pool)
            reset(server, end)
            assert answer.result(30) == b""
        answer = waits(pool)
        server.observe(A, observation(5))
        assert rows_of(answer.result(30)).shape == (5, 2)
        answer = waits(pool)
        server.close()
        assert answer.result(30) == b""


def test_of_two_calls_that_wait_the_later_one_has_its_turn() -> None:
    """As where a client came back. Fault: the call of a dead connection takes the observation."""
    session, waits = Session(0.0), threading.Event()

    def is_wanted() -> bool:
        waits.set()
        return True

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(session.take, 60.0, is_wanted)
        assert waits.wait(30)
        assert session.take(0.0, is_wanted) is None
        assert first.result(30) is None


def test_averages_of_chunks_begin_anew(server: PolicyServer, folder: Path) -> None:
    """Of a policy with temporal ensembling, whose client joins chunks by itself. Fault: a chunk
    that is averaged with the one before.
    """
    server.ready(A)
    sizes = {STATE: 3, ENVIRONMENT: 5}
    server.instruct(A, instructions("ensemble", sizes=sizes, actions_per_chunk=100))
    for seed in (11, 12):
        values = values_of(seed, "ensemble")
        server.observe(A, pieces(pickled(TimedObservation(0.0, seed, values, True))))
        assert np.allclose(
            rows_of(server.actions(A)), chunk_of(seed, folder, "ensemble"), atol=1e-6
        )


# -- the queue of one, and the filter --------------------------------------------------------------


def test_the_newest_observation_counts(server: PolicyServer) -> None:
    """Fault: a queue that grows, or keeps the oldest."""
    begin(server)
    for timestep in (1, 2, 3):
        server.observe(A, observation(timestep, timestep))
    assert actions_of(server.actions(A))[0].timestep == 3
    assert server.actions(A) == b""


def test_which_observations_are_left_out(policies: Policies) -> None:
    """With LeRobot's threshold, and without one. Fault: a robot that stands still waits for ever; a
    client whose timestep has actions plans again.
    """
    for similar in (0.0, 1.0):
        server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S, similar=similar))
        begin(server)
        server.observe(A, observation(5, 0, must_go=False, task="a"))
        assert server.actions(A)
        cases = {
            "the same timestep": (observation(9, 0, must_go=False, task="a"), False),
            "the same place": (observation(5, 1, must_go=False, task="a"), similar == 0),
            "another place": (observation(9, 2, must_go=False, task="a"), True),
            "it must": (observation(9, 2, must_go=True, task="a"), True),
            "another task": (observation(9, 2, must_go=False, task="b"), True),
        }
        for name, (sent, is_planned) in cases.items():
            server.observe(A, sent)
            assert bool(server.actions(A)) == is_planned, (similar, name)
        server.close()


# -- clients ---------------------------------------------------------------------------------------


def test_two_clients_have_lanes_of_their_own(server: PolicyServer, folder: Path) -> None:
    """In turns, and at the same time. Fault: an observation or a chunk of the other one."""
    begin(server, A)
    begin(server, B)
    server.observe(A, observation(5))
    server.observe(B, observation(6))
    wanted = {A: chunk_of(5, folder)[:5], B: chunk_of(6, folder)[:5]}
    server.ready(B)  # is nothing to A
    server.observe(B, observation(6))
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip((A, B), pool.map(server.actions, (A, B)), strict=True))
    for peer, chunk in wanted.items():
        assert np.array_equal(rows_of(answers[peer]), chunk)


def test_lanes_of_clients_that_went_away(folder: Path) -> None:
    """One lane. Fault: a client that left holds it, or one that is at work loses it."""
    clock = [0.0]
    policies = policies_of(folder, 1)
    server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S, idle_s=10.0), lambda: clock[0])
    begin(server, A)
    server.ready(B)
    with pytest.raises(LaneBusy):
        server.instruct(B, instructions())
    clock[0] = 9.0
    assert server.actions(A) == b""  # it is there
    clock[0] = 18.0
    with pytest.raises(LaneBusy):
        server.instruct(B, instructions())
    clock[0] = 19.5
    server.instruct(B, instructions())
    assert server.peers == (B,)
    server.actions(B, is_wanted=lambda: False)  # the connection broke within a call
    server.ready(C)
    server.instruct(C, instructions())
    assert server.peers == (C,)
    server.observe(C, observation(5))
    assert np.array_equal(rows_of(server.actions(C)), chunk_of(5, folder)[:5])
    server.close()
    policies.close()


def test_a_chunk_that_nobody_got_is_made_again(server: PolicyServer) -> None:
    """The client goes away while its chunk is made. Fault: its next observation is left out, as its
    timestep would have actions.
    """
    begin(server)
    there = iter([True])  # until the chunk is begun
    server.observe(A, observation(5, 4))
    server.actions(A, is_wanted=lambda: next(there, False))
    server.observe(A, observation(5, 4, must_go=False))
    assert actions_of(server.actions(A))[0].timestep == 4


def test_a_connection_that_comes_back(policies: Policies) -> None:
    """From another port, without a Ready. Fault: its session is lost, or a stranger gets it."""
    server = PolicyServer(policies, ServerOptions(wait_s=60.0))
    begin(server)
    server.observe(A, observation(5))
    other = "ipv4:10.0.0.1:2000"
    assert rows_of(server.actions(other)).shape == (5, 2)
    assert server.peers == (other,)
    for stranger in (B, "ipv4:10.0.0.11:1000"):
        with pytest.raises(Refusal, match="call Ready first"):
            server.actions(stranger)
    with ThreadPoolExecutor(1) as pool:
        is_there = threading.Event()
        call = pool.submit(server.actions, other, when_gone=lambda wake: is_there.set())
        assert is_there.wait(30)
        with pytest.raises(Refusal, match="0 others of its host"):
            server.actions(A)  # the one that has the session waits for actions
        server.ready(other)
        assert call.result(30) == b""
    server.ready(A)
    with pytest.raises(Refusal, match="2 others of its host"):
        server.observe("ipv4:10.0.0.1:3000", observation(5))
    server.close()


# -- refusals --------------------------------------------------------------------------------------


def test_refusals_change_nothing(server: PolicyServer, folder: Path) -> None:
    """An observation waits; then everything that can be wrong is. Fault: state changed before the
    last check.
    """
    with pytest.raises(Refusal, match="call Ready first"):
        server.instruct(A, instructions())
    server.ready(A)
    with pytest.raises(Refusal, match="SendPolicyInstructions first"):
        server.observe(A, observation(1))
    begin(server)
    server.observe(A, observation(5, 6))
    wrong: list[tuple[Callable[[], object], type[FlashrtError], str]] = [
        (lambda: server.instruct(A, message(recorded("observation"))), PayloadError, "not let in"),
        (lambda: server.instruct(A, b"\x0a\xff"), PayloadError, "does not end"),
        (lambda: server.instruct(A, instructions("other")), Refusal, "not served here"),
        (lambda: server.instruct(A, instructions(policy_type="pi0")), Refusal, "of type act"),
        (
            lambda: server.instruct(A, instructions(sizes={STATE: 6})),
            ObservationError, f"lacks {ENVIRONMENT}",
        ),
        (
            lambda: server.instruct(A, instructions("ensemble")), ObservationError,
            "6 numbers of observation.state, the policy takes 3",
        ),
        (lambda: server.observe(A, []), PayloadError, "breaks off after 0 bytes"),
        (lambda: server.observe(A, [b"\x08\x07"]), PayloadError, "state 7"),
        (
            lambda: server.observe(A, observation(5, **{f"{STATE}.0": float("inf")})),
            ObservationError, "is inf, expected a finite number",
        ),
        (
            lambda: server.observe(A, pieces(pickled(TimedObservation(0.0, 0, {}, True)))),
            ObservationError, f"{STATE} lacks {STATE}.0",
        ),
    ]  # fmt: skip
    for call, kind, text in wrong:
        with pytest.raises(kind, match=text):
            call()
    actions = actions_of(server.actions(A))
    assert actions[0].timestep == 6
    assert np.array_equal(np.stack([a.action for a in actions]), chunk_of(5, folder)[:5])


def test_a_stream_may_begin_again(server: PolicyServer) -> None:
    """A piece that says BEGIN drops what came before. Fault: bytes of two payloads in one."""
    begin(server)
    whole = pieces(pickled(TimedObservation(1.0, 9, values_of(1), True)), 100)
    server.observe(A, [*whole[:2], *whole])
    assert actions_of(server.actions(A))[0].timestep == 9


def test_a_stream_has_a_limit(server: PolicyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: memory that a client fills."""
    monkeypatch.setattr("flashrt.policy_server.server.MOST_OBSERVATION_NBYTES", 1000)
    begin(server)
    with pytest.raises(PayloadError, match="more than 1,000 bytes"):
        server.observe(A, (b"\x08\x02\x12\x0aabcdefghij" for _ in iter(int, 1)))


# -- which policies --------------------------------------------------------------------------------


def test_which_policies_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    """By name, by path, below the folder. Fault: any other directory of the machine, by .. or by a
    link, or a file that is no policy's.
    """
    opened = tmp_path / "opened"
    (opened / "user").mkdir(parents=True)
    (opened / "user" / "one").symlink_to(folder / "no-camera")  # leads out of it
    (opened / "user" / "two").mkdir()
    (opened / "user" / "two" / "config.json").write_text("{}")
    (opened / "empty").mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    served = str(folder / "no-camera")
    policies = Policies(lambda path: pytest.fail("loaded"), {"a/b": served}, opened)
    for name in ("a/b", "a/b/", served, f"{served}/"):
        assert policies.key(name) == served
    two = str((opened / "user/two").resolve())
    for name in ("user/two", "user/./two", two):
        assert policies.key(name) == two
    refused = (
        "b", "../secret", "user/../user/two", "user/../../secret", f"{opened}/../secret",
        str(secret), "user/one",
        "user", "empty", ".", "/", "", "~", "user/two\0", "x" * 5000, str(folder / "ensemble"),
    )  # fmt: skip
    for name in refused:
        with pytest.raises(Refusal, match="not served here"):
            policies.key(name)
    with pytest.raises(Refusal, match="not served here"):
        Policies(lambda path: pytest.fail("loaded"), {"a/b": served}).key("user/two")


def test_engines_are_shared_and_give_way(folder: Path) -> None:
    """Fault: a second engine of one policy, one that is closed under a client, or without end."""
    loaded: list[str] = []

    def load(path: Any) -> ActionEngine:
        loaded.append(Path(path).name)
        return flashrt.load_policy(path, device="cpu")

    policies = Policies(load, {}, folder, most_loaded=1)
    small, other = policies.key("no-camera"), policies.key("ensemble")
    engine = policies.take(small)
    assert policies.take(small) is engine
    policies.give_back(small)
    with pytest.raises(Refusal, match="1 policies are loaded and in use"):
        policies.take(other)
    policies.give_back(small)
    policies.take(other)
    assert engine.is_closed
    assert loaded == ["no-camera", "ensemble"]
    policies.close()


def test_a_policy_that_does_not_load(folder: Path, tmp_path: Path) -> None:
    """Fault: its place in memory stays taken, or the client's driver is lost."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    policies = Policies(
        lambda path: flashrt.load_policy(path, device="cpu"),
        {"small": str(folder / "no-camera")}, tmp_path, 2,
    )  # fmt: skip
    server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S))
    begin(server)
    for _ in range(3):
        with pytest.raises(CheckpointError):
            server.instruct(A, instructions("broken"))
    server.observe(A, observation(5))
    assert rows_of(server.actions(A)).shape == (5, 2)
    server.close()
    policies.close()


# -- what the robot sees ---------------------------------------------------------------------------


def test_a_task_reaches_a_policy_that_takes_one() -> None:
    """Fault: words left aside, or given to a policy that takes none; images at the robot's size."""
    wanted = read_instructions(recorded("instructions"))
    seen = read_observation(recorded("observation"))
    parts = [
        Part(STATE, 0, 7, (7,)),
        Part("observation.images.top", 7, 7 + 3 * 32 * 48, (32, 48, 3)),
    ]
    names = [part.name for part in parts]
    found = Sight(wanted, [*names, "task"], parts, 0).parts(seen)
    assert isinstance(found, dict)
    assert found["task"] == "pick the cube"
    assert found["observation.images.top"].shape == (32, 48, 3)
    without = Sight(wanted, names, parts, 0).parts(seen)
    assert set(without) == set(names)


def test_a_policy_of_words_and_cameras(tmp_path: Path) -> None:
    """Fault: SmolVLA's words do not reach it, or a robot with one of its cameras is sent away."""
    family = FAMILIES[SMOLVLA]
    family.write(tmp_path / "vla")
    seen = family.observation(1)
    cameras = [name for name in seen if name.startswith("observation.images.")]
    first = cameras[0].removeprefix("observation.images.")
    state = np.asarray(seen[STATE])
    raw = {f"{STATE}.{i}": float(v) for i, v in enumerate(state)}
    raw |= {first: seen[cameras[0]], "task": seen["task"]}
    fields = {"policy_type": "smolvla", "actions_per_chunk": family.config["chunk_size"]}
    policies = Policies(
        lambda path: flashrt.load_policy(path, device="cpu"),
        {"vla": str(tmp_path / "vla")},
    )
    server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S))
    try:
        assert server.ready(A) == b""
        wanted = features({STATE: len(state)}, (first,))
        config_of = RemotePolicyConfig(
            pretrained_name_or_path="vla", lerobot_features=wanted, **fields
        )
        assert server.instruct(A, message(pickled(config_of))) == b""
        chunks = []
        for step, task in enumerate((raw["task"], "something else")):
            values = {**raw, "task": task}
            server.observe(A, pieces(pickled(TimedObservation(100.0, step, values, True))))
            chunks.append(rows_of(server.actions(A)))
        without = RemotePolicyConfig(
            pretrained_name_or_path="vla", lerobot_features=features({STATE: len(state)}), **fields
        )
        with pytest.raises(ObservationError, match="one of which is needed at least"):
            server.instruct(A, message(pickled(without)))
    finally:
        server.close()
        policies.close()
    assert not np.array_equal(*chunks)
    with flashrt.load_policy(tmp_path / "vla", device="cpu") as engine:
        lane = engine.lanes[0]
        engine.reset(lane)
        engine.observe(lane, {name: seen[name] for name in (STATE, "task", cameras[0])})
        engine.plan(lane)
        assert np.array_equal(engine.chunk(lane), chunks[0])


def test_features_have_other_names_and_may_be_too_many() -> None:
    """Fault: rename_map left aside; a camera more that is refused, one less that is not."""
    state = Part(STATE, 0, 7, (7,))
    front = Part("observation.images.front", 7, 7 + 12, (2, 2, 3))
    given = read_instructions(recorded("instructions"))
    assert Sight(given, [STATE], [state], 0).unused == ("observation.images.top",)
    with pytest.raises(ObservationError, match=r"lacks observation\.images\.front"):
        Sight(given, [STATE, front.name], [state, front], 0)
    renames = {"observation.images.top": front.name}
    config = RemotePolicyConfig("act", "p", features({STATE: 7}, ("top",)), 5, "cpu", renames)
    sight = Sight(read_instructions(pickled(config)), [STATE, front.name], [state, front], 0)
    values = {f"{STATE}.{i}": i for i in range(7)} | {"top": np.zeros((5, 6, 3), np.uint8)}
    seen = read_observation(pickled(TimedObservation(0.0, 0, values)))
    assert sight.parts(seen)[front.name].shape == (2, 2, 3)
    for image in (
        np.zeros((5, 6), np.uint8),
        np.zeros((5, 6, 3)),
        np.zeros((0, 6, 3), np.uint8),
        3,
    ):
        wrong = read_observation(pickled(TimedObservation(0.0, 0, {**values, "top": image})))
        with pytest.raises(ObservationError, match="expected an image"):
            sight.check(wrong)


def test_a_policy_with_a_memory_goes_on() -> None:
    """A bundled one, of vectors: each chunk follows from all that was seen since the Ready. Fault:
    a memory that is lost between observations or kept at a Ready; noise of another timestep.
    """
    policies = Policies(
        lambda path: flashrt.load_policy(path, device="cpu", lanes=2, pool_bytes=0),
        {"two-doors": "two-doors"},
    )
    server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S, seed=3))
    engine = policies.take("two-doors")
    size = engine.config.observation_dim
    seen = [np.linspace(0, t, size, dtype=np.float32) for t in (0.5, 1.0)]
    wanted, lane = [], engine.lanes[1]
    engine.reset(lane)
    for timestep, vector in enumerate(seen):
        engine.set_seed(lane, 3 + timestep)
        engine.observe(lane, vector)
        engine.plan(lane)
        wanted.append(engine.chunk(lane))
    server.ready(A)
    config = {"policy_type": "policy", "actions_per_chunk": 100, "sizes": {STATE: size}}
    for again in (lambda: server.instruct(A, instructions("two-doors", **config)),
                  lambda: server.ready(A)):  # fmt: skip
        again()
        for timestep, vector in enumerate(seen):
            values = {f"{STATE}.{i}": float(v) for i, v in enumerate(vector)}
            server.observe(A, pieces(pickled(TimedObservation(0.0, timestep, values, True))))
            assert np.array_equal(rows_of(server.actions(A)), wanted[timestep])
    server.close()
    policies.close()


def test_a_policy_of_vectors_takes_the_state() -> None:
    """Fault: a dict for an engine that knows no names."""
    config = RemotePolicyConfig("policy", "p", features({STATE: 3}), 5)
    sight = Sight(read_instructions(pickled(config)), (), (), 3)
    values = {f"{STATE}.{i}": float(i) for i in range(3)}
    parts = sight.parts(read_observation(pickled(TimedObservation(0.0, 0, values))))
    assert isinstance(parts, np.ndarray)
    assert parts.tolist() == [0, 1, 2]
