"""Models fetched from the Hugging Face hub, through its own library.

IS: the only user of `huggingface_hub`, which does the work: a cache shared with other programs;
HF_HOME, HF_ENDPOINT, HF_TOKEN; a file goes on where a line went dead, and what came whole stays for
the next call. Its errors become ours here. IS NOT: a look at what was fetched before (resolve). The
library loads its parts when they are first used, so importing this module is cheap.
"""

from __future__ import annotations

import errno
import glob
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable
from flashrt.hub.cache import cache_folder
from flashrt.hub.names import HubName
from flashrt.hub.resolve import loadable
from flashrt.hub.select import needed_files


def fetch_from_hub(name: HubName, pattern: str | None = None) -> Path:
    """What `flashrt.load` takes of a model on the hub, fetched as far as it is not there yet.

    `pattern`: which weights file, where there are several. Progress is the library's own, on
    stderr. Raises CheckpointError; files that came whole stay.
    """
    try:
        found = huggingface_hub.HfApi().model_info(name.model, revision=name.revision)
        files = [file.rfilename for file in found.siblings or ()]
        wanted = needed_files(files, str(name), pattern)
        folder = huggingface_hub.snapshot_download(
            name.model,
            revision=name.revision,
            allow_patterns=[glob.escape(file) for file in wanted],
        )
    except CheckpointError:
        raise
    except Exception as error:  # of that library, and of the one for HTTP that it uses: many kinds
        raise CheckpointError(_reason(name, error)) from error
    if pattern is not None and (chosen := [f for f in wanted if f.endswith(".gguf")]):
        return Path(folder) / chosen[0]
    return loadable(name, Path(folder))


def _reason(name: HubName, error: Exception) -> str:
    """What went wrong, and what to do. Of two errors the one that caused the other tells more."""
    errors = huggingface_hub.errors  # imported by then: it raised
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    page = f"{huggingface_hub.constants.ENDPOINT}/{name.model}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {page}, {login}, then pull again"
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"{name.model} has no revision {name.revision}; see {page}/tree/main for those it has"
        )
    if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{name}: there is no such model at {page}, or it is private; check the name; for a "
            f"private one {login}"
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"{name} cannot be fetched: HF_HUB_OFFLINE is set; unset it, or give a path on disk"
    if status == 403:
        return f"{name}: the hub refuses this token (403); {login}, as one who may read it"
    if status == 429:
        return f"{name}: too many requests, says the hub; wait some minutes, then pull again"
    if status is not None:
        return f"{name}: the hub answered with an error ({status}); pull again later"
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{name}: no room left in {cache_folder()}; make room, or set HF_HOME to another disk, "
            "then pull again: files that came whole are kept"
        )
    if isinstance(cause, PermissionError | NotADirectoryError) or _is_read_only(cause):
        return f"{name}: {cache_folder()} cannot be written; set HF_HOME to a folder that can"
    said = f"{type(cause).__name__}: {printable(str(cause))}"
    return (
        f"{name}: not fetched from {page} ({said}); check the network, and HF_ENDPOINT if it is "
        "set, then pull again: files that came whole are kept"
    )


def _is_read_only(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EROFS
