"""What kernels execute: the reader of disassemblies, and counts that `linear` and `attention` keep.

IS: a small disassembly with counts made by hand, and the inner loops of compiled kernels. A count
that grows is time on every GPU; no GPU is needed to see it. IS NOT: results of kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flashrt.backends.cuda import kernels, sass
from flashrt.backends.cuda.kernels import KernelLaunch, ManyTile, Shape
from flashrt.backends.cuda.nvrtc import Nvrtc, Resources, resources
from flashrt.backends.cuda.occupancy import blocks_at_once, multiprocessor
from flashrt.backends.cuda.sass import Counts, Instruction
from flashrt.backends.cuda.sources import Sources
from flashrt.base.errors import BackendError
from flashrt.core.groups import Groups, Scales
from flashrt.core.region import DType
from flashrt.ops import OPS

# As nvdisasm prints it: a loop in a loop, with moves of each kind; then a kernel without tensor
# instructions; both end in a branch to itself.
TEXT = """
\t.section\t.text.first,"ax",@progbits
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R9, R1 ;
.L_x_0:
        /*0020*/                   LDG.E.128 R40, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/               @P0 LDGSTS.E.BYPASS.128 [R30], desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E [R31+0x20], desc[UR4][R4.64], P2 ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   LDS.128 R12, [R31+0x800] ;
        /*0070*/                   MOV R16, R3 ;
        /*0080*/                   IMAD.MOV.U32 R5, RZ, RZ, R6 ;
        /*0090*/                   IMAD.U32 R7, RZ, RZ, UR6 ;
        /*00a0*/                   PRMT R17, R12, 0x5410, R13 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R20, R12.reuse, R16, R20 ;
        /*00c0*/                   MOV R12, 0x6 ;
        /*00d0*/                   IMAD.U32 R8, R8, 0x400, RZ ;
        /*00e0*/                   STS [R31], R7 ;
        /*00f0*/                   ISETP.NE.AND P1, PT, R7, R8, PT ;
        /*0100*/               @P1 BRA `(.L_x_1) ;
        /*0110*/                   FADD R20, R20, R24 ;
        /*0120*/                   STL [R1], R20 ;
        /*0130*/              @!P2 BRA `(.L_x_0) ;
        /*0140*/                   EXIT ;
.L_x_2:
        /*0150*/                   BRA `(.L_x_2);
\t.section\t.text.second,"ax",@progbits
second:
.text.second:
.L_x_3:
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64+0x10] ;
        /*0020*/                   STG.E desc[UR4][R2.64], R0 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0040*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0050*/                   BRA.U UP0, `(.L_x_4) ;
        /*0060*/                   EXIT ;
