"""A server from start to end: core, app and listener put together.

IS: the order in which they start and stop: on a signal, no new requests; those that run may end;
then sessions are saved. IS NOT: options of a command line (commands.serve).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flashrt.base.errors import FlashrtError
from flashrt.serve.access import Access
from flashrt.serve.app import make_app
from flashrt.serve.core import Core
from flashrt.serve.listen import Listener
from flashrt.serve.served import Served
from flashrt.serve.work import Limits
from flashrt.session.engine import SessionEngine
from flashrt.store.store import Store

log = logging.getLogger("flashrt.serve")


class Server:
    """Made and started; `run` serves until `end` or a signal, `close` saves and gives back."""

    def __init__(
        self,
        engine: SessionEngine,
        name: str,
        access: Access,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        store: Store | None = None,
        limits: Limits | None = None,
        head_s: float = 10.0,
        stall_s: float = 60.0,
    ) -> None:
        """Raises FlashrtError where the address cannot be had, and whatever `Core` raises."""
        limits = limits or Limits()
        self.core = Core(engine, store, limits=limits)
        try:
            app = make_app(self.core, Served(engine, name), access, lambda: self.listener.is_ending)
            self.listener = Listener(
                app, host, port, grace_s=limits.drain_s, head_s=head_s, stall_s=stall_s
            )
        except OSError as error:
            self.core.close(drain=False)
            raise FlashrtError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}; choose another "
                "--port"
            ) from error
        except BaseException:
            self.core.close(drain=False)
            raise
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.listener.port}"

    def run(self, started: Callable[[str], None] = lambda url: None) -> None:
        """Serve in this thread."""
        self.core.start()
        self.listener.run(lambda: started(self.url))

    def end(self) -> None:
        """Let `run` return. From any thread."""
        self.listener.end()

    def close(self) -> None:
        """Save what is to be kept. Call it once `run` has returned."""
        self.core.close(drain=True)


def run(
    engine: SessionEngine,
    name: str,
    *,
    host: str,
    port: int,
    store: str | None,
    keys: tuple[str, ...],
    hosts: frozenset[str],
    origins: frozenset[str],
    queue: int,
    itl_s: float | None,
    noted: int | None,
    timeout_s: float | None,
    grace_s: float,
    body_nbytes: int,
    logs_prompts: bool,
    started: Callable[[str], None],
) -> None:
    """Serve until a signal comes; requests that run are finished, sessions saved."""
    access = Access(
        keys=keys,
        hosts=hosts,
        origins=origins,
        body_nbytes=body_nbytes,
        timeout_s=timeout_s,
        logs_prompts=logs_prompts,
    )
    server = Server(
        engine,
        name,
        access,
        host=host,
        port=port,
        store=None if store is None else Store(store),
        limits=Limits(
            queue=queue, queue_per_owner=queue, drain_s=grace_s, itl_s=itl_s, noted=noted
        ),
    )
    try:
        server.run(started)
    finally:
        log.info("shutting down")
        server.close()
