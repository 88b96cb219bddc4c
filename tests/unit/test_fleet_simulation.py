"""The arithmetic of tools/fleet_simulation.py.

Red when the closed form of the crossover and the two ways played through part by more than a
granule of rows, rates do not give back the tables that they came from, the same seed gives other
figures, or the page has others than the tool would write.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "fleet_simulation", ROOT / "tools/fleet_simulation.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fleet = _tool()
MACHINES = fleet.machines()


@pytest.mark.parametrize("gbit", fleet.GBITS)
@pytest.mark.parametrize(("case", "machine"), list(zip(fleet.CASES, MACHINES, strict=True)))
def test_the_closed_form_is_what_is_found_by_looking(case, machine, gbit) -> None:
    line, bands = fleet.Line(gbit), fleet.bands_of(case[2])
    expected = fleet.crossover(machine, line)
    found = fleet.crossover_found(machine, line, lambda n: fleet.capsule_nbytes(bands, n))
    if found is None:
        assert expected is None or expected > fleet.LONGEST
    else:
        granule = max(slot.storage.granule for slot in bands[1].slots)
        # Rows come in whole granules: the capsule is up to one larger than n rows. Where the two
        # ways take nearly the same time for long, that shifts their meeting by more.
        per_byte = 1 / line.bytes_per_s + 1 / fleet.HOST_BYTES_PER_S
        gain = machine.a + 2 * machine.b * found - machine.row * per_byte
        slack = machine.row * granule * per_byte / gain
        assert abs(found - expected) <= 1 + slack


def test_rates_give_back_the_tables_that_they_came_from() -> None:
    machine = MACHINES[0]  # 27B, nvfp4, RTX 5090: docs/cuda-cost.md
    assert machine.prefill_s(0, 2048) == pytest.approx(1.11)
    assert machine.prefill_s(0, 16384) == pytest.approx(9.09)
    assert machine.prefill_s(0, 300) + machine.prefill_s(300, 2048) == pytest.approx(1.11)
    assert machine.decode_s(2048, 0) == 0
    assert machine.token_s + 2048 * machine.token_row_s == pytest.approx(10.8e-3)
    assert machine.token_s + 16384 * machine.token_row_s == pytest.approx(11.4e-3)
    bands = fleet.bands_of("27b")
    assert machine.nbytes(8192) == pytest.approx(fleet.capsule_nbytes(bands, 8192), rel=1e-6)


def test_without_attention_the_crossover_is_a_line() -> None:
    machine = fleet.Machine("m", a=1e-4, b=0.0, fixed=1e8, row=1e4)
    line = fleet.Line(10)
    n = fleet.crossover(machine, line)
    assert n is not None and machine.prefill_s(0, n) == pytest.approx(machine.move_s(n, line))
    assert fleet.crossover(replace(machine, a=1e-6), line) is None, "rows come slower than tokens"


def test_one_turn_alone_takes_what_its_parts_take() -> None:
    machine = MACHINES[0]
    load = fleet.Load(turns=2, sessions_per_node=1, lanes=1)
    alone = fleet.simulate(machine, fleet.LINE, load, 1, "hash")
    assert alone.p50 == alone.p99 and alone.moved == alone.computed == 0
    low, high = machine.prefill_s(2000, 2100), machine.prefill_s(6500, 6800)
    assert low <= alone.p50 <= high


def test_the_same_seed_gives_the_same_and_places_differ() -> None:
    load = fleet.Load(sessions_per_node=10)
    first, again = (fleet.simulate(MACHINES[0], fleet.LINE, load, 10, "random", 3) for _ in "ab")
    assert first == again
    there, hashed = (
        fleet.simulate(MACHINES[0], fleet.LINE, load, 10, policy, 3)
        for policy in ("where the capsule is", "hash")
    )
    assert there.moved == hashed.moved == 0 and 0.8 < first.moved + first.computed <= 1
    assert there.p50 < first.p50
    slow = fleet.simulate(MACHINES[1], fleet.Line(1), load, 10, "random", 3)
    assert slow.computed > 0.5, "a line so slow moves nothing that an H200 has sooner by itself"
    with pytest.raises(ValueError, match="choose one of random"):
        fleet.simulate(MACHINES[0], fleet.LINE, load, 1, "best")


def test_the_page_has_the_crossovers_of_the_tool(tmp_path: Path) -> None:
    drawn = fleet.draw(MACHINES, tmp_path / "crossover.svg").read_text()
    assert all(machine.name.split(",")[0] in drawn for machine in MACHINES)
    page = (ROOT / "docs/fleet-serve.md").read_text()
    for row in fleet.crossover_rows(MACHINES):
        assert f"| {' | '.join(row)} |" in page
