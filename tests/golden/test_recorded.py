"""The bits of a fixed history are those that were recorded: nobody changed a sum in passing.

Red when an order of additions, a kernel, the sequence of ops, the digest or the layout of state
changes its result; see record.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrt.weights.bundled import bundled_checkpoint
from tests.golden.record import POLICIES, RECORDED, history_of_actions, history_of_tokens

recorded: dict[str, Any] = json.loads(RECORDED.read_text())


def test_bundled_model() -> None:
    assert history_of_tokens(bundled_checkpoint()) == recorded["tokens"]["tiny-agent"]


def test_golden_set(golden_set: Path) -> None:
    if golden_set.name not in recorded["tokens"]:
        pytest.skip("a set from elsewhere: nothing of it was recorded")
    assert history_of_tokens(golden_set) == recorded["tokens"][golden_set.name]


@pytest.mark.parametrize("name", POLICIES)
def test_bundled_policy(name: str) -> None:
    assert history_of_actions(name) == recorded["actions"][name]
