"""What the kernels of launches execute: compiled for a GPU nobody needs to have, and disassembled.

IS: instructions of a kernel by the loops that they are in, registers, static shared memory. IS NOT:
how often a loop is run: `effort` knows that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flashrt.backends.cuda import sass
from flashrt.backends.cuda.compiler_api import Unit
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.backends.cuda.nvrtc import Nvrtc, resources
from flashrt.backends.cuda.sources import Sources
from flashrt.base.flags import thread_count
from flashrt.core.backend import Progress
from flashrt.ops import OPS


@dataclass(frozen=True, slots=True)
class Code:
    """Instructions of one warp of a kernel, each counted once.

    A turn is a pass of the loop around the tensor instructions: `turn` counts what is in it but not
    in the innermost loops, which have `tensor` tensor instructions among `inner`. A kernel without
    tensor instructions has its longest innermost loop as the turn; one without a loop has none.
    """

    straight: int  # outside of any such loop
    turn: int
    inner: int
    tensor: int
    registers: int
    shared_bytes: int  # static

    def ordinary(self, turns: float) -> float:
        """Issue slots of a warp that makes so many turns, but for the innermost tensor loops."""
        return self.straight + turns * self.turn

    def innermost(self, tensor: float) -> float:
        """Issue slots of a warp around so many tensor instructions. Where all of them are outside
        of loops, they are counted with `straight`.
        """
        return tensor * self.inner / self.tensor if self.tensor else 0.0


def code_of(function: sass.Function, registers: int, shared_bytes: int) -> Code:
    """The counts of one disassembled kernel."""

    def total(loops: Iterable[sass.Loop]) -> int:
        return sum(len(function.of(loop)) for loop in loops)

    n, around = len(function.instructions), function.tensor_loops()
    if not around:
        turn = max((total([loop]) for loop in sass.innermost(function.loops)), default=0)
        return Code(n - turn, turn, 0, 0, registers, shared_bytes)
    inner, outer = sass.innermost(around), total(sass.outermost(around))
    tensor = sum(map(function.tensors, inner))
    return Code(n - outer, outer - total(inner), total(inner), tensor, registers, shared_bytes)


class Codes:
    """The code of launches on one architecture, each unit compiled and disassembled once."""

    def __init__(self, arch: str) -> None:
        """Raises BackendError where NVRTC or nvdisasm is missing."""
        sass.disassembler()  # before minutes of compiling, not after
        self._compiler = Nvrtc(arch)
        self._sources = Sources()
        self._sources.set_ops(OPS)
        self._found: dict[Unit, dict[str, Code]] = {}
        self._units: dict[tuple[str, object], Unit] = {}

    def prepare(self, launches: Iterable[KernelLaunch], progress: Progress | None = None) -> None:
        """Compile what is not compiled yet, several at a time.

        Raises CompileError, BackendError.
        """
        units = dict.fromkeys(self._unit(launch) for launch in launches)
        missing = [unit for unit in units if unit not in self._found]
        with ThreadPoolExecutor(thread_count()) as pool:
            read = zip(missing, pool.map(self._read, missing), strict=True)
            for i, (unit, found) in enumerate(read):
                self._found[unit] = found
                if progress is not None:
                    progress(f"kernels for {self._compiler.arch}", i + 1, len(missing))

    def of(self, launch: KernelLaunch) -> Code:
        """The code of a launch's kernel. Raises CompileError, BackendError."""
        self.prepare([launch])
        return self._found[self._unit(launch)][launch.kernel]

    def _unit(self, launch: KernelLaunch) -> Unit:
        key = (launch.source, launch.defines)
        if key not in self._units:
            self._units[key] = self._sources.unit(launch)
        return self._units[key]

    def _read(self, unit: Unit) -> dict[str, Code]:
        binary = self._compiler.compile(unit)
        taken = {found.kernel: found for found in resources(binary.log)}
        functions: Sequence[sass.Function] = sass.functions(sass.disassemble(binary.content))
        return {
            f.name: code_of(f, taken[f.name].registers, taken[f.name].shared_bytes)
            for f in functions
        }
