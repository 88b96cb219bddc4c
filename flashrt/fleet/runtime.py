"""Ray, or the error that says how to install it; and the settings of a Ray that flashrt starts.

IS: the one place where a fleet's Ray is imported and started: on the loopback interface alone, and
with usage statistics off. IS NOT: actors (member). A Ray that runs already is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flashrt.base.errors import FleetError

# Ray reads the second one when it is imported: a node that is not to be part of a cluster listens
# on 127.0.0.1; else it listens on every interface, whatever address it is told.
SETTINGS: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

try:
    import ray
except ImportError as error:
    raise FleetError("flashrt.fleet needs Ray: pip install 'flashrt[ray]'") from error


def start(address: str | None, n_cpus: int) -> bool:
    """Connect to the Ray at `address`, or start one on this machine with room for `n_cpus`, unless
    this process has one. Returns whether it is ours to shut down.

    Raises FleetError when it does not start.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init("local", num_cpus=n_cpus, include_dashboard=False, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise FleetError(f"no Ray {where}: {error}") from error
    return True


__all__ = ["SETTINGS", "ray", "start"]
