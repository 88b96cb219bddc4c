"""Chat servers as processes that a bench asks in turns: flashrt's own, and llama.cpp's.

IS: starting them on a port of loopback, their memory, their end. IS NOT: what they are asked
(clients). An idle one costs the other nothing but its memory.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import printable
from flashrt.commands.checkpoints import EngineOptions

LANES = 8  # of each server: requests that run side by side
POSITIONS = 1024  # of a lane
_STARTING_S = 300.0
_LOOK_S, _LOOKING_S = 0.1, 10.0
_ENDING_S = 20.0
_HOST = "127.0.0.1"


class Server:
    """A process that serves until `close`."""

    def __init__(self, name: str, command: Sequence[str], port: int) -> None:
        """Returns once it serves. Raises FlashrtError if it does not come to that."""
        self.name, self.url = name, f"http://{_HOST}:{port}"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said
            )
        except OSError as error:
            raise FlashrtError(f"{command[0]} does not run: {error.strerror or error}") from error
        begun = time.monotonic()
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() - begun > _STARTING_S:
                self.close()
                raise FlashrtError(f"{name} does not serve: {self._last_words()}")
            time.sleep(_LOOK_S)

    @property
    def memory_nbytes(self) -> int:
        """Of its resident memory."""
        return resident_nbytes(self._process.pid)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path. Raises OSError and http.client.HTTPException."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_LOOKING_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise http.client.HTTPException(f"{path}: {answer.status}")
            found: dict[str, Any] = json.loads(answer.read())
            return found

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raises FlashrtError if it has ended by itself."""
        if (status := self._process.poll()) is not None:
            raise FlashrtError(f"{self.name} ended with {status}: {self._last_words()}")

    def _is_up(self) -> bool:
        try:
            self.get("/health")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        return printable(lines[0]) if lines else "it said nothing"


def flashrt_server(checkpoint: Path, options: EngineOptions, host_nbytes: int | None) -> Server:
    """`flashrt serve` with the engine's options."""
    port = _free_port()
    command = [
        sys.executable, "-m", "flashrt", "serve", str(checkpoint), "--port", str(port),
        "--lanes", str(LANES), "--max-positions", str(POSITIONS),
        "--device", options.device, "--precision", options.precision,
    ]  # fmt: skip
    if host_nbytes is not None:
        command += ["--host-bytes", str(host_nbytes)]
    if options.weights is not None:
        command += ["--weights", options.weights]
    if options.draft is False:
        command.append("--no-draft")
    return Server("flashrt", command, port)


def llama_server(binary: Path, model: Path, threads: int) -> Server:
    """llama.cpp's server on a GGUF file, with as many sequences of as many positions."""
    port = _free_port()
    command = [
        str(binary), "-m", str(model), "-np", str(LANES), "-c", str(LANES * POSITIONS),
        "-t", str(threads), "--host", _HOST, "--port", str(port),
    ]  # fmt: skip
    return Server(_version(binary), command, port)


@contextlib.contextmanager
def closing(servers: Sequence[Server]) -> Iterator[None]:
    """They end with the block."""
    try:
        yield
    finally:
        for server in servers:
            server.close()


def resident_nbytes(pid: int) -> int:
    """Memory that a process has now."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    said = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return int(said.stdout or 0) * 1024


def _version(binary: Path) -> str:
    """As `llama.cpp's server, 1234 (build 5, commit abc)`."""
    try:
        said = subprocess.run(
            [str(binary), "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise FlashrtError(f"{binary} does not run: {error.strerror or error}") from error
    found = re.search(r"version: (.+)", said.stdout + said.stderr)
    return f"llama.cpp's server, {printable(found[1])}" if found else "llama.cpp's server"


def _free_port() -> int:
    with socket.socket() as held:
        held.bind((_HOST, 0))
        port: int = held.getsockname()[1]
        return port
