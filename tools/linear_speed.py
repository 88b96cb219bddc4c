"""How fast the CPU multiplies rows by a matrix in bfloat16: `linear` in the default precision and
in `fast`, and torch beside it where it is installed, in turns.

IS: one launch at a time, of shapes ROWSxKxN, over and over; the median of many turns, each the time
of several launches. IS NOT: a model. Shapes of a policy's vision tower and its experts by default.

    python tools/linear_speed.py --threads 2 --rounds 15
    python tools/linear_speed.py --shapes 1x1024x8192,8x1024x8192 --processor-seconds --threads 1
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashrt.backends.choose import Precision, open_backend
from flashrt.backends.cpu.device import CpuDevice
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import bind
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.ops.linear import LINEAR
from flashrt.ops.table import CURSOR_WORDS, OPS

SHAPES = "1024x768x3072,1024x3072x768,241x960x2560,50x720x2048"
Run = Callable[[], object]


class Ours:
    """A device of a precision, and room for one launch."""

    def __init__(self, precision: Precision, threads: int, nbytes: int) -> None:
        device = open_backend("cpu", precision)
        assert isinstance(device, CpuDevice)
        device.build(OPS)
        device.resize(threads)
        self.device, self.memory = device, device.allocate("arena", nbytes)

    def launch(self, x: NDArray[np.float32], w: NDArray[np.float32]) -> Run:
        """A graph of y = x w^T, w rounded to bfloat16 by cutting it off."""
        (t, k), n = x.shape, len(w)
        words = np.zeros(CURSOR_WORDS, np.int32)
        words[1] = t
        operands: dict[str, tuple[Region, NDArray[np.generic]]] = {
            "x": (Region("x", (t, k), DType.ACT, Role.IO), x),
            "w": (
                Region("w", (n, k), DType.BF16, Role.WEIGHT, Layout.MATRIX),
                (w.view(np.uint32) >> 16).astype(np.uint16),
            ),
            "cursor": (Region("cursor", (CURSOR_WORDS,), DType.I32, Role.IO), words),
            "y": (Region("y", (t, n), DType.F32, Role.IO), np.zeros((t, n), np.float32)),
        }
        at, addresses = self.memory.address, []
        for region, array in operands.values():
            raw = np.empty(self.device.storage(region).nbytes, np.uint8)
            self.device.pack(region, array, raw)
            self.device.write(at, raw)
            addresses.append(at)
            at += -(-raw.nbytes // 4096) * 4096
        launch = bind(LINEAR, {name: region for name, (region, _) in operands.items()}, {})
        graph = self.device.capture([BoundLaunch(launch, tuple(addresses))])
        return lambda: self.device.replay(graph)


def of_torch(x: NDArray[np.float32], w: NDArray[np.float32], threads: int) -> dict[str, Run]:
    """The same products in torch, or nothing."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(threads)
    runs: dict[str, Run] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.tensor(x, dtype=dtype), torch.tensor(w, dtype=dtype)
        name = str(dtype).replace("torch.", "torch ")
        runs[name] = lambda a=a, b=b: torch.nn.functional.linear(a, b)  # type: ignore[misc]
    return runs


def seconds_of(run: Run, clock: Callable[[], float], least: float) -> float:
    """Of one call, of as many as last `least` seconds."""
    run()
    started, n = clock(), 0
    while clock() - started < least:
        run()
        n += 1
    return (clock() - started) / n


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a turn")
    parser.add_argument(
        "--processor-seconds", action="store_true", help="instead of a clock's: others may compute"
    )
    given = parser.parse_args()
    clock = time.process_time if given.processor_seconds else time.perf_counter
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    room = max(4 * m * k + 2 * (n + 31) * k + 4 * m * n for m, k, n in shapes) + (1 << 20)
    ours = {
        "default": Ours("bfloat16", given.threads, room),
        "fast": Ours("fast", given.threads, room),
    }
    rng = np.random.default_rng(0)
    print("rows x K x N: GFLOP/s, and times the first column")
    for m, k, n in shapes:
        x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k)))
        runs = of_torch(x, w, given.threads)
        runs |= {name: device.launch(x, w) for name, device in ours.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.rounds):
            for name, run in runs.items():
                found[name].append(seconds_of(run, clock, given.seconds))
        medians = {name: statistics.median(times) for name, times in found.items()}
        first = next(iter(medians.values()))
        columns = (
            f"{name} {2e-9 * m * k * n / seconds:.0f} ({first / seconds:.1f} x)"
            for name, seconds in medians.items()
        )
        print(f"{m} x {k} x {n}:", ", ".join(columns), flush=True)
    for device in ours.values():
        device.device.close()


if __name__ == "__main__":
    main()
