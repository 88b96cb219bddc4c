"""A fleet on paper: when moving a capsule beats computing it again, and where turns should go.

IS: sizes of capsules from the plan of a shape, rates from the tables of docs/cuda-cost.md, a
network of given speed; the crossover by context length, and turns of many sessions on 1 to 1,000
nodes, event by event. IS NOT: a measurement. The same seed gives the same figures.

    python tools/fleet_simulation.py                 # rewrites docs/fleet-serve.md and its picture
    python tools/fleet_simulation.py --json out.json # also all figures
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from flashrt.backends.cpu.device import CpuDevice
from flashrt.capsule.lineage import segment_layout
from flashrt.core.planner import Band, plan_band
from flashrt.core.region import Role
from flashrt.fleet.replicas.ring import LOAD_BOUND
from flashrt.load import kv_dtype_of
from flashrt.models import model_for
from flashrt.view.figure import new_figure, save_figure
from flashrt.view.units import bytes_text, seconds_text
from flashrt.weights.random_checkpoint import shape_config

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs/fleet-serve.md"
COST_PAGE: Final = ROOT / "docs/cuda-cost.md"
PICTURE: Final = ROOT / "docs/pictures/fleet-crossover.svg"
GBITS: Final = (1, 10, 25, 100, 400)
# What nobody measured here: the share of a line's speed that one reader of a store gets, the time
# until its first byte, and the way from host memory to the device.
LINE_SHARE: Final = 0.9
STORE_LATENCY_S: Final = 0.005
HOST_BYTES_PER_S: Final = 20e9
LONGEST: Final = 1 << 18  # positions that are looked at: what Qwen3.5 is made for
SHORT, LONG = 2048, 16384  # lengths of the tables of the cost page


@dataclass(frozen=True, slots=True)
class Machine:
    """A shape on a GPU. A prompt of n tokens takes a*n + b*n^2 seconds: products by tokens,
    attention by their square. A capsule at n has `fixed` + n * `row` bytes, a decoded token takes
    `token_s` + n * `token_row_s`.
    """

    name: str
    a: float
    b: float
    fixed: float
    row: float
    token_s: float = 0.0
    token_row_s: float = 0.0

    def prefill_s(self, start: int, stop: int) -> float:
        """Tokens [start, stop), those before being there."""
        return self.a * (stop - start) + self.b * (stop * stop - start * start)

    def decode_s(self, at: int, n: int) -> float:
        """n tokens from position `at` on."""
        return n * (self.token_s + (at + n / 2) * self.token_row_s)

    def nbytes(self, n: int) -> float:
        """Of a capsule at n, in one piece."""
        return self.fixed + n * self.row

    def move_s(self, n: int, line: Line) -> float:
        """From the store to the device."""
        return line.seconds(self.nbytes(n)) + self.nbytes(n) / HOST_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Line:
    """A node's line to the store."""

    gbit: float
    latency_s: float = STORE_LATENCY_S

    @property
    def bytes_per_s(self) -> float:
        """That one reader gets."""
        return self.gbit * 1e9 / 8 * LINE_SHARE

    def seconds(self, nbytes: float) -> float:
        """For so many bytes."""
        return self.latency_s + nbytes / self.bytes_per_s


# -- from what the project says of itself ---------------------------------------------------------


def bands_of(shape: str, max_positions: int = LONGEST) -> tuple[Band, Band]:
    """The fixed band and the rows of a lane, as `flashrt plan --shape` lays them out."""
    model = model_for(
        shape_config(shape), max_positions=max_positions, kv_dtype=kv_dtype_of("bfloat16"),
        has_draft_head=False,
    )  # fmt: skip
    storage = CpuDevice().storage

    def band(role: Role) -> Band:
        return plan_band([r for r in model.lane_regions if r.role is role], storage)

    return band(Role.FIXED), band(Role.ROWS)


def capsule_nbytes(bands: tuple[Band, Band], n: int) -> int:
    """Of a capsule at n, to the byte: its rows are whole granules."""
    fixed, rows = bands
    return fixed.nbytes + segment_layout(rows, 0, n)[1]


