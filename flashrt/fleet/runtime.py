"""Ray, or the error that says how to install it; and the settings of a Ray that flashrt starts.

IS: the one place where a fleet's Ray is imported and started: on the loopback interface alone, and
with usage statistics off. IS NOT: actors (member). A Ray that runs already is taken as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from flashrt.base.errors import FleetError

try:
    import ray
    from ray._private import ray_constants
except ImportError as error:
    raise FleetError("flashrt.fleet needs Ray: pip install 'flashrt[ray]'") from error

LOOPBACK = "127.0.0.1"
SETTINGS: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node that is to be no part of a cluster listens on 127.0.0.1; else on every interface,
    # whatever address it is told.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def start(address: str | None, n_cpus: int) -> bool:
    """Connect to the Ray at `address`, or start one on this machine with room for `n_cpus`, unless
    this process has one. Returns whether it is ours to shut down.

    Raises FleetError when it does not start, or not on the loopback interface.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
            return True
        with _settings():
            ray.init("local", num_cpus=n_cpus, include_dashboard=False, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise FleetError(f"no Ray {where}: {error}") from error
    if (found := [node["NodeManagerAddress"] for node in ray.nodes()]) != [LOOPBACK]:
        ray.shutdown()
        raise FleetError(
            f"Ray {ray.__version__} listens on {', '.join(found)}, not on {LOOPBACK} alone; start "
            "one yourself, behind a firewall, and give its address"
        )
    return True


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """SETTINGS for the processes that Ray starts meanwhile, and for this one, where it read the
    second one when it was imported. What the user has set stays.
    """
    added = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    was_cluster = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(added)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_cluster
        for name in added:
            os.environ.pop(name, None)


__all__ = ["LOOPBACK", "SETTINGS", "ray", "start"]
