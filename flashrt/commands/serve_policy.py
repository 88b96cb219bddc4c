"""`flashrt serve-policy`: robot policies for clients of LeRobot's async inference.

IS: the parts put together, who may reach them, the words on stderr, the shutdown. IS NOT: the
server (policy_server).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flashrt.base.errors import FlashrtError
from flashrt.commands import console
from flashrt.commands.serve import LOOPBACK
from flashrt.engine.actions import ActionEngine
from flashrt.load import load_policy
from flashrt.policy_server.clients import ServerOptions
from flashrt.policy_server.policies import MOST_LOADED, Policies
from flashrt.policy_server.server import PolicyServer

_CALLS_OF_A_CLIENT = 3  # at a time: it waits for actions, and sends what it sees


@dataclass(frozen=True, slots=True)
class PolicyServeOptions:
    """What the command line offers."""

    policies: tuple[str, ...] = ()  # directories, or bundled names
    names: tuple[str, ...] = ()  # further ones of the first of them
    folder: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    allow_remote: bool = False
    device: str = "auto"
    lanes: int = 4
    loaded: int = MOST_LOADED
    server: ServerOptions = field(default_factory=ServerOptions)


def serve_policy(
    options: PolicyServeOptions, started: Callable[[str, threading.Event], None] | None = None
) -> int:
    """The command. `started` is told the address, and what to set for it to end; the address is
    printed otherwise.
    """
    try:
        importlib.import_module("grpc")
    except ImportError as error:
        raise FlashrtError(
            "a policy server needs grpcio: pip install 'flashrt[lerobot]'"
        ) from error
    from flashrt.policy_server.listen import MOST_CALLS, Listener  # others need no grpcio

    if not options.policies and options.folder is None:
        raise FlashrtError("serve-policy: name a POLICY, or a folder of policies by --policies DIR")
    if options.names and not options.policies:
        raise FlashrtError("serve-policy: --name is a further name of a POLICY; name that too")
    if options.host not in LOOPBACK:
        if not options.allow_remote:
            raise FlashrtError(
                f"{options.host}: whoever reaches this port can use the policies, as LeRobot's "
                "protocol has neither a password nor encryption. Say --allow-remote if that is "
                "meant, or keep to 127.0.0.1 and let ssh -L bring the port to the robot"
            )
        console.complain(
            f"note: others can reach {options.host}, without a password and without encryption"
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("flashrt.policy_server").setLevel(logging.INFO)
    policies = Policies(
        lambda checkpoint: _loaded(checkpoint, options),
        served_names(options.policies, options.names),
        options.folder,
        options.loaded,
    )
    try:
        for checkpoint in options.policies[: options.loaded]:  # what is wrong with it shows now
            key = policies.key(checkpoint)
            policies.take(key)
            policies.give_back(key)
        server = PolicyServer(policies, options.server)
        most_calls = MOST_CALLS + _CALLS_OF_A_CLIENT * options.lanes
        listener = Listener(server, options.host, options.port, most_calls=most_calls)
        ending = threading.Event()
        url = f"{options.host}:{listener.port}"
        with _ending_by_signals(ending):
            listener.start()
            if started is None:
                console.screen(is_error=True).print(f"listening on {url}")
            else:
                started(url, ending)
            ending.wait()
        listener.stop()
    finally:
        policies.close()
    return 0


def served_names(policies: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
    """Checkpoints by the names that clients may say: as given, the folder's own name, and further
    ones of the first. Raises FlashrtError for two of one name.
    """
    served = {policy: policy for policy in policies}
    for policy in policies:
        short = Path(policy).absolute().name
        if served.setdefault(short, policy) != policy:
            raise FlashrtError(f"serve-policy: {served[short]} and {policy} have one name, {short}")
    for name in names:
        if served.setdefault(name, policies[0]) != policies[0]:
            raise FlashrtError(f"serve-policy: --name {name} is that of {served[name]}")
    return served


def _loaded(checkpoint: str | os.PathLike[str], options: PolicyServeOptions) -> ActionEngine:
    # No robot rewinds here, so that no room for capsules is needed.
    return load_policy(checkpoint, options.device, options.lanes, pool_bytes=0)


@contextlib.contextmanager
def _ending_by_signals(ending: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM end the server, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda *_: ending.set()) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
