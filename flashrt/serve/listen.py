"""Listening: uvicorn with limits that no client can hold up others by.

IS: one HTTP server in the calling thread: timeouts for heads of requests and for readers that
stall, a bound on connections, and how it ends. IS NOT: routes (app).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # for the head of a request to arrive, once its connection or first byte is there
STALL_S = 60.0  # a client that reads nothing for so long is let go
KEEP_ALIVE_S = 75
MOST_CONNECTIONS = 1024
HEAD_NBYTES = 64 << 10


class _Protocol(H11Protocol):
    """uvicorn's, with the timeouts that it lacks. A client's turn is watched where the app does not
    wait for it: the head of a request, and what is left of a body after its answer.
    """

    head_s, stall_s = HEAD_S, STALL_S
    _turn: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._turn, self._stall = _ended(self._turn), _ended(self._stall)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio: what was written is not read."""
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._stall = _ended(self._stall)
        super().resume_writing()

    def on_response_complete(self) -> None:
        """See uvicorn: it watches a connection that is idle after this."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def _watch(self) -> None:
        theirs = self.conn.their_state
        is_answered = self.cycle is not None and self.cycle.response_complete
        if theirs is h11.IDLE or (theirs is h11.SEND_BODY and is_answered):
            if self._turn is None:
                self._turn = self.loop.call_later(self.head_s, self.transport.abort)
        else:
            self._turn = _ended(self._turn)


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """A timer that is not needed any more: None."""
    if timer is not None:
        timer.cancel()
    return None


class _Server(uvicorn.Server):
    """uvicorn's, which after its end would raise the signal again: there is something to save."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn. Signals are the main thread's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Listener:
    """An app at an address. `port`: the one that was taken, where 0 was asked for."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        grace_s: float = 30.0,
        head_s: float = HEAD_S,
        stall_s: float = STALL_S,
        log_level: str = "warning",
    ) -> None:
        """Binds at once. Raises OSError where that cannot be done."""
        kind = type("Protocol", (_Protocol,), {"head_s": head_s, "stall_s": stall_s})
        config = uvicorn.Config(
            app,
            http=kind,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level=log_level,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(grace_s)),
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=HEAD_NBYTES,
            backlog=1024,
        )
        self._server = _Server(config)
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        for name in ("uvicorn", "uvicorn.error"):
            logging.getLogger(name).setLevel(log_level.upper())

    @property
    def is_ending(self) -> bool:
        """Whether it was told to end."""
        return bool(self._server.should_exit)

    def end(self) -> None:
        """Take no more connections; `run` returns when those that are there have ended, or after
        the grace. From any thread.
        """
        self._server.should_exit = True

    def run(self, started: Callable[[], Any] = lambda: None) -> None:
        """Serve until `end`, SIGINT or SIGTERM; the latter only in the main thread."""
        started()
        self._server.run(sockets=[self._socket])
        self._socket.close()


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    return made
