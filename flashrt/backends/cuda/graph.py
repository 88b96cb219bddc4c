"""CUDA graphs: launches captured from a private stream, instantiated and uploaded before first use.

IS: capture and what holds its handles. Arguments are packed once, before; the driver copies them at
capture. IS NOT: the choice of kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrt.backends.cuda.driver_api import ArgumentBlock, Driver, LaunchConfig
from flashrt.backends.cuda.sending import SentWord
from flashrt.base.errors import BackendError


@dataclass(frozen=True, slots=True)
class Node:
    """One kernel launch, ready to go."""

    name: str
    function: int
    config: LaunchConfig
    block: ArgumentBlock

    def launch(self, driver: Driver, stream: int) -> None:
        """Put the launch into a stream."""
        driver.launch(self.function, self.config, self.block, stream)


class CudaGraph:
    """An instantiated graph, resident on the device."""

    def __init__(
        self, driver: Driver, stream: int, nodes: Sequence[Node], sent: SentWord | None = None
    ) -> None:
        """Capture the nodes on `stream`, which must be idle; it is idle again afterwards. `sent`:
        the word that they send to the host.
        """
        self._driver = driver
        self.sent = sent
        self.nodes = tuple(nodes)
        driver.capture_begin(stream)
        try:
            for node in nodes:
                node.launch(driver, stream)
        except BackendError:
            with contextlib.suppress(BackendError):  # the first error is the one to tell
                driver.capture_end(stream)  # else the stream stays unusable
            raise
        self._graph = driver.capture_end(stream)
        self._executable = driver.graph_instantiate(self._graph)
        driver.graph_upload(self._executable, stream)
        driver.stream_sync(stream)

    @property
    def n_launches(self) -> int:
        """Kernel nodes; an op may take several."""
        return len(self.nodes)

    def replay(self, stream: int) -> None:
        """Run all nodes in order: one call. The device's verb calls it, and counts what is sent."""
        self._driver.graph_launch(self._executable, stream)

    def write_dot(self, path: Path) -> None:
        """Write the graph as Graphviz."""
        self._driver.graph_dot(self._graph, path)

    def close(self) -> None:
        """Release the handles."""
        self._driver.graph_destroy(self._graph, self._executable)
