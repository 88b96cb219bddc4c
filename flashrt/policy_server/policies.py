"""Which policies clients may ask for, and their engines.

IS: names that the operator gave, folders below one that the operator opened, and engines that are
loaded once and shared. IS NOT: loading (the caller says how). A client's text is compared with
names, and only ever opened as a path below the operator's folder, links followed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import listed, printable
from flashrt.engine.actions import ActionEngine
from flashrt.policy_server.refusal import Reason, Refusal

CONFIG_FILE = "config.json"
MOST_LOADED = 2


class Policies:
    """`served`: checkpoints by the names that clients may say. `folder`: below it all may be asked
    for. `load` makes an engine of a checkpoint.
    """

    def __init__(
        self,
        load: Callable[[str | os.PathLike[str]], ActionEngine],
        served: Mapping[str, str | os.PathLike[str]],
        folder: Path | None = None,
        most_loaded: int = MOST_LOADED,
    ) -> None:
        """Raises FlashrtError for a folder that is not there."""
        if folder is not None and not folder.is_dir():
            raise FlashrtError(f"{folder}: no such folder of policies")
        self._load, self._served = load, dict(served)
        self._folder = None if folder is None else folder.resolve()
        self._most = max(most_loaded, 1)
        self._lock = threading.Lock()
        self._engines: dict[str, ActionEngine] = {}  # the one used last is the last
        self._users: dict[str, int] = {}

    def key(self, asked: str) -> str:
        """The checkpoint that a client's `pretrained_name_or_path` means. Raises Refusal."""
        name = asked.rstrip("/")
        for served, checkpoint in self._served.items():
            path = os.fspath(checkpoint)
            if name in (served, path.rstrip("/"), str(Path(path).absolute())):
                return path
        found = self._below(name)
        if found is None:
            below = f", and those in {self._folder.name}/" if self._folder is not None else ""
            raise Refusal(
                Reason.PERMISSION_DENIED,
                f"the policy {printable(asked)} is not served here; there are "
                f"{listed(sorted(self._served)) or 'none by name'}{below}",
            )
        return str(found)

    def take(self, key: str) -> ActionEngine:
        """The engine of a checkpoint, for one more client; `give_back` follows. Loads it where that
        has to be. Raises what `load` does, and Refusal where too many are in use.
        """
        with self._lock:
            engine = self._engines.pop(key, None)
            if engine is None:
                self._make_room()
                engine = self._load(key)
            self._engines[key] = engine
            self._users[key] = self._users.get(key, 0) + 1
            return engine

    def give_back(self, key: str) -> None:
        """One client less; the engine stays loaded until its room is needed."""
        with self._lock:
            self._users[key] -= 1

    def close(self) -> None:
        """Close all engines."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def _make_room(self) -> None:
        while len(self._engines) >= self._most:
            idle = next((key for key in self._engines if not self._users.get(key)), None)
            if idle is None:
                raise Refusal(
                    Reason.RESOURCE_EXHAUSTED,
                    f"{len(self._engines)} policies are loaded and in use (--loaded)",
                )
            self._engines.pop(idle).close()

    def _below(self, name: str) -> Path | None:
        """A policy in the operator's folder."""
        if self._folder is None or "\0" in name:
            return None
        if name.startswith("/"):
            prefix = f"{self._folder}/"
            if not name.startswith(prefix):
                return None
            name = name.removeprefix(prefix)
        parts = PurePosixPath(name).parts
        if not parts or any(part in ("..", "/") for part in parts):
            return None
        try:
            path = self._folder.joinpath(*parts).resolve()
            is_below = path.is_relative_to(self._folder) and path != self._folder
            return path if is_below and (path / CONFIG_FILE).is_file() else None
        except (OSError, ValueError, RuntimeError):  # a name that is too long, links in a circle
            return None
