"""A small fleet on Ray: sessions go on, to the same tokens and counts, whoever dies or is drained.

The full size, and its figures: docs/fleet-serve.md. Red when a turn is lost, twice there, or of
other tokens than one server's, or when less of a prompt is known than there.
"""

from __future__ import annotations

import socket
from pathlib import Path

from tests.fleet.trial import trial


def test_sessions_outlive_their_replicas(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    made = trial(tmp_path, replicas=2, sessions=6, turns=3, clients=3, port=port)
    assert made.drained and made.killed and made.moved
    assert made.lost == [] and made.other_text == []
    # A turn that is sent again may find what its first try left: more, never less.
    for other in made.other_counts:
        assert other["fleet"]["tries"] > 1, other
        assert other["fleet"]["cached_tokens"] > other["one"]["cached_tokens"], other