def machine_of(title: str, gpu: str, shape: str, page: str) -> Machine:
    """Rates from the row of a GPU in the table below a title of the cost page, sizes from the plan.

    Raises LookupError where the page has no such row.
    """
    _, found, rest = page.partition(f"\n{title}, ")
    row = re.search(rf"^\| {re.escape(gpu)} \|(.+)\|$", rest.partition("\n\n0.8B")[0], re.MULTILINE)
    if not found or row is None:
        raise LookupError(f"{COST_PAGE.name} has no row of {gpu} below {title!r}")
    cells = [cell.strip() for cell in row[1].split("|")]
    token_short, token_long, first, last = (_seconds(cells[i]) for i in (1, 3, 5, 6))
    # Two lengths give two unknowns: T(n)/n = a + b*n.
    b = (last / LONG - first / SHORT) / (LONG - SHORT)
    a = first / SHORT - b * SHORT
    per_row = (token_long - token_short) / (LONG - SHORT)
    bands = bands_of(shape)
    low, high = capsule_nbytes(bands, SHORT), capsule_nbytes(bands, LONG)
    row_nbytes = (high - low) / (LONG - SHORT)
    return Machine(
        f"{title}, {gpu}", a, b, low - SHORT * row_nbytes, row_nbytes,
        token_short - SHORT * per_row, per_row,
    )  # fmt: skip


def _seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]


CASES: Final = (
    ("27B, nvfp4", "RTX 5090", "27b"),
    ("27B, bfloat16", "H200", "27b"),
    ("0.8B, bfloat16", "RTX 5090", "0.8b"),
    ("0.8B, bfloat16", "Orin", "0.8b"),
)


def machines(page: str | None = None) -> list[Machine]:
    """All cases."""
    text = COST_PAGE.read_text() if page is None else page
    return [machine_of(*case, text) for case in CASES]


# -- moving or computing --------------------------------------------------------------------------


def crossover(machine: Machine, line: Line) -> float | None:
    """The context length from which on moving a capsule takes no longer than computing it, in
    closed form; None where it never does.

    Computing takes a*n + b*n^2, moving L + F/v + n*r/v with 1/v = 1/line + 1/host. So n is the
    positive root of b*n^2 + (a - r/v)*n - (L + F/v) = 0.
    """
    per_byte = 1 / line.bytes_per_s + 1 / HOST_BYTES_PER_S
    slope = machine.a - machine.row * per_byte
    floor = line.latency_s + machine.fixed * per_byte
    if machine.b == 0:
        return floor / slope if slope > 0 else None
    root = math.sqrt(slope * slope + 4 * machine.b * floor)
    return (root - slope) / (2 * machine.b)


def crossover_found(
    machine: Machine, line: Line, nbytes: Callable[[int], float], most: int = LONGEST
) -> int | None:
    """The same by looking: the first length at which a node that needs a state has it sooner from
    the store, both ways being played through with capsules of `nbytes`.
    """

    def moved_first(n: int) -> bool:
        arrived = line.latency_s + nbytes(n) / line.bytes_per_s  # the line, then the bus
        return arrived + nbytes(n) / HOST_BYTES_PER_S <= machine.prefill_s(0, n)

    if not moved_first(most):
        return None
    low, high = 0, most  # moving loses at low, wins at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if moved_first(middle) else (middle, high)
    return high


# -- turns on many nodes --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What users do. Lengths are drawn around these, the think time is exponential; `busy` is the
    share of a fleet's capacity that they would use if every state were where its turn goes.
    """

    prompt: int = 4000
    said: int = 200
    reply: int = 250
    turns: int = 8
    think_s: float = 20.0
    busy: float = 0.7
    sessions_per_node: int = 40
    lanes: int = 8


POLICIES: Final = ("random", "hash", "where the capsule is")


@dataclass(slots=True)
class _Node:
    """When each of its parts is free again: prompts are fed one by one, a turn has a lane."""

    lanes: list[float]
    prompts: float = 0.0
    line: float = 0.0
    ends: list[float] = field(default_factory=list)  # of its turns, a heap

    def running(self, now: float) -> int:
        """Turns that are there."""
        while self.ends and self.ends[0] <= now:
            heapq.heappop(self.ends)
        return len(self.ends)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy. Times in seconds to the first token, of all turns but the first of a session;
    moved: share of them whose state came from the store; computed: that computed theirs again.
    """

    policy: str
    nodes: int
    p50: float
    p99: float
    moved: float
    computed: float


