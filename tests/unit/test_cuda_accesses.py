"""How kernels touch memory, as their PTX has it: what a GPU would show as time.

IS: kinds and order of loads, stores and atomics in the code that NVRTC makes, before ptxas moves
them within what their order allows. IS NOT: registers and spills (test_cuda_compile).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.backends.cuda.sources import Sources
from flashrt.core.region import DType
from flashrt.ops import OPS
from tests.unit.test_cuda_compile import shape

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")


def ptx(launch: KernelLaunch) -> str:
    sources = Sources()
    sources.set_ops(OPS)
    unit = sources.unit(launch)
    headers = [[part.encode() for part in pair] for pair in unit.headers]
    names, texts = [name for name, _ in headers], [text for _, text in headers]
    _, program = nvrtc.nvrtcCreateProgram(
        unit.text.encode(), unit.name.encode(), len(names), texts, names
    )
    options = [b"--gpu-architecture=compute_80", b"--std=c++17", b"--fmad=false"]
    options += [f"--define-macro={name}={value}".encode() for name, value in unit.defines]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert int(result) == 0
    _, nbytes = nvrtc.nvrtcGetPTXSize(program)
    text = b" " * nbytes
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode()


def test_a_copy_has_all_loads_of_a_batch_under_way() -> None:
    """Vectors, then words, then bytes; of each all loads before the first store. Red where rows on
    words are copied byte by byte, or a load waits for the store before it.
    """
    found = re.findall(
        r"\b(ld|st)\.(?:global\.)?(v4\.u32|u32|u8)\b", ptx(kernels.copy_launch(1, 1))
    )
    runs = [(*kind, len(list(same))) for kind, same in itertools.groupby(found)]
    wanted = [("v4.u32", 8), ("u32", 16), ("u8", 16)]
    copies = [(verb, unit, n) for unit, n in wanted for verb in ("ld", "st")]
    assert runs[-6:] == copies
    assert all(unit == "u32" for _, unit, _ in runs[:-6]), "of the table alone"


def test_sampling_adds_in_shared_memory_without_a_loop() -> None:
    """Shared memory adds 32 bits at once; for 64, and for floats, ptxas makes a loop that tries
    until no other thread came between. Red with a histogram of 64-bit masses.
    """
    launches = kernels.EXPANSIONS["sample"](shape("sample", 1, DType.BF16, DType.BF16, 132))
    text = ptx(launches[0])
    shared = re.findall(r"\b(?:atom|red)\.shared\.(\S+)", text)
    assert shared and set(shared) <= {"add.u32", "add.s32"}
    assert "redux.sync.add" in text, "the tokens of a warp that share a digit go together"


def test_sampling_is_spread_over_blocks() -> None:
    """Red where one block reads a large vocabulary alone, or launches come one by one for each
    digit of each filter.
    """
    launches = kernels.EXPANSIONS["sample"](shape("sample", 1, DType.BF16, DType.BF16, 132))
    assert len(launches) == 7
    assert min(launch.grid[0] for launch in launches) >= 64
    small = shape("sample", 1, DType.BF16, DType.BF16, 132, V=kernels.SAMPLE_SHARED_FROM - 1)
    assert len(kernels.EXPANSIONS["sample"](small)) == 3


@pytest.mark.parametrize(("n_sms", "vector", "each"), [(1, "v4", 4), (1 << 20, "v2", 2)])
def test_a_convolution_multiplies_more_than_it_loads(n_sms: int, vector: str, each: int) -> None:
    """Of a step of 16 k two loads from shared memory and EACH x EACH products. Red where a load is
    of single numbers, which then are what bounds the kernel.
    """
    whole = replace(shape("conv2d", 1, DType.BF16, DType.BF16, n_sms, B=1), n_sms=n_sms)
    text = ptx(kernels.EXPANSIONS["conv2d"](whole)[0])
    (body,) = (part for part in text.split(".entry ") if part.startswith("conv2d("))
    assert len(re.findall(rf"ld\.shared\.{vector}\.[bf]32", body)) == 2 * 16
    assert not re.findall(r"ld\.shared\.[bf]32", body)
    assert len(re.findall(r"fma\.rn\.f32", body)) >= 16 * each * each
