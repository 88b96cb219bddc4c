"""SASS: what the inner loop of a compiled kernel executes, counted in the disassembly of its cubin.

IS: nvdisasm, its text as instructions and loops, and counts of what costs time: tensor
instructions, register moves, accesses to shared and global memory. Needs no GPU.
IS NOT: a model of time: an instruction here is one, whatever it waits for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from flashrt.base.errors import BackendError

_PACKAGE: Final = "nvidia-cuda-nvdisasm"
_LIMIT_S: Final = 120.0

_FUNCTION = re.compile(r"\.text\.(\w+):")
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_MMA = re.compile(r"\w*MMA")
Loop = tuple[int, int]  # first and last instruction
# Registers of d, a, b and c of a tensor instruction of a warp.
_MMA_OPERANDS: Final = (4, 4, 2, 4)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: "HMMA.16816.F32.BF16", its operands as text, and its predicate."""

    opcode: str
    operands: str
    predicate: str = ""

    @property
    def name(self) -> str:
        """The opcode without what follows it: "HMMA"."""
        return self.opcode.split(".", 1)[0]

    @property
    def is_tensor(self) -> bool:
        """Whether the tensor cores execute it."""
        return _MMA.fullmatch(self.name) is not None

    @property
    def is_move(self) -> bool:
        """Whether it copies a register, or puts a constant into one; IMAD does so too."""
        if self.name == "MOV" or self.opcode.startswith("IMAD.MOV"):
            return True
        return self.opcode == "IMAD.U32" and ", RZ, RZ, " in f", {self.operands}"

    @property
    def is_never(self) -> bool:
        """Whether its predicate is false: it takes a slot and does nothing."""
        return self.predicate in ("!PT", "!UPT")


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel: its instructions in order, and its loops as ranges [first, last] of them."""

    name: str
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def inner_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop with most tensor instructions; without any, the longest innermost;
        without a loop, all instructions.
        """
        inner = innermost(self.tensor_loops() or self.loops)
        if not inner:
            return self.instructions
        return self.of(max(inner, key=lambda loop: (self.tensors(loop), loop[1] - loop[0])))

    def of(self, loop: Loop) -> tuple[Instruction, ...]:
        """What a loop executes once per turn, inner loops counted once."""
        return self.instructions[loop[0] : loop[1] + 1]

    def tensors(self, loop: Loop) -> int:
        """Tensor instructions of a loop."""
        return sum(i.is_tensor for i in self.of(loop))

    def tensor_loops(self) -> tuple[Loop, ...]:
        """Loops with tensor instructions, in them or in loops within."""
        return tuple(loop for loop in self.loops if self.tensors(loop))


def innermost(loops: Sequence[Loop]) -> tuple[Loop, ...]:
    """Those of some loops that hold no other of them."""
    return tuple(a for a in loops if not any(b != a and _is_within(b, a) for b in loops))


def outermost(loops: Sequence[Loop]) -> tuple[Loop, ...]:
    """Those of some loops that no other of them holds."""
    return tuple(a for a in loops if not any(b != a and _is_within(a, b) for b in loops))


def _is_within(inner: Loop, outer: Loop) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


@dataclass(frozen=True, slots=True)
class Counts:
    """What some instructions are. `copies` go from global to shared memory without a register."""

    instructions: int
    tensor: int
    moves: int  # copies of a register, and constants into one
    operand_moves: int  # of them, into an operand of a tensor instruction
    permutes: int  # bytes of two registers into one
    shared_loads: int
    shared_stores: int
    global_loads: int
    global_loads_128: int  # of them, of 16 bytes per lane
    copies: int
    copies_128: int
    global_stores: int
    local: int  # loads and stores of registers that were spilled, or of arrays