class _Fleet:
    """Nodes, and where each session's state is."""

    def __init__(
        self, machine: Machine, line: Line, load: Load, nodes: int, policy: str, draw: random.Random
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r}; choose one of {', '.join(POLICIES)}")
        self._machine, self._line, self._policy, self._draw = machine, line, policy, draw
        self._nodes = [_Node([0.0] * load.lanes) for _ in range(nodes)]
        n = nodes * load.sessions_per_node
        self._hashed = [draw.randrange(nodes) for _ in range(n)]
        self._home, self._at = [-1] * n, [0] * n
        self.moved = self.computed = 0

    def turn(self, now: float, session: int, said: int, reply: int) -> tuple[float, float]:
        """A turn that comes now: when its first token is there, and its last."""
        machine, where = self._machine, self._where(now, session)
        node, start = self._nodes[where], self._at[session]
        begun = max(now, heapq.heappop(node.lanes))
        if start and self._home[session] != where:
            begun = self._brought(node, begun, start)
        fed = max(begun, node.prompts) + machine.prefill_s(start, start + said)
        end = fed + machine.decode_s(start + said, reply)
        node.prompts = fed
        heapq.heappush(node.lanes, end)
        heapq.heappush(node.ends, end)
        self._home[session], self._at[session] = where, start + said + reply
        return fed, end

    def _where(self, now: float, session: int) -> int:
        if self._policy == "random":
            return self._draw.randrange(len(self._nodes))
        if self._policy == "hash":  # of roots that differ it is a draw for each session
            return self._hashed[session]
        if self._home[session] >= 0:
            return self._home[session]
        # As the ring does (fleet.ring.choose): a root's order of the nodes is a random one, and the
        # first node that has no more than its share is taken.
        loads = [node.running(now) for node in self._nodes]
        share = math.ceil(LOAD_BOUND * (sum(loads) + 1) / len(loads))
        while loads[at := self._draw.randrange(len(loads))] >= share:
            pass
        return at

    def _brought(self, node: _Node, begun: float, start: int) -> float:
        """When a state that is elsewhere is here: from the store, or computed again."""
        machine, line = self._machine, self._line
        line_from = max(begun, node.line)
        arrival = line_from + machine.move_s(start, line)
        alone = max(begun, node.prompts) + machine.prefill_s(0, start)
        if arrival <= alone:
            node.line = line_from + line.seconds(machine.nbytes(start))
            self.moved += 1
            return arrival
        node.prompts = alone
        self.computed += 1
        return alone


