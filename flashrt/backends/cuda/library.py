"""The kernel library of one device: launches to loaded functions, compiled at first need.

IS: units -> binaries (several at a time) -> modules -> functions, each once and before a capture;
nothing is compiled after seal. IS NOT: launching.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flashrt.backends.cache import Binary
from flashrt.backends.cuda.compiler_api import Compiler, Unit
from flashrt.backends.cuda.driver_api import DEFAULT_SHARED_BYTES, Driver
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.backends.cuda.sources import Sources
from flashrt.base.flags import thread_count
from flashrt.base.tracing import PLAN, announce, trace
from flashrt.core.backend import Progress


@dataclass(slots=True)
class _Loaded:
    module: int
    functions: dict[str, int] = field(default_factory=dict)
    shared_bytes: dict[str, int] = field(default_factory=dict)  # allowed, where above the default


class KernelLibrary:
    """Functions by launch."""

    def __init__(self, driver: Driver, compiler: Compiler, sources: Sources) -> None:
        self._driver = driver
        self._compiler = compiler
        self._sources = sources
        self._loaded: dict[Unit, _Loaded] = {}
        self._units: dict[tuple[str, tuple[tuple[str, str], ...]], Unit] = {}
        self.n_compiled = 0  # compiler runs; the cache does not count
        self.progress: Progress | None = None  # told of them; else a line on stderr

    def missing(self, launches: Iterable[KernelLaunch]) -> list[Unit]:
        """Units of the launches that are not loaded yet, each once."""
        units = dict.fromkeys(self._unit(launch) for launch in launches)
        return [unit for unit in units if unit not in self._loaded]

    def prepare(self, launches: Sequence[KernelLaunch]) -> None:
        """Compile and load what the launches need. Raises CompileError, BackendError."""
        units = self.missing(launches)
        total = self.n_compiled + sum(not self._compiler.is_cached(unit) for unit in units)
        if total and not self.n_compiled and self.progress is None:
            announce(f"compiling kernels with {self._compiler.title}, once; this takes a while")
        if len(units) == 1:
            self._load(units[0], self._compiler.compile(units[0]), total)
        elif units:
            with ThreadPoolExecutor(min(thread_count(), len(units))) as pool:
                for unit, binary in zip(
                    units, pool.map(self._compiler.compile, units), strict=True
                ):
                    self._load(unit, binary, total)
        for launch in launches:
            self.function(launch)  # found now, so that nothing is looked up after seal

    def function(self, launch: KernelLaunch) -> int:
        """The loaded function of a prepared launch, its shared memory allowed."""
        loaded = self._loaded[self._unit(launch)]
        handle = loaded.functions.get(launch.kernel)
        if handle is None:
            handle = self._driver.module_function(loaded.module, launch.kernel)
            loaded.functions[launch.kernel] = handle
        allowed = loaded.shared_bytes.get(launch.kernel, DEFAULT_SHARED_BYTES)
        if launch.shared_bytes > allowed:
            self._driver.allow_shared(handle, launch.shared_bytes)
            loaded.shared_bytes[launch.kernel] = launch.shared_bytes
        return handle

    def close(self) -> None:
        """Unload all modules; no kernel of them may run."""
        for loaded in self._loaded.values():
            self._driver.module_unload(loaded.module)
        self._loaded.clear()

    def forget_units(self) -> None:
        """Sources changed: texts are looked up again (modules in use stay loaded)."""
        self._units.clear()

    def _load(self, unit: Unit, binary: Binary, total: int) -> None:
        if not binary.was_cached:
            self.n_compiled += 1
            trace(PLAN, f"compiled {unit.title} -> {binary.path}")
            if self.progress is not None:
                self.progress("kernels", self.n_compiled, max(total, self.n_compiled))
        self._loaded[unit] = _Loaded(self._driver.module_load(binary))

    def _unit(self, launch: KernelLaunch) -> Unit:
        key = (launch.source, launch.defines)
        if key not in self._units:
            self._units[key] = self._sources.unit(launch)
        return self._units[key]
