"""The four calls of LeRobot's async inference: Ready, instructions, observations, actions.

IS: what each does to a client's session, bytes in and bytes out. IS NOT: gRPC (listen): tests call
this directly. Each call is whole or refused; a refusal leaves the client's session as it was.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from flashrt.base.errors import FlashrtError, LaneBusy
from flashrt.base.messages import listed, printable
from flashrt.policy_server.clients import (
    Client,
    Driver,
    ServerOptions,
    Session,
    Waiting,
    host_of,
)
from flashrt.policy_server.messages import EMPTY, answer_of, data_of, joined
from flashrt.policy_server.payloads import (
    Instructions,
    read_instructions,
    read_observation,
    write_actions,
)
from flashrt.policy_server.policies import Policies
from flashrt.policy_server.refusal import Reason, Refusal

MOST_INSTRUCTIONS_NBYTES = 1 << 20
MOST_OBSERVATION_NBYTES = 64 << 20
MOST_ANSWER_NBYTES = 4 << 20  # what LeRobot's client takes in one message
MOST_CLIENTS = 64
_LOG = logging.getLogger("flashrt.policy_server")


class PolicyServer:
    """`now` is a clock for idle clients, in seconds."""

    def __init__(
        self,
        policies: Policies,
        options: ServerOptions | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policies, self._now = policies, now
        self._options = ServerOptions() if options is None else options
        self._lock = threading.Condition()  # of the table of clients; told when a call ends
        self._clients: dict[str, Client] = {}
        self._is_closed = False

    # -- the calls ---------------------------------------------------------------------------------

    def ready(self, peer: str) -> bytes:
        """A client begins: whatever waited or was promised is gone."""
        with self._call(peer, begins=True) as client:
            client.begin(self._options.similar)
            with client.planning:
                if client.driver is not None:
                    client.driver.reset()
        _LOG.info("%s: ready", peer)
        return EMPTY

    def instruct(self, peer: str, message: bytes) -> bytes:
        """The policy that a client wants, and how its robot sees. Raises FlashrtError."""
        with self._call(peer) as client:
            data = data_of(message)
            if len(data) > MOST_INSTRUCTIONS_NBYTES:
                raise Refusal(
                    Reason.INVALID_ARGUMENT,
                    f"instructions of {len(data):,} bytes, at most {MOST_INSTRUCTIONS_NBYTES:,}",
                )
            wanted = read_instructions(data)
            key = self._policies.key(wanted.policy)
            with client.planning:
                self._drive(client, key, wanted)
                client.begin(self._options.similar)
        return EMPTY

    def observe(self, peer: str, pieces: Iterable[bytes]) -> bytes:
        """An observation, in pieces. Raises FlashrtError."""
        with self._call(peer) as client:
            session, driver = client.session, self._driver(client)
            seen = read_observation(joined(pieces, MOST_OBSERVATION_NBYTES))
            sight = driver.sight
            sight.check(seen)
            why = session.put(Waiting(seen, sight.joints(seen), sight.task(seen)))
            if why is not None:
                _LOG.debug("%s: observation %d is left out: %s", peer, seen.timestep, why)
        return EMPTY

    def actions(
        self,
        peer: str,
        is_wanted: Callable[[], bool] = lambda: True,
        when_gone: Callable[[Callable[[], None]], object] = lambda wake: None,
    ) -> bytes:
        """A chunk from the observation that waits; empty where none comes. Raises FlashrtError.

        is_wanted: whether the client is still there. when_gone is given a function to call when it
        is not.
        """
        with self._call(peer) as client:
            session = client.session
            self._driver(client)
            when_gone(session.wake)
            waiting = session.take(self._options.wait_s, is_wanted)
            if waiting is None:
                client.is_gone = not is_wanted()
                return EMPTY
            is_kept = False
            try:
                answer = self._answer(client, session, waiting)
                is_kept = is_wanted()
                return answer
            finally:
                if not is_kept:
                    session.forget(waiting)
                client.is_gone = not is_wanted()

    def close(self) -> None:
        """End all sessions, and wait until their calls have ended; engines are the policies'."""
        with self._lock:
            self._is_closed = True
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.session.end()
        for client in clients:
            with self._lock:
                while client.n_calls:
                    self._lock.wait()
            self._release(client)

    @property
    def peers(self) -> tuple[str, ...]:
        """Connections that have a session."""
        with self._lock:
            return tuple(self._clients)

    # -- inside ------------------------------------------------------------------------------------

    def _answer(self, client: Client, session: Session, waiting: Waiting) -> bytes:
        seen = waiting.seen
        started = time.perf_counter()
        with client.planning:
            if session.is_ended:
                return EMPTY
            chunk = self._driver(client).chunk(seen)
            if session.is_ended:  # by a reset that waits for us
                return EMPTY
        step_s = 1 / self._options.fps
        answer = answer_of(write_actions(chunk, seen.timestamp, seen.timestep, step_s, seen.module))
        if len(answer) > MOST_ANSWER_NBYTES:
            raise Refusal(
                Reason.INVALID_ARGUMENT,
                f"{len(chunk):,} actions are {len(answer):,} bytes; LeRobot's client takes "
                f"{MOST_ANSWER_NBYTES:,}: ask for fewer actions_per_chunk",
            )
        spent_ms = 1e3 * (time.perf_counter() - started)
        _LOG.debug("%s: chunk of observation %d in %.1f ms", client.peer, seen.timestep, spent_ms)
        return answer

    def _drive(self, client: Client, key: str, wanted: Instructions) -> None:
        """A driver for a client, in place of the one it had; which stays if there is an error."""
        peer = client.peer
        engine = self._policies.take(key)
        try:
            if wanted.policy_type != engine.policy.name:
                raise Refusal(
                    Reason.INVALID_ARGUMENT,
                    f"policy_type is {printable(wanted.policy_type)}; {printable(wanted.policy)} "
                    f"is of type {engine.policy.name}",
                )
            if client.driver is not None and client.key == key:
                client.driver.instruct(wanted)
                self._policies.give_back(key)
            else:
                driver = self._seated(lambda: Driver(engine, wanted, self._options.seed))
                self._release(client)
                client.driver, client.key = driver, key
        except BaseException:
            self._policies.give_back(key)
            raise
        _LOG.info("%s: %s, %s", peer, wanted.policy_type, printable(wanted.policy))
        if wanted.device and wanted.device != engine.device:
            _LOG.info(
                "%s: device %s is asked for; the server's is %s", peer, printable(wanted.device),
                engine.device,
            )  # fmt: skip
        unused = self._driver(client).sight.unused
        for what, names in (("fields", wanted.unknown), ("features", unused)):
            if names:
                _LOG.info("%s: %s that are not used: %s", peer, what, listed(names))

    def _seated(self, make: Callable[[], Driver]) -> Driver:
        """A driver on a free lane, or on that of a client which says nothing any more."""
        try:
            return make()
        except LaneBusy:
            if not self._evict():
                raise
            return make()

    def _evict(self) -> bool:
        """The client that was silent longest goes; False when all of them are at it."""
        with self._lock:
            silent = [c for c in self._clients.values() if c.driver is not None and self._idle(c)]
            if not silent:
                return False
            client = min(silent, key=lambda c: c.called_s)
            del self._clients[client.peer]
        client.session.end()
        _LOG.info("%s: silent, gives way", client.peer)
        with client.planning:
            self._release(client)
        return True

    def _idle(self, client: Client) -> bool:
        is_silent = client.is_gone or self._now() - client.called_s >= self._options.idle_s
        return client.n_calls == 0 and is_silent

    def _release(self, client: Client) -> None:
        if client.driver is not None and client.key is not None:
            client.driver.close()
            self._policies.give_back(client.key)
        client.driver = client.key = None

    @staticmethod
    def _driver(client: Client) -> Driver:
        if client.driver is None:
            raise Refusal(
                Reason.FAILED_PRECONDITION, "no policy was chosen: SendPolicyInstructions first"
            )
        return client.driver

    @contextlib.contextmanager
    def _call(self, peer: str, *, begins: bool = False) -> Iterator[Client]:
        with self._lock:
            client = self._found(peer, begins=begins)
            client.n_calls += 1
            client.is_gone = False
        try:
            yield client
        except FlashrtError as error:
            _LOG.warning("%s: refused: %s", peer, error)
            raise
        finally:
            with self._lock:
                client.n_calls -= 1
                client.called_s = self._now()
                self._lock.notify_all()

    def _found(self, peer: str, *, begins: bool) -> Client:
        """The client of a connection. A connection that begins nothing is one that broke and came
        back, so it has the session of its host that is in no call, if there is just one.
        """
        if self._is_closed:
            raise Refusal(Reason.FAILED_PRECONDITION, "the server ends")
        client = self._clients.get(peer)
        if client is not None:
            return client
        if begins:
            self._make_room()
            client = self._clients[peer] = Client(peer, self._options.similar)
            client.called_s = self._now()
            return client
        here = [c for c in self._clients.values() if c.host == host_of(peer)]
        same = [c for c in here if c.n_calls == 0]
        if len(same) != 1:
            raise Refusal(
                Reason.FAILED_PRECONDITION,
                f"this connection has no session, and {len(same)} others of its host have one that "
                "is in no call: call Ready first",
            )
        (client,) = same
        _LOG.info("%s: goes on as %s", client.peer, peer)
        del self._clients[client.peer]
        client.peer = peer
        self._clients[peer] = client
        return client

    def _make_room(self) -> None:
        """In the table of clients."""
        if len(self._clients) < MOST_CLIENTS:
            return
        silent = [c for c in self._clients.values() if self._idle(c) and c.driver is None]
        if not silent:
            raise Refusal(Reason.RESOURCE_EXHAUSTED, f"{MOST_CLIENTS} clients are connected")
        del self._clients[min(silent, key=lambda c: c.called_s).peer]
