"""A kernel, an op and a region of your own, in the graphs and in the capsules.

Counts how often each token was fed, on the device, in a region declared `fixed`: nothing else is
said about capsules, yet snapshot, restore and rollback carry the counts. Runs on cpu, simt, cuda:

    python examples/custom_kernel.py [CHECKPOINT] [--device simt]
"""

import argparse
from pathlib import Path

import numpy as np

from flashrt.backends.cpu.device import CpuDevice
from flashrt.core.backend import Backend
from flashrt.core.op import Op, Param
from flashrt.core.region import DType, Region, Role
from flashrt.core.tape import Tape
from flashrt.load import load_on, open_backend
from flashrt.models import TokenModel
from flashrt.weights.bundled import bundled_checkpoint

HERE = Path(__file__).parent
COUNT = Op(
    "count",
    "counts[tokens[t]] += 1",
    (
        Param("tokens", "r", ("T",), (DType.I32,)),
        Param("cursor", "r", (16,), (DType.I32,)),
        Param("counts", "rw", ("V",), (DType.U32,)),
    ),
)


class Counting:
    """A model that counts the tokens it is fed."""

    def __init__(self, model: TokenModel) -> None:
        self._model = model
        self.name, self.buckets, self.vocab_size = model.name, model.buckets, model.vocab_size
        self.identity, self.weights, self.phases = model.identity, model.weights, model.phases
        self.shared_phases = model.shared_phases
        self.counts = Region("counts", (model.vocab_size,), DType.U32, Role.FIXED, is_digested=True)
        self.lane_regions = (*model.lane_regions, self.counts)

    def record(self, phase: str, rows: int) -> Tape:
        """The model's tape, with one launch more where tokens are fed."""
        tape = self._model.record(phase, rows)
        embed = tape.launches[0]
        if embed.op.name == "embed":
            operands = {name: embed.operand(name) for name in ("tokens", "cursor")}
            tape.record(COUNT, counts=self.counts, **operands)
            tape.launches.insert(1, tape.launches.pop())  # before the cursor moves on
        return tape


def device(name: str) -> Backend:
    """A backend that knows the kernel."""
    backend = open_backend(name)
    if isinstance(backend, CpuDevice):
        backend.add_source(HERE / "custom_kernel.c")
        return backend
    from flashrt.backends.cuda.device import CudaDevice
    from flashrt.backends.cuda.kernels import KernelLaunch

    assert isinstance(backend, CudaDevice)
    launch = KernelLaunch("custom_kernel.cu", "count", (), (1, 1, 1), (32, 1, 1))
    backend.add_source(HERE / "custom_kernel.cu", {"count": lambda shape: (launch,)})
    return backend


def main() -> None:
    """Feed, snapshot, go on, restore: the counts follow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=bundled_checkpoint())
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    options = parser.parse_args()
    engine = load_on(
        lambda: device(options.device),
        options.checkpoint,
        max_positions=256,
        draft=False,
        adapt=Counting,
    )
    session = engine.session()

    def counts() -> np.ndarray:
        return engine.lane_array(session.lane, "counts")

    session.prefill([7, 7, 9])
    capsule = session.snapshot()
    tokens = [*session.generate(20)]
    session.prefill([7])
    assert counts().sum() == 24 == session.position
    print(f"{options.device}: fed {session.position} tokens, 7 was seen {counts()[7]} times")
    session.restore(capsule)
    assert (counts()[7], counts()[9], counts().sum()) == (2, 1, 3)
    print(f"restored at {session.position}: 7 was seen {counts()[7]} times")
    session.prefill(tokens)
    session.rollback(5)
    assert counts().sum() == 5
    print(f"rolled back to 5: {counts().sum()} counted; digest {session.digest()}")


if __name__ == "__main__":
    main()