def simulate(
    machine: Machine, line: Line, load: Load, nodes: int, policy: str, seed: int = 0
) -> Outcome:
    """Turns in the order in which they come, each at a node: it waits for a lane; its state is
    fetched or computed again, whichever is over sooner, unless it is there; the new tokens are fed
    in the order in which turns came, and the reply is decoded. A state is in the store from the
    end of its turn. Raises ValueError for an unknown policy.
    """
    lengths, places = random.Random(seed), random.Random(seed + 1)  # the same users for all
    fleet = _Fleet(machine, line, load, nodes, policy, places)
    n_sessions = nodes * load.sessions_per_node
    begin_s = _beginning_s(machine, load, nodes, n_sessions)
    plans = [_Plan.drawn(load, lengths, begin_s) for _ in range(n_sessions)]
    comes = [(plan.begins, i, 0) for i, plan in enumerate(plans)]
    heapq.heapify(comes)
    waits = list[float]()
    while comes:
        now, i, turn = heapq.heappop(comes)
        said, reply, think_s = plans[i].turns[turn]
        first, last = fleet.turn(now, i, said, reply)
        if turn:
            waits.append(first - now)
        if turn + 1 < load.turns:
            heapq.heappush(comes, (last + think_s, i, turn + 1))
    waits.sort()
    n = len(waits)
    p50, p99 = (waits[min(n - 1, int(q * n))] for q in (0.50, 0.99))
    return Outcome(policy, nodes, p50, p99, fleet.moved / n, fleet.computed / n)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a session's user does: when it begins; of each turn what is said, replied, and the time
    until the next.
    """

    begins: float
    turns: tuple[tuple[int, int, float], ...]

    @classmethod
    def drawn(cls, load: Load, draw: random.Random, begin_s: float) -> _Plan:
        def length(mean: int) -> int:
            return max(1, round(mean * (0.5 + draw.random())))

        turns = (
            (
                length(load.prompt if turn == 0 else load.said),
                length(load.reply),
                draw.expovariate(1 / load.think_s),
            )
            for turn in range(load.turns)
        )
        return cls(draw.random() * begin_s, tuple(turns))


def _beginning_s(machine: Machine, load: Load, nodes: int, n_sessions: int) -> float:
    """The time over which sessions begin, so that nodes are as busy as `load` says."""
    at, prompts, lane = 0, 0.0, 0.0
    for turn in range(load.turns):
        said = load.prompt if turn == 0 else load.said
        fed = machine.prefill_s(at, at + said)
        prompts += fed
        lane += fed + machine.decode_s(at + said, load.reply)
        at += said + load.reply
    return n_sessions * max(prompts, lane / load.lanes) / nodes / load.busy


# -- the page -------------------------------------------------------------------------------------

NODES: Final = (1, 10, 100, 1000)
SIMULATED: Final = ("27B, nvfp4", "RTX 5090", "27b")
LINE: Final = Line(25)


def crossover_rows(found: Sequence[Machine]) -> Iterator[list[str]]:
    """A machine a row: bytes and seconds at 16k, then the crossover by speed of the line."""
    for machine in found:
        cells = [machine.name, bytes_text(round(machine.nbytes(LONG)))]
        cells.append(seconds_text(machine.prefill_s(0, LONG)))
        for gbit in GBITS:
            n = crossover(machine, Line(gbit))
            cells.append("never" if n is None or n > LONGEST else f"{round(n):,}")
        yield cells


def policy_rows(outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    """An outcome a row."""
    for o in outcomes:
        yield [
            f"{o.nodes:,}", o.policy, seconds_text(o.p50), seconds_text(o.p99),
            f"{100 * o.moved:.0f}%", f"{100 * o.computed:.0f}%",
        ]  # fmt: skip


def outcomes(machine: Machine, load: Load, seed: int) -> list[Outcome]:
    """All policies on all sizes; the same load for a thousand nodes with fewer sessions each."""
    made = []
    for nodes in NODES:
        sized = load if nodes < 1000 else replace(load, sessions_per_node=10)
        made += [simulate(machine, LINE, sized, nodes, p, seed) for p in POLICIES]
    return made


def draw(found: Sequence[Machine], path: Path) -> Path:
    """Crossover lengths over the speed of the line. Raises FlashrtError without matplotlib."""
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    speeds = [10 ** (i / 20) for i in range(round(20 * math.log10(400)) + 1)]
    for machine, color in zip(found, ("#2f6fb0", "#c05621", "#3d8f57", "#8250df"), strict=True):
        ns = [crossover(machine, Line(gbit)) for gbit in speeds]
        axes.plot(speeds, [n or math.nan for n in ns], color=color, label=machine.name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(GBITS, [f"{gbit}" for gbit in GBITS])
    axes.minorticks_off()
    axes.set_ylim(10, LONGEST)
    axes.set_xlabel("line of a node, Gbit/s")
    axes.set_ylabel("context, tokens")
    axes.set_title("Above a line, a capsule is moved sooner than it is computed again", fontsize=11)
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def table(header: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Markdown; the first two columns are text."""
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rewritten(page: str, name: str, text: str) -> str:
    """The page with another text between its markers. Raises LookupError without them."""
    pattern = re.compile(rf"(<!-- computed: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    made, n = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    if n != 1:
        raise LookupError(f"{PAGE.name} has no place for {name}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite page and picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    found = machines()
    (machine,) = (m for m in found if m.name == f"{SIMULATED[0]}, {SIMULATED[1]}")
    load = Load()
    played = outcomes(machine, load, given.seed)
    speeds = [f"{gbit} Gbit/s" for gbit in GBITS]
    page = given.page.read_text()
    header = ["", "capsule at 16k", "computed in", *speeds]
    page = rewritten(page, "crossover", table(header, crossover_rows(found)))
    header = ["nodes", "a turn goes", "TTFT p50", "p99", "moved", "computed again"]
    page = rewritten(page, "policies", table(header, policy_rows(played)))
    given.page.write_text(page)
    draw(found, given.picture)
    if given.json is not None:
        figures: dict[str, Any] = {
            "seed": given.seed, "load": asdict(load), "machines": [asdict(m) for m in found],
            "outcomes": [asdict(o) for o in played],
        }  # fmt: skip
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
