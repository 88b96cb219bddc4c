"""What lies in the cache of the Hugging Face hub, found without that library and without network.

IS: the folder of a model that was fetched, by name and revision. IS NOT: a download, or a check
that one has ended. Exists because a load must find a model by its name, and importing the library
takes longer than that. A test compares the cache's place with the library's.

    CACHE/models--OWNER--NAME/ refs/REVISION (a commit)  snapshots/COMMIT/FILE -> blobs/HASH
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from flashrt.base.files import read_file
from flashrt.hub.names import DEFAULT_REVISION, HubName

_COMMIT = re.compile("[0-9a-f]{40}")
_SHORT_COMMIT = re.compile("[0-9a-f]{7,40}")
_MOST_REF_NBYTES = 4096


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the library keeps models, by the variables that it reads: HF_HUB_CACHE, HF_HOME and
    XDG_CACHE_HOME.
    """
    found = os.environ if environ is None else environ
    base = found.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")  # noqa: PTH118
    home = found.get("HF_HOME", os.path.join(base, "huggingface"))  # noqa: PTH118
    hub = found.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))  # noqa: PTH118
    return Path(os.path.expandvars(os.path.expanduser(found.get("HF_HUB_CACHE", hub))))  # noqa: PTH111


def folder_of_model(name: HubName, cache: Path) -> Path:
    """Of all its revisions; it need not exist."""
    return cache / f"models--{name.model.replace('/', '--')}"


def snapshot_of(name: HubName, cache: Path) -> Path | None:
    """The folder of a model's files at its revision; None if it was not fetched."""
    folder = folder_of_model(name, cache)
    snapshots, revision = folder / "snapshots", name.revision or DEFAULT_REVISION
    try:
        commit = read_file(folder / "refs" / revision, _MOST_REF_NBYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    if _COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    if not _SHORT_COMMIT.fullmatch(revision) or not snapshots.is_dir():
        return None
    found = [path for path in snapshots.iterdir() if path.name.startswith(revision)]
    return found[0] if len(found) == 1 and found[0].is_dir() else None


def revisions_of(name: HubName, cache: Path) -> list[str]:
    """Revisions of a model that were fetched: branches and tags, else commits."""
    folder = folder_of_model(name, cache)
    refs = folder / "refs"
    named = sorted(str(path.relative_to(refs)) for path in refs.rglob("*") if path.is_file())
    fetched = [r for r in named if snapshot_of(HubName(name.model, r), cache) is not None]
    return fetched or sorted(path.name for path in folder.glob("snapshots/*") if path.is_dir())
