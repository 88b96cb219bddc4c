"""How fast the CPU decodes through a mixture of experts: one row, random experts, bytes per second.

IS: `experts_in` and `experts_out` of one layer, by default of Qwen3.5 35B-A3B, for formats and
activations, beside the time that reading as many bytes takes, and `linear` of as many rows in one
matrix; the least of many launches, in turns.
IS NOT: a model: no router, no attention.

    python tools/experts_speed.py --format gptq,q4_k --activations int16,int8
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from flashrt.backends.cpu.device import Activations, CpuDevice
from flashrt.core.backend import BoundLaunch, Graph
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.op import Op, bind
from flashrt.core.region import DType, Layout, Region, Role, View
from flashrt.ops.experts import EXPERTS_IN, EXPERTS_OUT
from flashrt.ops.linear import LINEAR
from flashrt.ops.table import CURSOR_WORDS, OPS

FORMATS = {
    "gptq": (DType.U4, Groups(128, Scales.F16)),
    "q4_0": (DType.U4, Groups(32, Scales.F16)),
    "q4_k": (DType.U4, Groups(32, Scales.TWO_LEVEL_MIN, 256)),
    "q8_0": (DType.I8, Groups(32, Scales.F16)),
    "fp8": (DType.E4M3, Groups(128, Scales.F32)),
    "bf16": (DType.BF16, None),
}


class Layer:
    """The weights and operands of one layer on a device, and a graph for each of its two ops."""

    def __init__(
        self, device: CpuDevice, form: str, sizes: tuple[int, int, int, int], rows: int
    ) -> None:
        self.device, self.rng = device, np.random.default_rng(1)
        self.deck = np.empty(0, np.int64)
        experts, picks, hidden, columns = sizes
        self.experts, self.shape = experts, (rows, picks)
        dtype, groups = FORMATS[form]
        self.at: dict[str, int] = {}
        self.nbytes = {}  # of an expert
        w = {}
        for name, n, k in (("in", 2 * columns, hidden), ("out", hidden, columns)):
            w[name] = Region(
                name, (experts * n, k), dtype, Role.WEIGHT, Layout.MATRIX, groups=groups
            )
            self.nbytes[name] = self._fill(w[name], n)
        act, i32, f32 = DType.ACT, DType.I32, DType.F32
        x, h = self._scratch("x", act, rows, hidden), self._scratch("h", act, rows, picks, columns)
        cursor = self._scratch("cursor", i32, CURSOR_WORDS)
        words = np.zeros(CURSOR_WORDS, np.int32)
        words[1] = rows
        device.write(self.at["cursor"], words.view(np.uint8))
        for region in (x, h):
            values = self.rng.standard_normal(region.size).astype(np.float32)
            device.write(self.at[region.name], values.view(np.uint8))
        shared = {
            "picks": self._scratch("picks", i32, rows, picks), "cursor": cursor,
            "groups": self._scratch("groups", i32, experts, 2),
            "members": self._scratch("members", i32, rows, picks, 2),
        }  # fmt: skip
        gates = self._scratch("gates", f32, rows, picks)
        products = self._scratch("products", f32, rows, picks, hidden)
        y = self._scratch("y", f32, rows, hidden)
        # as many rows of one matrix, and where they begin
        n = min(picks * 2 * columns, experts * 2 * columns)
        dense = self._scratch("dense", f32, rows, n)
        self.graphs = {
            "linear": self._graph(LINEAR, x=x, w=w["in"].span(0, n), cursor=cursor, y=dense),
            "in": self._graph(EXPERTS_IN, x=x, w=w["in"], h=h, **shared),
            "out": self._graph(
                EXPERTS_OUT, h=h, w=w["out"], gates=gates, products=products, y=y, **shared
            ),
        }

    def _fill(self, region: Region, rows: int) -> int:
        """All experts alike: their bytes lie apart, which is what counts. Bytes of one."""
        dtype, groups, k = region.dtype, region.groups, region.shape[1]
        one = Region("one", (rows, k), dtype, Role.WEIGHT, Layout.MATRIX, groups=groups)
        raw = np.empty(self.device.storage(one).nbytes, np.uint8)
        if groups is None:
            values = self.rng.standard_normal((rows, k)).astype(np.float32)
            self.device.pack(one, (values.view(np.uint32) >> 16).astype(np.uint16), raw)
        else:
            codes = self.rng.integers(0, 1 << min(dtype.bits, 7), (rows, k)).astype(np.uint8)
            if dtype is DType.E4M3:
                codes[codes & 127 == 127] = 1
            planes = [
                np.full((rows, -(-k // p.size)), 0.01 if p.dtype.kind == "f" else 3, p.dtype)
                for p in groups.planes
            ]
            kind = np.int8 if dtype is DType.I8 else np.uint8
            self.device.pack(one, Planes(codes.view(kind), tuple(planes)), raw)
        memory = self.device.allocate(region.name, self.experts * raw.nbytes)
        self.at[region.name] = memory.address
        for e in range(self.experts):
            self.device.write(memory.address + e * raw.nbytes, raw)
        return raw.nbytes

    def _scratch(self, name: str, dtype: DType, *shape: int) -> Region:
        region = Region(name, shape, dtype, Role.SCRATCH)
        memory = self.device.allocate(name, self.device.storage(region).nbytes)
        self.at[name] = memory.address
        return region

    def _graph(self, op: Op, **operands: Region | View) -> Graph:
        launch = bind(op, operands, {})
        addresses = tuple(self.at[v.region.name] for v in launch.operands)
        return self.device.capture([BoundLaunch(launch, addresses)])

    def pick(self) -> int:
        """The next experts of a shuffled deck for every row, so that no cache has them; how many
        they are.
        """
        rows, picks = self.shape
        if len(self.deck) < picks:
            self.deck = self.rng.permutation(self.experts)
        one, self.deck = np.sort(self.deck[:picks]), self.deck[picks:]
        others = [np.sort(self.rng.permutation(self.experts)[:picks]) for _ in range(rows - 1)]
        chosen = np.array([one, *others], np.int32)
        self.device.write(self.at["picks"], chosen.reshape(-1).view(np.uint8))
        return len(np.unique(chosen))


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(layer: Layer, what: str, rounds: int) -> tuple[float, float, float]:
    """Least microseconds of a launch, of reading its bytes; and megabytes of it. Whatever a launch
    or a read wants was last used so long ago that no cache has it.
    """
    device, limits = layer.device, layer.device.limits()
    matrix = "out" if what == "out" else "in"
    launches, reads, nbytes, at = [], [], 0, 0
    for _ in range(rounds):
        nbytes = layer.pick() * layer.nbytes[matrix]
        if what == "linear":  # always the same rows: out of the caches first
            nbytes = layer.shape[1] * layer.nbytes[matrix]
            rest = layer.experts * layer.nbytes[matrix] - nbytes
            limits.read_seconds(layer.at["in"] + nbytes, min(96 << 20, rest))
        launches.append(seconds_of(lambda: device.replay(layer.graphs[what])))
        at = at + nbytes if at + 2 * nbytes <= layer.experts * layer.nbytes[matrix] else 0
        reads.append(limits.read_seconds(layer.at[matrix] + at, nbytes))
    return 1e6 * min(launches), 1e6 * min(reads), nbytes / 1e6


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--format", default="gptq,q4_k")
    parser.add_argument("--activations", default="float32,int16,int8")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--picks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=512, help="of an expert")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    sizes = given.experts, given.picks, given.hidden, given.columns
    print("format  x        op          MB       us   GB/s  read, us  of it")
    for form in given.format.split(","):
        for activations in given.activations.split(","):
            way: Activations = activations
            device = CpuDevice(given.threads, activations=way)
            device.build(OPS)
            layer = Layer(device, form, sizes, given.rows)
            for what in ("in", "out", "linear"):
                us, read, megabytes = measure(layer, what, given.rounds)
                print(
                    f"{form:7} {activations:8} {what:7} {megabytes:7.1f} {us:8.0f} "
                    f"{1e3 * megabytes / us:6.1f} {read:9.0f} {read / us:6.0%}"
                )
            device.close()


if __name__ == "__main__":
    main()
