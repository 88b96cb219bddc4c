"""NVRTC and its part of the kernel cache: one key per content, shared between processes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt.backends.cuda.compiler_api import Unit, cache_key
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.backends.cuda.nvrtc import OPTIONS, Nvrtc, resources
from flashrt.backends.cuda.sources import Sources, shipped
from flashrt.base.errors import CompileError
from flashrt.core.op import Op, Param

ROOT = Path(__file__).parents[2]
UNIT = Unit(
    "k.cu",
    '#include "h.h"\nextern "C" __global__ void k(int *p) { p[threadIdx.x] = VALUE + offset; }',
    (("VALUE", "3"),),
    (("h.h", "constexpr int offset = 1;\n"),),
)
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spills' for 'sm_90'
ptxas info    : Function properties for spills
ptxas         .     64 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes cumulative stack size, 1056 bytes smem
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


@pytest.fixture
def compiler(tmp_path: Path) -> Nvrtc:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    return Nvrtc("sm_90", tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        replace(UNIT, text=UNIT.text + " "),
        replace(UNIT, name="other.cu"),
        replace(UNIT, defines=(("VALUE", "4"),)),
        replace(UNIT, defines=(("VALU", "E3"),)),
        replace(UNIT, headers=(("h.h", "constexpr int offset = 2;\n"),)),
        replace(UNIT, headers=()),
    ],
)
def test_whatever_decides_bits_is_in_the_key(other: Unit) -> None:
    assert cache_key(UNIT, "x") != cache_key(other, "x")


def test_the_compiler_is_in_the_key() -> None:
    assert cache_key(UNIT, "nvrtc 13.0") != cache_key(UNIT, "nvrtc 13.1")
    assert cache_key(UNIT, "x") == cache_key(replace(UNIT), "x")


def test_second_compile_comes_from_the_cache(compiler: Nvrtc) -> None:
    first = compiler.compile(UNIT)
    second = compiler.compile(UNIT)
    assert (first.was_cached, second.was_cached) == (False, True)
    assert first.path == second.path
    assert first.log == second.log
    assert first.content == second.content
    assert first.content[:4] == b"\x7fELF", "a cubin, not PTX"
    (kernel,) = resources(second.log)
    assert kernel.kernel == "k"
    assert kernel.registers > 0
    assert kernel.spill_bytes == 0


def test_architectures_and_options_have_their_own_entries(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    paths = {Nvrtc(arch, tmp_path).path(UNIT) for arch in ("sm_80", "sm_90", "sm_120")}
    assert len(paths) == 3
    assert all(option in Nvrtc("sm_90", tmp_path).identity for option in OPTIONS)
    assert "--fmad=false" in OPTIONS, "contraction would let the compiler decide bits"


def test_an_unknown_minor_version_takes_the_nearest_before_it(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    assert Nvrtc("sm_129", tmp_path).arch == "sm_121"
    with pytest.raises(CompileError, match="cannot compile for sm_10"):
        Nvrtc("sm_10", tmp_path)
    with pytest.raises(CompileError, match="form sm_90"):
        Nvrtc("hopper", tmp_path)


def test_errors_show_unit_and_log(compiler: Nvrtc, tmp_path: Path) -> None:
    wrong = Unit("wrong.cu", 'extern "C" __global__ void k() { missing(); }', (("N", "1"),))
    with pytest.raises(CompileError, match=r"wrong.cu -DN=1 does not compile for sm_90") as caught:
        compiler.compile(wrong)
    assert 'identifier "missing" is undefined' in str(caught.value)
    assert not list(tmp_path.rglob("wrong*")), "a failure leaves nothing in the cache"


def test_processes_share_a_cache(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    code = (
        "import sys; from pathlib import Path\n"
        "from flashrt.backends.cuda.compiler_api import Unit\n"
        "from flashrt.backends.cuda.nvrtc import Nvrtc\n"
        f"print(Nvrtc('sm_90', Path(sys.argv[1])).compile({UNIT!r}).path.stat().st_size)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    sizes = {racer.communicate()[0] for racer in racers}
    assert all(racer.returncode == 0 for racer in racers)
    assert len(sizes) == 1
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert not list(tmp_path.rglob(".*")), "no temporary files are left"


def test_resource_report() -> None:
    spills, plain = resources(LOG)
    assert (spills.kernel, spills.registers, spills.shared_bytes) == ("spills", 255, 1056)
    assert (spills.stack_bytes, spills.spill_bytes) == (64, 32)
    assert (plain.kernel, plain.registers, plain.spill_bytes) == ("plain", 8, 0)


# ---- sources


def op(name: str) -> Op:
    return Op(name, "a test", (Param("x", "rw", ("N",)),))


def launch(source: str) -> KernelLaunch:
    return KernelLaunch(source, "k", (), (1, 1, 1), (32, 1, 1))


def test_a_new_op_recompiles_only_what_uses_it() -> None:
    sources = Sources()
    sources.add("one.cu", "void k(one_args a) {}")
    sources.add("two.cu", "void k(two_args a) {}")
    sources.set_ops([op("one")])
    before = sources.unit(launch("one.cu")), sources.digest()
    sources.set_ops([op("one"), op("two")])
    assert sources.unit(launch("one.cu")) == before[0]
    assert "two_args" in dict(sources.unit(launch("two.cu")).headers)["args.h"]
    assert sources.digest() != before[1]


BESIDE_THE_TAPES = ("copy.cu", "digest.cu", "limits.cu", "random_fill.cu")  # no lane's operands


def body_of(function: str, file: str) -> str:
    found = re.search(rf"void {function}\(.*?^\}}", shipped()[file], re.M | re.S)
    assert found, f"{file} has no {function}"
    return found[0]


@pytest.mark.parametrize("name", sorted(name for name in shipped() if name.endswith(".cu")))
def test_shipped_kernels_wait_for_their_predecessor(name: str) -> None:
    """They are launched before it ends: none may return, or read the cursor, before begin."""
    bodies = re.findall(
        r"^KERNEL\([^)]*\)\s+(\w+)\([^)]*\) \{\n(.*?)^\}", shipped()[name], re.M | re.S
    )
    assert bodies, f"{name} has no kernel"
    few = body_of("multiply_few", "linear_few.cuh")
    # A part's block does what a launch of its own would do.
    shared = {"multiply_few<": few, "multiply_parts(": few}
    if name == "conv2d.cu":
        shared["convolve<"] = body_of("convolve", name)
    for kernel, text in bodies:
        named = re.sub(r"^  const \w+& \w+ = [\w.]+;\n", "", text, flags=re.M)  # they read nothing
        body = named
        for call, there in shared.items():
            body = re.sub(rf"  {re.escape(call)}.*", lambda _, there=there: there, body)
        assert "OPEN_RUN" in body or name in BESIDE_THE_TAPES, f"{kernel} knows no runs"
        assert body.find("OPEN_RUN") in (-1, 2), f"{kernel} does something before OPEN_RUN"
        before, begin, _ = re.sub(r"OPEN_RUN\(\w+\);", "", body).partition("begin();")
        assert begin, f"{kernel} does not wait"
        assert not re.search(r"\breturn\b|cursor", before), kernel


def test_sources_are_named_once() -> None:
    sources = Sources()
    sources.add("mine.cu", "a")
    sources.add("mine.cu", "a")
    with pytest.raises(CompileError, match="another text"):
        sources.add("mine.cu", "b")
    with pytest.raises(CompileError, match=r"no kernel source 'nothing.cu'"):
        sources.unit(launch("nothing.cu"))
