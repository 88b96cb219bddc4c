"""Kernels beside a model's: random weights in place, and the bare rates of a device.

IS: the ops over cuda_src/random_fill.cu and cuda_src/limits.cu, and launches of them on any
CudaDevice. They are not in the table of ops: no tape needs them. IS NOT: measurement.
"""

from __future__ import annotations

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.kernels import Defines, Expansion, KernelLaunch, Shape
from flashrt.backends.cuda.sources import folder
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import Attr, AttrValue, Op, Param, bind
from flashrt.core.region import DType, Region, Role

VECTOR_BYTES = 16
MMA_FLOP = 2 * 16 * 8 * 16  # of one mma.m16n8k16
MMA_CHAINS, WARPS, THREADS = 8, 8, 256  # as in limits.cu
BYTE_SUM_DEVIATION = 147.8  # of the sum of four random bytes, see random_fill.cu

_WORDS = (DType.U32,)
RANDOM_FILL = Op(
    "random_fill",
    "random bfloat16 over n vectors of 16 bytes",
    (Param("w", "w", ("n", 4), _WORDS),),
    (Attr("seed"), Attr("scale", "float32")),
)
COPY_STREAM = Op(
    "copy_stream",
    "dst = src",
    (Param("src", "r", ("n", 4), _WORDS), Param("dst", "w", ("n", 4), _WORDS)),
)
READ_STREAM = Op(
    "read_stream",
    "xor of what each block read",
    (Param("src", "r", ("n", 4), _WORDS), Param("out", "w", ("blocks",), _WORDS)),
)
MMA_RATE = Op(
    "mma_rate",
    "independent mma in registers, `steps` times",
    (Param("out", "w", ("threads",), (DType.F32,)),),
    (Attr("steps"),),
)


def add_kernels(device: CudaDevice) -> None:
    """Teach a device these ops; before its `build`."""
    device.add_source(folder() / "random_fill.cu", {"random_fill": _random_fill})
    limits: dict[str, Expansion] = {
        "copy_stream": _copy_stream, "read_stream": _read_stream, "mma_rate": _mma_rate,
    }  # fmt: skip
    device.add_source(folder() / "limits.cu", limits)


def random_fill(address: int, nbytes: int, seed: int, deviation: float) -> BoundLaunch:
    """Random bfloat16 of a standard deviation over [address, address + nbytes), whole vectors."""
    scale = deviation / BYTE_SUM_DEVIATION
    return _bound(RANDOM_FILL, {"w": _vectors("w", nbytes)}, [address], seed=seed, scale=scale)


def copy_stream(src: int, dst: int, nbytes: int) -> BoundLaunch:
    """A copy by a kernel."""
    regions = {"src": _vectors("src", nbytes), "dst": _vectors("dst", nbytes)}
    return _bound(COPY_STREAM, regions, [src, dst])


def read_stream(src: int, out: int, nbytes: int, blocks: int) -> BoundLaunch:
    """Loads alone; `out` takes a word per block."""
    sums = Region("out", (blocks,), DType.U32, Role.IO)
    return _bound(READ_STREAM, {"src": _vectors("src", nbytes), "out": sums}, [src, out])


def mma_rate(out: int, blocks: int, steps: int) -> BoundLaunch:
    """Tensor cores alone; `out` takes a float per thread."""
    sums = Region("out", (blocks * THREADS,), DType.F32, Role.IO)
    return _bound(MMA_RATE, {"out": sums}, [out], steps=steps)


def mma_flop(blocks: int, steps: int) -> int:
    """FLOP of a `mma_rate`."""
    return blocks * WARPS * MMA_CHAINS * steps * MMA_FLOP


def _vectors(name: str, nbytes: int) -> Region:
    return Region(name, (nbytes // VECTOR_BYTES, 4), DType.U32, Role.IO)


def _bound(
    op: Op, regions: dict[str, Region], addresses: list[int], **attrs: AttrValue
) -> BoundLaunch:
    return BoundLaunch(bind(op, dict(regions), attrs), tuple(addresses))


def _launch(source: str, kernel: str, blocks: int, defines: Defines = ()) -> KernelLaunch:
    return KernelLaunch(source, kernel, defines, (max(1, blocks), 1, 1), (THREADS, 1, 1))


def _random_fill(s: Shape) -> tuple[KernelLaunch, ...]:
    blocks = min(16 * s.n_sms, -(-s.dims["n"] // THREADS))
    return (_launch("random_fill.cu", "random_fill", blocks),)


def _copy_stream(s: Shape) -> tuple[KernelLaunch, ...]:
    blocks = min(16 * s.n_sms, -(-s.dims["n"] // (8 * THREADS)))
    return (_launch("limits.cu", "copy_stream", blocks),)


def _read_stream(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_launch("limits.cu", "read_stream", s.dims["blocks"]),)


def _mma_rate(s: Shape) -> tuple[KernelLaunch, ...]:
    return (_launch("limits.cu", "mma_rate", s.dims["threads"] // THREADS),)
