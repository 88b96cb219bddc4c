"""The first use compiles kernels: somebody who waits is told why, once, and only then.

IS: `build` and `capture` with empty and with filled caches of kernels, on small sources.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.flags import flags
from flashrt.core.op import Op
from flashrt.ops import OPS
from tests.backend.test_custom_kernel import SCALE, SOURCE, N, expand, launch

Calls = list[tuple[str, int, int]]


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CPU kernels of two files; the folder of an empty cache."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for name in ("one", "two"):
        (kernels / f"{name}.c").write_text(f'#include "ops.h"\nint {name}(void) {{ return 1; }}\n')
    monkeypatch.setattr(toolchain, "KERNELS", kernels)
    monkeypatch.setattr(toolchain, "CFLAGS", (*toolchain.CFLAGS, "-include", "stdint.h"))
    return tmp_path / "cache"


def be_a_terminal(monkeypatch: pytest.MonkeyPatch, *, is_one: bool = True) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_one, raising=False)


def test_progress_is_told_of_a_build_and_not_of_a_cached_one(small_library: Path) -> None:
    """Red before: `build` took no callback, and a bar stood still for as long as it took."""
    calls: Calls = []
    toolchain.library(OPS, small_library, progress=lambda *call: calls.append(call))
    assert calls == [("kernels", done, 3) for done in range(4)], "two files and the link"
    calls.clear()
    toolchain.library(OPS, small_library, progress=lambda *call: calls.append(call))
    assert calls == []


def test_a_terminal_gets_one_line_and_nobody_else_any(
    small_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Red before: a first `load` was silent for as long as the compiler took."""
    if flags().debug:
        pytest.skip("FLASHRT_DEBUG prints the line for everybody")
    be_a_terminal(monkeypatch, is_one=False)
    toolchain.library(OPS, small_library / "of a pipe")
    assert capsys.readouterr() == ("", "")
    be_a_terminal(monkeypatch)
    toolchain.library(OPS, small_library)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("flashrt: compiling the CPU kernels into") and "once" in err
    toolchain.library(OPS, small_library)
    toolchain.library(OPS, small_library / "with a callback", progress=lambda *call: None)
    assert capsys.readouterr() == ("", "")


def use(cache: Path, calls: Calls | None) -> None:
    """Build, then capture a kernel of our own: copy and digest are compiled first, then it."""
    device = SimtDevice(cache=cache)
    try:
        device.add_source(SOURCE, {"scale": expand}, name="scale.cu")
        device.build([SCALE], None if calls is None else lambda *call: calls.append(call))
        device.capture([launch(device.allocate("arena", 8 * N).address)])
    finally:
        device.close()


@pytest.mark.slow
def test_cuda_kernels_are_told_of_when_they_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: Calls = []
    use(tmp_path / "one", calls)
    assert calls == [("kernels", 1, 2), ("kernels", 2, 2), ("kernels", 3, 3)]
    calls.clear()
    use(tmp_path / "one", calls)
    assert calls == []
    be_a_terminal(monkeypatch)
    use(tmp_path / "one", None)
    assert capsys.readouterr().err == ""
    use(tmp_path / "two", None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiling" in line]
    assert len(lines) == 1 and "SIMT shim" in lines[0]


def test_a_file_that_no_change_touches_is_compiled_once(
    small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults: a new op compiles the kernels of all others again; or what a file includes, or how it
    is compiled, is not looked at, and an old object is linked.
    """
    monkeypatch.setattr(toolchain, "flags", lambda: replace(flags(), cache_dir=small_library))
    compiled: list[str] = []
    run = toolchain._run

    def noted(command: Sequence[str]) -> None:
        compiled.extend(Path(part).stem for part in command if part.endswith(".c"))
        run(command)

    def build(*ops: Op) -> list[str]:
        compiled.clear()
        toolchain.library(ops)
        return sorted(compiled)

    monkeypatch.setattr(toolchain, "_run", noted)
    one, header = toolchain.KERNELS / "one.c", toolchain.KERNELS / "both.h"
    assert build(*OPS) == ["one", "two"]
    assert build(*OPS, SCALE) == []
    one.write_text(one.read_text() + f"int size = sizeof({SCALE.name}_args);\n")
    assert build(*OPS, SCALE) == ["one"]
    wider = replace(SCALE, params=(*SCALE.params, replace(SCALE.params[0], name="more")))
    assert build(*OPS, wider) == ["one"]
    header.write_text("enum { BOTH };\n")
    assert build(*OPS, SCALE) == ["one", "two"]
    monkeypatch.setattr(toolchain, "CFLAGS", (*toolchain.CFLAGS, "-O1"))
    assert build(*OPS, SCALE) == ["one", "two"]
