"""Dense decoders against their equations in float64: logits of prefill, of decode, on two devices.

Red when a bias, a head norm, a rotary scaling or a layer without rotary positions is left out, or
applied to another model type.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flashrt
from tests import dense_models
from tests.golden.expected import TOLERANCE

PROMPT = [(7 * i * i + 3 * i) % dense_models.VOCAB for i in range(150)]


@pytest.mark.parametrize("device", ["cpu", "simt"])
@pytest.mark.parametrize("name", dense_models.CONFIGS)
def test_logits_are_those_of_the_equations(name: str, device: str, tmp_path: Path) -> None:
    config = dense_models.CONFIGS[name]
    folder = dense_models.write(tmp_path / name, config)
    n = len(PROMPT) if device == "cpu" else 70  # the shim takes a second for each row of 64
    engine = flashrt.load(folder, device, max_positions=300, kv_dtype="float32", precision="high")
    with engine.session() as session:
        session.prefill(PROMPT[: n - 9])
        seen = [session.logits()]
        for token in PROMPT[n - 9 : n - 6]:
            session.prefill([token])
            seen.append(session.logits())
        session.prefill(PROMPT[n - 6 : n])
        seen.append(session.logits())
    engine.close()
    wanted = dense_models.logits(config, dense_models.weights_of(config), PROMPT[:n])
    wanted = wanted[[n - 10, n - 9, n - 8, n - 7, n - 1]]
    assert 1.0 < wanted.std() < 6.0, "logits of another size: the tolerance means something else"
    worst = float(np.abs(np.array(seen) - wanted).max())
    assert worst <= TOLERANCE, f"off by {worst:.2e}"
