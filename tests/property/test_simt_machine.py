"""The random histories of test_machine on the raw CUDA kernels, under random schedules."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests.property.test_machine import GOLDEN, LANES, LIMIT, Histories

QUICK = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "high"])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_histories(precision: str, seed: int) -> None:
    class SimtHistories(Histories):
        engine = None
        folder = tempfile.TemporaryDirectory(prefix="flashrt-test-store-")

        @staticmethod
        def load() -> flashrt.Engine:
            return load_on(
                lambda: SimtDevice(precision, seed=seed),
                GOLDEN / "tiny",
                max_positions=LIMIT,
                lanes=LANES,
            )

    run_state_machine_as_test(SimtHistories, settings=QUICK)
