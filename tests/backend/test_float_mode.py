"""Promise: no bit depends on the floating-point mode of the thread that calls.

Other code of a process changes it: fesetround, and any library that was linked with -ffast-math.
Red before: in each of these modes the same history had another digest, and a load other weights.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.float_mode import DefaultFloatMode, is_default
from flashrt.core.backend import BoundLaunch
from flashrt.engine.numbers import checked_vector
from flashrt.ops import OPS
from flashrt.ops.sample import SamplerParams
from tests.backend.cases import attention, linear
from tests.backend.conftest import make_backend
from tests.backend.runner import Case, Runner

TINY = Path(__file__).parents[1] / "golden" / "tiny"
PROMPT = [7 * i % 500 for i in range(45)]
SOURCE = """
#include <fenv.h>
#if defined __x86_64__
unsigned long long mode(void) { return __builtin_ia32_stmxcsr() & ~0x3full; }
static void flush(void) { __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); }
#else
unsigned long long mode(void) {
  unsigned long long bits;
  __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
static void flush(void) { __asm__ volatile("msr fpcr, %0" : : "r"(mode() | 1ull << 24)); }
#endif
void change(int to) {
  if (to == 0) fesetround(FE_DOWNWARD);
  if (to == 1) fesetround(FE_UPWARD);
  if (to == 2) flush();
}
void reset(void) { fesetenv(FE_DFL_ENV); }
"""
MODES = {"downward": 0, "upward": 1, "flushed to zero": 2}
Mode = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("mode")
    (folder / "mode.c").write_text(SOURCE)
    command = ["cc", "-shared", "-fPIC", "mode.c", "-o", "mode.so", "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "mode.so"))
    library.mode.restype = ctypes.c_ulonglong
    return library


@pytest.fixture(params=MODES)
def mode(helper: ctypes.CDLL, request: pytest.FixtureRequest) -> Mode:
    """A block in another mode than the default; it must still be that one at the end."""

    @contextmanager
    def changed() -> Iterator[None]:
        helper.change(MODES[request.param])
        try:
            assert not is_default()
            before = helper.mode()
            yield
            assert helper.mode() == before, "the caller's mode is its own"
        finally:
            helper.reset()
        assert is_default()

    return changed


def cases() -> list[Case]:
    """Sums that round, and sums below the least normal number."""
    usual = linear(8, 5, K=200, N=300)
    x, w = (np.asarray(usual.operands[name]) * np.float32(1e-20) for name in ("x", "w"))
    rows = attention(1, 1, heads=(4, 2), D=32, position=300, S=320, kv="bf16")
    return [usual, usual.but(x=x, w=w), rows]


def bits(runner: Runner) -> list[bytes]:
    """The result of each case; partial sums depend on the number of threads."""
    return [runner.run(case)["y"].tobytes() for case in cases()]


@pytest.mark.parametrize("name", ["cpu", "simt"])
def test_kernels_run_in_the_default_mode(
    name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(name, threads=2)
    runner = Runner(backend)
    expected = bits(runner)
    launch = backend.eager

    def launch_in_mode(launches: Sequence[BoundLaunch]) -> None:
        with mode():
            launch(launches)

    monkeypatch.setattr(backend, "eager", launch_in_mode)  # the runner's own sums are as usual
    assert bits(runner) == expected
    backend.close()


def test_threads_that_are_born_in_another_mode_work_in_the_default_one(mode: Mode) -> None:
    """A thread begins in the mode of the one that starts it."""
    expected = bits(Runner(CpuDevice(threads=1)))
    with mode():
        device = CpuDevice(threads=3)
        device.build(OPS)
    assert bits(Runner(device)) == expected
    CpuDevice().build(OPS)


@pytest.fixture(scope="module")
def usual() -> tuple[str, list[int], str]:
    return history(flashrt.load(TINY, device="cpu", max_positions=128))


def history(engine: flashrt.Engine) -> tuple[str, list[int], str]:
    with engine.session() as session:
        session.prefill(PROMPT)
        tokens = list(session.generate(max_tokens=6, temperature=0.8, seed=3))
        return session.digest(), tokens, engine.fingerprint


def test_a_session_has_the_same_bits_in_every_mode(
    mode: Mode, usual: tuple[str, list[int], str]
) -> None:
    engine = flashrt.load(TINY, device="cpu", max_positions=128)
    with mode():
        found = history(engine)
    assert found == usual


def test_an_engine_loaded_in_another_mode_is_the_same(
    mode: Mode, usual: tuple[str, list[int], str]
) -> None:
    """Weights are converted on the host. Red before, with another fingerprint too."""
    with mode():
        engine = flashrt.load(TINY, device="cpu", max_positions=128)
    assert history(engine) == usual


def test_a_policy_sees_and_does_the_same(mode: Mode) -> None:
    def control() -> tuple[bytes, str]:
        engine = flashrt.load_policy("pendulum", device="cpu")
        loop = flashrt.ControlLoop(engine, seed=5)
        size = engine.config.observation_dim
        actions = [loop.tick(np.cos(np.arange(size) + tick / 7)) for tick in range(20)]
        return np.stack(actions).tobytes(), loop.digest()

    expected = control()
    with mode():
        found = control()
    assert found == expected


def test_what_the_host_rounds_is_rounded_to_nearest(mode: Mode) -> None:
    params = SamplerParams(temperature=0.1, top_p=0.9, min_p=0.3, logit_bias=((3, 0.1),))
    values = np.array([0.1, 1 / 3, 1e-39])
    expected = params.pack(), params.pack_bias(), checked_vector("x", values, 3).tobytes()
    with mode():
        found = params.pack(), params.pack_bias(), checked_vector("x", values, 3).tobytes()
    assert found == expected


def test_a_block_in_the_default_mode_ends_in_the_callers(mode: Mode) -> None:
    with mode():
        with DefaultFloatMode():
            assert is_default()
        assert not is_default()
        with pytest.raises(ZeroDivisionError), DefaultFloatMode():
            _ = 1 / 0
        assert not is_default()
