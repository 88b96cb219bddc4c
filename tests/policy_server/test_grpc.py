"""Over gRPC, as LeRobot's client calls: the recorded payloads in, LeRobot's own actions out."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import flashrt
from flashrt.base.errors import FlashrtError
from flashrt.cli import main
from flashrt.commands.serve_policy import PolicyServeOptions, serve_policy, served_names
from flashrt.policy_server.clients import ServerOptions
from flashrt.policy_server.listen import Listener
from flashrt.policy_server.policies import Policies
from flashrt.policy_server.server import PolicyServer
from tests.act_policies import write_set
from tests.policy_files import uniform
from tests.policy_server.payloads import (
    EXPECTED,
    TimedObservation,
    actions_of,
    message,
    pickled,
    pieces,
    recorded,
    rows_of,
)

ABSOLUTE = 1e-4  # of actions of size 2; 2e-6 was measured
WAIT_S = 0.2


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that the chunks were recorded from: a camera of 64 x 64, seven joints."""
    return write_set("plain", tmp_path_factory.mktemp("act"))


@pytest.fixture(scope="module")
def policies(policy: Path) -> Iterator[Policies]:
    found = Policies(
        lambda path: flashrt.load_policy(path, device="cpu", lanes=2, pool_bytes=0),
        {"user/plain": policy},
    )
    yield found
    found.close()


@pytest.fixture
def address(policies: Policies) -> Iterator[str]:
    """Of a server without clients."""
    server = PolicyServer(policies, ServerOptions(wait_s=WAIT_S))
    listener = Listener(server, "127.0.0.1", 0)
    listener.start()
    yield f"127.0.0.1:{listener.port}"
    listener.stop(0)


class Stub:
    """The four calls, bytes in and out."""

    def __init__(self, address: str) -> None:
        # Else channels of one process share a connection, and a connection is a client.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options)
        service = "/transport.AsyncInference/"
        self.ready = self.channel.unary_unary(f"{service}Ready")
        self.instruct = self.channel.unary_unary(f"{service}SendPolicyInstructions")
        self.observe = self.channel.stream_unary(f"{service}SendObservations")
        self.actions = self.channel.unary_unary(f"{service}GetActions")

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()


def seen_by(seed: int) -> dict[str, Any]:
    """As tools/lerobot_async.py has it."""
    joints = uniform("joints", (7,), seed) * 2
    pixels = uniform("camera", (48, 80, 3), seed)
    seen: dict[str, Any] = {f"joint_{i}.pos": float(v) for i, v in enumerate(joints)}
    return seen | {"top": ((pixels + 1) * 128).astype(np.uint8)}


def test_the_actions_are_lerobots(address: str) -> None:
    """Instructions as recorded, the first observation as recorded, in several pieces; the image is
    resized on the way. Fault: anything between the bytes that come and the actions that go.
    """
    with Stub(address) as stub:
        assert stub.ready(b"") == b""
        assert stub.instruct(message(recorded("instructions"))) == b""
        assert stub.actions(b"") == b""  # nothing waits
        for i, (seed, chunk) in enumerate(zip(EXPECTED["seeds"], EXPECTED["chunks"], strict=True)):
            sent = recorded("observation")
            if i:
                sent = pickled(TimedObservation(0.0, 10 * i, seen_by(seed)), protocol=5)
            assert stub.observe(iter(pieces(sent, 5000))) == b""
            rows = rows_of(stub.actions(b""))
            assert rows.shape == (10, 7)
            assert np.abs(rows - np.array(chunk)[:10]).max() < ABSOLUTE


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_refusals_have_codes_and_words_and_the_session_goes_on(address: str) -> None:
    """Fault: an error that ends the session or the server, or says nothing."""
    code = grpc.StatusCode
    with Stub(address) as stub:
        assert refused(lambda: stub.actions(b""))[0] is code.FAILED_PRECONDITION
        stub.ready(b"")
        stub.instruct(message(recorded("instructions")))
        stub.observe(iter(pieces(recorded("observation"))))
        evil = b"\x80\x04cos\nsystem\n\x8c\x04true\x85R."
        for call in (
            lambda: stub.instruct(message(evil)),
            lambda: stub.observe(iter(pieces(evil))),
        ):
            assert refused(call) == (
                code.INVALID_ARGUMENT, "pickle, byte 2: the global os.system is not let in",
            )  # fmt: skip
        other = recorded("instructions").replace(b"user/plain", b"/etc/plain")
        found, words = refused(lambda: stub.instruct(message(other)))
        assert (found, "user/plain" in words) == (code.PERMISSION_DENIED, True)
        grey = pickled(TimedObservation(0.0, 5, {**seen_by(1), "top": np.zeros((4, 4), np.uint8)}))
        found, words = refused(lambda: stub.observe(iter(pieces(grey))))
        assert (found, "expected an image" in words) == (code.INVALID_ARGUMENT, True)
        large = message(bytes(5 << 20))
        assert refused(lambda: stub.instruct(large))[0] is code.RESOURCE_EXHAUSTED
        assert rows_of(stub.actions(b"")).shape == (10, 7)


