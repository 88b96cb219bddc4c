"""`flashrt serve --replicas` and `flashrt fleet`: servers on a Ray cluster, looked at and drained.

IS: options into what the fleet takes, the words on the screen, the shutdown. IS NOT: replicas or
routing (fleet).
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.commands import console
from flashrt.commands.serve import (
    LOOPBACK,
    ServeOptions,
    body_nbytes_of,
    keys_of,
    memory_nbytes,
)

Subparsers = argparse._SubParsersAction  # its public name is missing in argparse
_HOST_PART = 8  # of the machine's memory, one part is for states; the replicas there share it


def serve_replicas(options: ServeOptions, replicas: int, address: str | None) -> int:
    """Serve until a signal comes; then all replicas end, with what they have in the store."""
    if options.store is None:
        raise FlashrtError("replicas share their sessions through a store: give --store DIR or URL")
    _check_ray()
    from flashrt.fleet.replicas import deployments
    from flashrt.fleet.replicas.station import StationOptions
    from flashrt.serve.access import Access
    from flashrt.serve.work import Limits

    keys = keys_of(options)
    if options.host not in LOOPBACK and not keys:
        console.complain(
            f"note: others can reach {options.host}, and no API key is asked for (--api-key)"
        )
    hosts = frozenset(name.lower() for name in options.hosts)
    engine, host_nbytes = options.engine, options.host_nbytes
    if host_nbytes is None:
        host_nbytes = memory_nbytes() // _HOST_PART // replicas
    address = address or os.environ.get("RAY_ADDRESS")
    deployments.join(address)
    wanted = StationOptions(
        checkpoint=str(options.checkpoint.resolve()),
        store=options.store if "://" in options.store else str(Path(options.store).resolve()),
        name=options.name or options.checkpoint.name,
        device=engine.device,
        precision=engine.precision,
        max_positions=engine.max_positions,
        lanes=engine.lanes,
        kv_dtype=engine.kv_dtype,
        pool_bytes=engine.pool_bytes,
        draft=engine.draft,
        weights=engine.weights,
        prefill_rows=engine.prefill_rows,
        images=engine.images,
        host_nbytes=host_nbytes,
        access=Access(
            keys=keys,
            hosts=hosts | LOOPBACK if options.host in LOOPBACK else hosts,
            origins=frozenset(options.origins),
            # Whether replicas see is known to them alone.
            body_nbytes=body_nbytes_of(options, sees=engine.images is not False),
            timeout_s=options.timeout_s,
            logs_prompts=options.logs_prompts,
        ),
        limits=Limits(
            queue=options.queue,
            queue_per_owner=options.queue,
            drain_s=options.grace_s,
            itl_s=options.itl_s,
            noted=options.noted,
        ),
    )
    threads = os.environ.get("FLASHRT_THREADS")
    deployments.deploy(
        deployments.ServingOptions(
            wanted,
            replicas,
            environment={} if threads is None else {"FLASHRT_THREADS": threads},
            grace_s=options.grace_s,
        ),
        host=options.host,
        port=options.port,
    )
    screen = console.screen(is_error=True)
    screen.print(f"listening on http://{options.host}:{options.port}, {replicas} replicas")
    if address is not None:
        screen.print(f"look and drain: flashrt fleet status --ray {address}")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    deployments.end()
    return 0


def register(commands: Subparsers[Any]) -> None:
    """Add `fleet` and its subcommands to the command line."""
    purpose = "Servers on a Ray cluster (flashrt serve --replicas N): look, drain."
    examples = (
        "examples:\n  flashrt serve smollm2 --replicas 3 --store s3://bucket/capsules\n"
        "  flashrt fleet status\n  flashrt fleet drain ab12cd34"
    )
    parser = commands.add_parser("fleet", help=purpose, description=purpose, epilog=examples)
    parser.set_defaults(command=lambda options: _help(parser))
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    status_parser = actions.add_parser("status", help="replicas, and what happened so far")
    status_parser.add_argument("--json", action="store_true", help="as JSON")
    status_parser.set_defaults(command=lambda o: status(o.ray, as_json=o.json))
    drain_parser = actions.add_parser(
        "drain", help="let a replica end what runs; its sessions go on at others, and a new one "
        "takes its place",
    )  # fmt: skip
    drain_parser.add_argument("replica", metavar="REPLICA", help="its id, see `fleet status`")
    drain_parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for what runs (default: 60)"
    )
    drain_parser.set_defaults(command=lambda o: drain(o.ray, o.replica, o.timeout))
    for one in (status_parser, drain_parser):
        one.add_argument(
            "--ray", metavar="ADDRESS", default=os.environ.get("RAY_ADDRESS", "auto"),
            help="of the Ray cluster (default: RAY_ADDRESS, else the newest of this machine)",
        )  # fmt: skip


def status(address: str, *, as_json: bool) -> int:
    """The command."""
    _check_ray()
    from flashrt.fleet.replicas import deployments

    deployments.join(address)
    found = deployments.status()
    if as_json:
        console.print_json(found)
        return 0
    columns = ("replica", ">rank", "host", ">sessions", ">running", ">taken over", "model")
    rows = [
        [
            m["id"] + (" (drains)" if m["is_draining"] else ""), f"{m['rank']}", m["host"],
            f"{m['sessions']:,}", f"{m['running']:,}", f"{m['adopted']:,}", m["fingerprint"][:8],
        ]
        for m in found["members"]
    ]  # fmt: skip
    screen = console.screen()
    screen.print(console.table("Replicas", columns, rows))
    names = {"placed": "new", "moved": "moved", "broken": "to be sent again", "drained": "drained"}
    told = ", ".join(f"{found[key]:,} {word}" for key, word in names.items())
    screen.print(f"conversations: {told}")
    return 0


def drain(address: str, replica: str, timeout_s: float) -> int:
    """The command."""
    _check_ray()
    from flashrt.fleet.replicas import deployments

    deployments.join(address)
    n = deployments.drain(replica, timeout_s)
    console.screen().print(f"{replica} has ended; its {n:,} sessions are in the store")
    return 0


def _check_ray() -> None:
    """Called before a module is imported that needs Ray: everybody else uses the command line
    without it.
    """
    try:
        importlib.import_module("ray.serve")
    except ImportError as error:
        raise FlashrtError("replicas need Ray: pip install 'flashrt[ray]'") from error


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0
