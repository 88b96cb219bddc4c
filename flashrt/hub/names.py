"""Names of checkpoints that are no paths.

IS: `owner/name`, with `@revision` where one is meant, as on the Hugging Face hub; and the few names
of our own. IS NOT: a look at the disk (resolve) or at the network (download, packaged).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_HUB = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?", re.ASCII)
_MOST_CHARACTERS = 96  # of a name, by the hub's own rule
DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub. revision: a branch, a tag or a commit; None is the default branch."""

    model: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """The name that a text spells, or None. Nothing in it can lead out of the cache's folder."""
    match = _HUB.fullmatch(text)
    if match is None:
        return None
    model, revision = match[1], match[2]
    if len(model) > _MOST_CHARACTERS or "--" in model or ".." in text or model.endswith(".git"):
        return None
    if revision is not None and (revision.startswith("/") or "//" in revision):
        return None
    return HubName(model, revision)