def test_streams_that_stall_or_break_off(policies: Policies, address: str) -> None:
    """A client that sends no end, one that is cancelled in the middle, and one that ends there.
    Fault: a thread that waits for ever, or half an observation that is taken.
    """
    first, *_ = pieces(recorded("observation"), 5000)
    ended = threading.Event()

    def stalls() -> Iterator[bytes]:
        yield first
        ended.wait(60)

    server = PolicyServer(policies, ServerOptions())
    hasty = Listener(server, "127.0.0.1", 0, stall_s=0.05)
    hasty.start()
    with Stub(f"127.0.0.1:{hasty.port}") as stub:
        begin(stub)
        assert refused(lambda: stub.observe(stalls()))[0] is grpc.StatusCode.CANCELLED
    hasty.stop(0)
    with Stub(address) as stub:
        begin(stub)
        call = stub.observe.future(stalls())
        call.cancel()
        assert refused(lambda: stub.observe(iter([first])))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert stub.actions(b"") == b""
        ended.set()


def test_clients_that_go_away_give_their_lanes_to_the_next(policies: Policies) -> None:
    """Five one after the other on two lanes, each gone while it waits for actions, for which the
    server has a minute; then two at a time that stay. Fault: a lane that a dead connection keeps.
    """
    server = PolicyServer(policies, ServerOptions(wait_s=60.0))
    listener = Listener(server, "127.0.0.1", 0)
    listener.start()
    address = f"127.0.0.1:{listener.port}"
    for _ in range(5):
        with Stub(address) as stub:
            begin(stub)
            is_back: queue.SimpleQueue[object] = queue.SimpleQueue()
            for _ in range(2):  # the one that comes later sends the other one back, and waits
                stub.actions.future(b"").add_done_callback(is_back.put)
            is_back.get(timeout=30)
    with Stub(address) as one, Stub(address) as two:
        for stub in (one, two):
            begin(stub)
            stub.observe(iter(pieces(recorded("observation"))))
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda stub: stub.actions(b""), (one, two)))
        assert [len(actions_of(answer)) for answer in answers] == [10, 10]
        assert answers[0] == answers[1]
    listener.stop(0)


def begin(stub: Stub) -> None:
    """As soon as the server has seen that others are gone."""
    stub.ready(b"")
    while True:
        try:
            stub.instruct(message(recorded("instructions")))
            return
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# -- the command -----------------------------------------------------------------------------------


def test_only_loopback_is_listened_on_unless_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a port that is open to the network by default, or by --host alone."""
    assert PolicyServeOptions().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert main(["serve-policy", "two-doors", "--host", host]) == 2
        assert "--allow-remote" in capsys.readouterr().err
    with pytest.raises(FlashrtError, match="cannot listen"):
        serve_policy(PolicyServeOptions(("two-doors",), host="192.0.2.1", allow_remote=True))
    assert "without a password" in capsys.readouterr().err


def test_a_port_is_one_servers(address: str) -> None:
    """Fault: two servers on one port, of which clients reach either."""
    port = int(address.rpartition(":")[2])
    with pytest.raises(FlashrtError, match="cannot listen"):
        serve_policy(PolicyServeOptions(("two-doors",), port=port))


def test_names(tmp_path: Path) -> None:
    """Fault: a name that means two policies."""
    assert served_names(("a/one", "b/two"), ("user/one",)) == {
        "a/one": "a/one", "b/two": "b/two", "one": "a/one", "two": "b/two", "user/one": "a/one",
    }  # fmt: skip
    with pytest.raises(FlashrtError, match="have one name, one"):
        served_names(("a/one", "b/one"), ())
    with pytest.raises(FlashrtError, match="is that of b/two"):
        served_names(("a/one", "b/two"), ("two",))
    for options in (PolicyServeOptions(), PolicyServeOptions(names=("a",), folder=tmp_path)):
        with pytest.raises(FlashrtError, match="POLICY"):
            serve_policy(options)
    with pytest.raises(FlashrtError, match="no such folder"):
        serve_policy(PolicyServeOptions(folder=tmp_path / "none"))


def test_the_command_serves_until_it_is_told_to_end(policy: Path) -> None:
    """In a process of its own, SIGTERM included. Fault: parts that do not fit, an end that hangs or
    is a traceback.
    """
    command = [sys.executable, "-m", "flashrt", "serve-policy", str(policy), "--port", "0"]
    command += ["--name", "user/plain", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while lines[-1] and not lines[-1].startswith("listening on "):
        lines.append(process.stderr.readline())
    try:
        with Stub(lines[-1].split()[-1]) as stub:
            stub.ready(b"")
            stub.instruct(message(recorded("instructions")))
            stub.observe(iter(pieces(recorded("observation"))))
            assert rows_of(stub.actions(b"")).shape == (10, 7)
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "Traceback" not in rest
    assert "device cuda is asked for; the server's is cpu" in "".join(lines) + rest