def count(instructions: Sequence[Instruction]) -> Counts:
    """Counts of a loop, or of any instructions. What is never executed counts as an instruction."""
    live = [i for i in instructions if not i.is_never]

    def of(*names: str) -> list[Instruction]:
        return [i for i in live if i.name in names]

    def wide(some: Iterable[Instruction]) -> int:
        return sum(".128" in i.opcode for i in some)

    moves = [at for at, i in enumerate(live) if i.is_move]
    loads, copies = of("LDG"), of("LDGSTS")
    return Counts(
        instructions=len(instructions),
        tensor=sum(i.is_tensor for i in live),
        moves=len(moves),
        operand_moves=sum(_feeds_tensor(live, at) for at in moves),
        permutes=len(of("PRMT")),
        shared_loads=len(of("LDS", "LDSM")),
        shared_stores=len(of("STS")),
        global_loads=len(loads),
        global_loads_128=wide(loads),
        copies=len(copies),
        copies_128=wide(copies),
        global_stores=len(of("STG")),
        local=len(of("LDL", "STL")),
    )


def _feeds_tensor(loop: Sequence[Instruction], at: int) -> bool:
    """Whether a tensor instruction reads what instruction `at` of a loop writes."""
    held = _written(loop[at])
    for instruction in (*loop[at + 1 :], *loop[:at]):
        if instruction.is_tensor and held & _read(instruction):
            return True
        held -= _written(instruction)
        if not held:
            return False
    return False


def _written(instruction: Instruction) -> set[int]:
    """Registers that an instruction writes."""
    found = _REGISTER.match(instruction.operands)
    if found is None:
        return set()
    wide = {".128": 4, ".64": 2, ".WIDE": 2}
    n = next((n for mark, n in wide.items() if mark in instruction.opcode), 1)
    first = int(found[1])
    return set(range(first, first + (_MMA_OPERANDS[0] if instruction.is_tensor else n)))


def _read(instruction: Instruction) -> set[int]:
    """Registers of a, b and c of a tensor instruction."""
    named = [_REGISTER.match(part.strip()) for part in instruction.operands.split(",")]
    found: set[int] = set()
    for register, n in list(zip(named, _MMA_OPERANDS, strict=False))[1:]:
        if register is not None:
            found |= set(range(int(register[1]), int(register[1]) + n))
    return found


def functions(text: str) -> tuple[Function, ...]:
    """The kernels of a disassembly, as `nvdisasm -c` prints it."""
    found: list[Function] = []
    name, instructions, labels = "", list[Instruction](), dict[str, int]()

    def close() -> None:
        if name:
            found.append(Function(name, tuple(instructions), _loops(instructions, labels)))

    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            close()
            name, instructions, labels = match[1], [], {}
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match[2], match[3], match[1] or ""))
    close()
    return tuple(found)


def _loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> tuple[Loop, ...]:
    """Ranges from the target of a branch that goes back to the last branch to it. A branch to
    itself, which ends every kernel, is none.
    """
    loops: dict[int, int] = {}
    for at, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands)
        if instruction.name == "BRA" and target is not None:
            first = labels.get(target[1], at)
            if first < at:
                loops[first] = at
    return tuple(loops.items())


def disassembler() -> Path:
    """nvdisasm of the package, or of the PATH. Raises BackendError where there is none."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == "nvdisasm" and file.suffix in ("", ".exe"):
            return Path(str(file.locate()))
    if (other := shutil.which("nvdisasm")) is not None:
        return Path(other)
    raise BackendError(
        "reading SASS needs the disassembler of CUDA, nvdisasm: pip install 'flashrt[sass]'"
    )


def disassemble(cubin: bytes) -> str:
    """The SASS of all kernels of a cubin. Raises BackendError: no nvdisasm, or it fails."""
    tool = disassembler()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin)
        try:
            done = subprocess.run(
                [tool, "-c", file], capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BackendError(f"{tool} cannot be run: {error}") from error
    if done.returncode:
        raise BackendError(f"{tool} cannot read the cubin: {done.stderr.strip()}")
    return done.stdout


def inner_loops(cubin: bytes) -> dict[str, Counts]:
    """Counts of the inner loop of every kernel of a cubin, by name. Raises BackendError."""
    return {f.name: count(f.inner_loop()) for f in functions(disassemble(cubin))}
