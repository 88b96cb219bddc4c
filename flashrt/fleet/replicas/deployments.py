"""`flashrt serve` on Ray Serve: replicas with an engine each, and a front before them.

IS: the two deployments, and the verbs of whoever runs them: deploy, status, drain. IS NOT: routing
(front), or a replica's work (station).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrt.base.errors import FleetError
from flashrt.fleet.replicas.front import Front
from flashrt.fleet.replicas.ring import Member
from flashrt.fleet.replicas.router import AddressedRouter, HandleLink
from flashrt.fleet.replicas.station import Arrival, Station, StationOptions

APP = "flashrt"
MOST_ONGOING = 10_000  # a replica's own queue is what is bounded: it answers 429
START_TRIES = 3


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """replicas: how many. num_gpus, num_cpus: of each, for Ray's placement. environment: variables
    of a replica's process, as FLASHRT_THREADS. grace_s: for requests that run when a replica ends.
    """

    station: StationOptions
    replicas: int = 1
    num_gpus: float | None = None  # None: 1 for cuda, and for "auto" where the cluster has some
    num_cpus: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    grace_s: float = 60.0
    health_s: float = 5.0  # between two looks at a replica's health


class Replica:
    """A deployment's class. A replica that has left fails its health check: Serve replaces it."""

    def __init__(self, options: StationOptions) -> None:
        self._context = serve.get_replica_context()
        self._station = Station.opened(self._context.replica_id.unique_id, options)

    async def answer(
        self, scope: dict[str, Any], body: bytes, arrival: Arrival, *, to: str
    ) -> AsyncGenerator[Message, None]:
        """See Station.answer."""
        async for message in self._station.answer(to, scope, body, arrival):
            yield message

    async def about(self, *, with_roster: bool = False) -> Member:
        """See Station.about."""
        rank = serve.get_replica_context().rank.rank
        return await self._station.about(with_roster=with_roster, rank=rank)

    async def leave(self, *, to: str) -> int:
        """See Station.leave."""
        if to != self._station.id:
            raise FleetError(f"this is {self._station.id}, not {to}: it has gone")
        return await self._station.leave()

    def check_health(self) -> None:
        """See Ray Serve."""
        if self._station.has_left:
            raise FleetError(f"{self._station.id} was drained; another takes its place")

    def __del__(self) -> None:
        if (station := getattr(self, "_station", None)) is not None:
            station.close()


class Entrance:
    """The front's deployment class."""

    def __init__(self, handle: DeploymentHandle[Any], body_nbytes: int, body_s: float) -> None:
        self._front = Front(HandleLink(handle), body_nbytes=body_nbytes, body_s=body_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._front(scope, receive, send)

        return app

    async def status(self) -> dict[str, Any]:
        """See Front.status."""
        return await self._front.status()

    async def drain(self, id_: str, most_s: float) -> int:
        """See Front.drain."""
        return await self._front.drain(id_, most_s)


def join(address: str | None = None) -> None:
    """Be part of the Ray cluster at an address, "auto" being the newest of this machine; without
    one, begin a cluster that lives as long as this process, and that no other can join.

    Raises FleetError where no cluster answers.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FleetError(f"no Ray cluster answers at {address}: {error}") from error


def end() -> None:
    """All that was deployed ends; what runs may finish."""
    serve.shutdown()


def deploy(
    options: ServingOptions, *, host: str = "127.0.0.1", port: int = 8080, app: str = APP
) -> None:
    """Serve, or bring what is served under this name to other options: replicas of another model
    take the places of the old ones, a few at a time. Ray must have been initialised; an address
    that Serve has is kept. Returns once all replicas are ready. Raises FleetError.
    """
    station, num_gpus = options.station, options.num_gpus
    if num_gpus is None:
        has_gpus = station.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        num_gpus = float(station.device == "cuda" or has_gpus)
    replica = serve.deployment(
        name="replica",
        num_replicas=options.replicas,
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=options.grace_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=options.health_s,
        max_constructor_retry_count=START_TRIES,
        request_router_config=RequestRouterConfig(request_router_class=AddressedRouter),
        ray_actor_options={
            "num_cpus": options.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": options.environment},
        },
    )(Replica)
    entrance = serve.deployment(
        name="front",
        num_replicas=1,  # two would not know of each other's turns
        max_ongoing_requests=MOST_ONGOING,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Entrance))
    bound = entrance.bind(replica.bind(station), station.access.body_nbytes, station.access.body_s)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(bound, name=app, route_prefix="/")
    except RuntimeError as error:
        raise FleetError(f"the replicas did not start; Ray's logs tell more: {error}") from error


def status(app: str = APP) -> dict[str, Any]:
    """See Front.status. Raises FleetError where nothing is served."""
    return dict(_front(app).status.remote().result())


def drain(id_: str, most_s: float = 60.0, app: str = APP) -> int:
    """See Front.drain; Serve starts another replica in its place."""
    try:
        return int(_front(app).drain.remote(id_, most_s).result())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FleetError):
            raise error.cause from error
        raise


def _front(app: str) -> DeploymentHandle[Any]:
    try:
        return serve.get_app_handle(app)
    except serve.exceptions.RayServeException as error:
        raise FleetError(f"nothing is served as {app!r} on this Ray cluster: {error}") from error
