"""`flashrt serve`: an engine behind HTTP, until it is told to end.

IS: the parts put together, the words on stderr, the shutdown. IS NOT: the server (serve).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flashrt.base.errors import FlashrtError
from flashrt.base.files import read_file
from flashrt.base.flags import flags
from flashrt.capsule.eviction import Budgets
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.serve.access import Access

_MOST_KEY_NBYTES = 1 << 20
_SEEING_BODY_NBYTES = 64 << 20
_HOST_PART = 8  # of the machine's memory, one part is for states that the pool has no room for
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_PARTS = ("starlette", "uvicorn", "h11", "prometheus_client")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line offers, besides the engine's own options."""

    checkpoint: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    store: str | None = None
    keys: tuple[str, ...] = ()
    key_file: Path | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    queue: int = 256
    itl_s: float | None = None  # see Limits
    noted: int | None = None  # see Limits
    timeout_s: float | None = None
    grace_s: float = 30.0
    body_nbytes: int | None = None  # None: more where the model sees
    logs_prompts: bool = False
    host_nbytes: int | None = None  # None: a part of the machine's memory
    engine: EngineOptions = field(default_factory=EngineOptions)


def serve(options: ServeOptions, started: Callable[[str], None] | None = None) -> int:
    """The command. `started` is told the address; it is printed otherwise."""
    for part in _PARTS:
        try:
            importlib.import_module(part)
        except ImportError as error:
            raise FlashrtError(f"a server needs {part}: pip install 'flashrt[serve]'") from error
    from flashrt.serve.run import run  # everybody else uses the command line without the packages

    if options.noted is not None and options.store is None:
        raise FlashrtError("--record-logprobs notes them in a store: give --store DIR")
    keys = keys_of(options)
    if options.host not in LOOPBACK and not keys:
        console.complain(
            f"note: others can reach {options.host}, and no API key is asked for (--api-key)"
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("flashrt.serve").setLevel(logging.INFO)
    engine = open_engine(options.checkpoint, options.engine)
    host_nbytes = options.host_nbytes
    engine.budgets = Budgets(memory_nbytes() // _HOST_PART if host_nbytes is None else host_nbytes)
    hosts = frozenset(name.lower() for name in options.hosts)
    if options.host in LOOPBACK:
        hosts |= LOOPBACK
    tell = started or (lambda url: console.screen(is_error=True).print(f"listening on {url}"))
    try:
        run(
            engine,
            options.name or options.checkpoint.name,
            host=options.host,
            port=options.port,
            store=options.store,
            keys=keys,
            hosts=hosts,
            origins=frozenset(options.origins),
            queue=options.queue,
            itl_s=options.itl_s,
            noted=options.noted,
            grace_s=options.grace_s,
            timeout_s=options.timeout_s,
            body_nbytes=body_nbytes_of(options, sees=engine.sight is not None),
            logs_prompts=options.logs_prompts,
            started=tell,
        )
    finally:
        engine.close()
    return 0


def body_nbytes_of(options: ServeOptions, *, sees: bool) -> int:
    """The most that a request may have: conversations with images send them with each turn."""
    usual = _SEEING_BODY_NBYTES if sees else Access().body_nbytes
    return usual if options.body_nbytes is None else options.body_nbytes


def memory_nbytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keys_of(options: ServeOptions) -> tuple[str, ...]:
    """API keys: of the command line, of a file (one a line), of the environment.

    Raises FlashrtError for a file that cannot be read or holds none.
    """
    found = list(options.keys)
    if options.key_file is not None:
        try:
            lines = read_file(options.key_file, _MOST_KEY_NBYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FlashrtError(f"{options.key_file}: cannot be read: {error}") from error
        keys = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
        if not keys:
            raise FlashrtError(f"{options.key_file}: holds no API key; write one a line")
        found += keys
    if flags().api_key:
        found.append(flags().api_key)
    return tuple(dict.fromkeys(found))