.L_x_5:
        /*0070*/                   BRA `(.L_x_5);
"""


def test_counts_of_a_small_disassembly() -> None:
    """Red: the outer loop for the inner one, a branch to itself as a loop, a register that is
    written again before a tensor instruction reads it as a move to that.
    """
    first, second = sass.functions(TEXT)
    assert (first.name, len(first.instructions), len(first.loops)) == ("first", 22, 2)
    assert sass.count(first.inner_loop()) == Counts(
        instructions=14, tensor=1, moves=4, operand_moves=1, permutes=1, shared_loads=1,
        shared_stores=1, global_loads=0, global_loads_128=0, copies=2, copies_128=1,
        global_stores=0, local=0,
    )  # fmt: skip
    assert sass.count(first.instructions).local == 1
    assert sass.count(second.inner_loop()) == Counts(
        instructions=4, tensor=0, moves=0, operand_moves=0, permutes=0, shared_loads=0,
        shared_stores=0, global_loads=2, global_loads_128=1, copies=0, copies_128=0,
        global_stores=1, local=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["HMMA.16816.F32.BF16", "QMMA.16832.F32.E4M3.E4M3", "UTCHMMA"])
def test_tensor_instructions(name: str) -> None:
    assert Instruction(name, "R0, R4, R8, R0").is_tensor
    assert not Instruction("FFMA", "R0, R4, R8, R0").is_tensor


def test_without_a_disassembler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sass, "_PACKAGE", "flashrt-no-such-package")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"pip install 'flashrt\[sass\]'"):
        sass.disassemble(b"")


def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(BackendError, match="cannot read the cubin"):
        sass.disassemble(b"not a cubin")


# ---- compiled kernels

TWO_PARTS = DType.BF16X2
MAIN = ManyTile(2, 2, 4, 4, 2, 0.95)  # 64 tensor instructions of a warp per chunk and two parts


def compiled(arch: str, launch: KernelLaunch) -> tuple[Counts, Resources]:
    sources = Sources()
    sources.set_ops(OPS)
    binary = Nvrtc(arch).compile(sources.unit(launch))
    (taken,) = resources(binary.log)
    return sass.inner_loops(binary.content)[launch.kernel], taken


def shape(arch: str, act: DType, rows: int, form: tuple[DType, Groups] | None = None) -> Shape:
    dims = {"T": rows, "N": 9216, "K": 2560}
    dtypes, groups = ({}, {}) if form is None else ({"w": form[0]}, {"w": form[1]})
    return Shape("linear", dims, dtypes, {}, act, 132, groups, multiprocessor(arch))


# Instructions of a warp per chunk of 32 k, at most; 172 and 159 when this was written, 104 and 87
# with one part; a compiler may add a few.
MOST = {TWO_PARTS: 190, DType.BF16: 110}
TENSOR = {TWO_PARTS: 64, DType.BF16: 32}


@pytest.mark.parametrize("act", MOST, ids=str)
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_inner_loop_of_linear_many(arch: str, act: DType) -> None:
    """Red: weights that are not stored in the order of operands (each tensor instruction costs
    moves); addresses that are made again in every stage; copies of less than 16 bytes.
    """
    loop, taken = compiled(arch, kernels.linear_many(shape(arch, act, 512), MAIN))
    assert loop.tensor == TENSOR[act]
    assert loop.instructions <= MOST[act]
    assert loop.operand_moves == 0
    assert loop.copies == loop.copies_128 == (8 if act is TWO_PARTS else 6)
    assert loop.global_loads == loop.global_stores == loop.shared_stores == loop.local == 0
    assert loop.shared_loads == (16 if act is TWO_PARTS else 12)
    assert loop.permutes == (32 if act is TWO_PARTS else 0)  # pairs of x into their parts
    assert taken.spill_bytes == 0


def test_blocks_at_once_are_those_that_tiles_count_on() -> None:
    """Red: launch bounds that the sources ignore; an estimate of occupancy that is too high."""
    s = shape("sm_120", TWO_PARTS, 512)
    for tile in kernels.many_tiles(s):
        launch = kernels.linear_many(s, tile)
        _, taken = compiled("sm_120", launch)
        shared = launch.shared_bytes + taken.shared_bytes
        fit = blocks_at_once(s.sm, launch.block[0], taken.registers, shared)
        assert fit >= tile.at_once(s), tile
        assert taken.spill_bytes == 0, tile


# Moves to operands: none; with a minimum the ones that sum x, constants in four registers.
CODES = {
    (DType.U4, Groups(32, Scales.F16_MIN)): 4,
    (DType.E2M1, Groups(16, Scales.E4M3_OVER)): 0,
}


@pytest.mark.parametrize("form", CODES, ids=["U4", "NVFP4"])
def test_codes_go_to_tensor_cores_without_moves(form: tuple[DType, Groups]) -> None:
    """Red: operands that are made in other registers than the instruction wants."""
    s = shape("sm_120", TWO_PARTS, 512, form)
    loop, taken = compiled("sm_120", kernels.linear_many(s, *kernels.many_choice(s)))
    assert loop.operand_moves <= CODES[form]
    assert loop.local == taken.spill_bytes == 0
    assert loop.copies == loop.copies_128


@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_inner_loop_of_linear_few(arch: str) -> None:
    """Red: as above; weights or x that are loaded in less than 16 bytes per lane."""
    (launch,) = kernels.EXPANSIONS["linear"](shape(arch, TWO_PARTS, 1))
    loop, taken = compiled(arch, launch)
    assert launch.kernel == "linear_few"
    assert loop.operand_moves == loop.local == taken.spill_bytes == 0
    assert loop.tensor == 32  # a slice of one tile: 16 steps of two parts
    assert loop.global_loads == loop.global_loads_128 == 32


# Instructions of a warp of `linear_few` and `norm_linear` per slice of 256 k, at most; the larger
# of two architectures was (673, 589) for NVFP4, (460, 384) for 4-bit integers and (285, 233) for
# bfloat16 when this was written. The memory of an H200 brings a slice of 4 bits in some 500 issue
# slots of a multiprocessor.
SLICES = {
    "bfloat16": (None, 330, 260),
    "int4": ((DType.U4, Groups(32, Scales.F16)), 470, 420),
    "nvfp4": ((DType.E2M1, Groups(16, Scales.E4M3_OVER)), 710, 630),
}


@pytest.mark.parametrize("form", SLICES)
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_a_slice_of_few_rows_takes_few_instructions(arch: str, form: str) -> None:
    """Red: a question for each chunk whether it is there, or for each column whether it is a token;
    pairs that are taken apart again by each block that has normed them; codes that become operands
    by more than one multiplication, or by constants that are moved to registers first.
    """
    stored, *most = SLICES[form]
    s = replace(shape(arch, TWO_PARTS, 1, stored), attrs={"eps": 1e-6, "parts": 2})
    for op, limit in zip(("linear", "norm_linear"), most, strict=True):
        (launch,) = kernels.EXPANSIONS[op](s)
        loop, taken = compiled(arch, launch)
        assert loop.tensor == 32
        assert loop.instructions <= limit
        assert loop.operand_moves == loop.local == taken.spill_bytes == 0
        assert op == "linear" or loop.permutes == (48 if form == "nvfp4" else 0)


# Instructions of a warp for 32 keys of 32 dims (values), at most; copies of both the kinds that may
# come next are among them. 245 and 231 when this was written.
MOST_OF_ATTENTION = 265


@pytest.mark.parametrize(("arch", "columns"), [("sm_90", 96), ("sm_120", 64)])
def test_inner_loop_of_attention_rows(arch: str, columns: int) -> None:
    """Red: keys or values that are loaded from memory between tensor instructions; operands that
    are put together again for each of them (191 moves in place of 16 of the keys).
    """
    dims = {"T": 512, "TP": 1, "D": 256, "Nq": 24, "Nk": 4, "S": 4096, "B": 16}
    caches = {"keys": DType.BF16, "values": DType.BF16}
    attrs = {"shift": 0, "gated": 1}
    s = Shape("attention", dims, caches, attrs, DType.BF16, 132, sm=multiprocessor(arch))
    launch = kernels.attention_many(s, columns // 8)
    sources = Sources()
    sources.set_ops(OPS)
    binary = Nvrtc(arch).compile(sources.unit(launch))
    (taken,) = resources(binary.log)
    (function,) = sass.functions(sass.disassemble(binary.content))
    loop, all_of_it = sass.count(function.inner_loop()), sass.count(function.instructions)
    assert loop.tensor == columns // 2  # two tiles of dims, two steps of 16 keys
    assert loop.instructions <= MOST_OF_ATTENTION
    assert loop.global_loads == loop.local == taken.spill_bytes == 0
    assert loop.copies == 12 and loop.copies_128 == 4  # values: 8 bytes, or the next keys: 16
    assert loop.shared_loads == columns // 8 + 8
    assert all_of_it.operand_moves <= 16
