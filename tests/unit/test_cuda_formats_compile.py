"""Products with weights, and rows of them, compile for every stored format and spill nothing.

IS: the variants that test_cuda_compile leaves out, for it knows no formats; the suite takes the two
formats that need most registers, on three architectures, and launches of several formats on all;
`--all-formats` takes all, for an hour of two cores. IS NOT: running them
(tests/backend/test_formats_simt.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.core.region import DType
from tests.backend.test_formats_simt import FORMATS, QUICK, Format
from tests.unit.test_cuda_compile import ARCHS, MAIN_ARCHS, compile_all, many_linears, shape

pytestmark = pytest.mark.usefixtures("needs_nvrtc")
WORST = (QUICK[0], QUICK[2])  # a minimum; two levels in groups of 16


@pytest.fixture(scope="module")
def needs_nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")


def launches(
    forms: Sequence[Format], acts: Sequence[DType], rows: Sequence[int], ks: Sequence[int]
) -> Iterator[KernelLaunch]:
    """`linear_few` of some rows, and `linear_many` of every tile."""
    for form in forms:
        groups = {} if form.groups is None else {"w": form.groups, "table": form.groups}
        dtypes = {"w": form.dtype, "table": form.dtype}
        for op in ("embed", "draft_input"):
            made = shape(op, 1, acts[0], DType.BF16, 132)
            yield from kernels.EXPANSIONS[op](replace(made, dtypes=dtypes, groups=groups))
        for act in acts:
            for k in ks:
                for n in rows:
                    for n_sms in (16, 1000):
                        made = shape("linear", n, act, DType.BF16, n_sms, K=k)
                        full = replace(made, dtypes=dtypes, groups=groups)
                        yield from kernels.EXPANSIONS["linear"](full)
                made = shape("linear", 512, act, DType.BF16, 132, K=k)
                yield from many_linears(replace(made, dtypes=dtypes, groups=groups))


def of_experts(form: Format, acts: Sequence[DType]) -> Iterator[KernelLaunch]:
    """Products with experts, of one row, a few, and as many as each tile is for."""
    groups = {} if form.groups is None else {"w": form.groups}
    for act in acts:
        for op in ("experts_in", "experts_out"):
            for rows in (1, 8, 64, 512, 2048):
                made = shape(op, rows, act, DType.BF16, 132, H=2048, I=512)
                full = replace(made, dtypes={"w": form.dtype}, groups=groups)
                yield from kernels.EXPANSIONS[op](full)


def test_formats_compile_without_spills() -> None:
    """Red: a tile whose registers leave no room for the scales of two levels."""
    assert compile_all("sm_80", launches(WORST, (DType.BF16X2,), (1,), (2560,))) == {}


# Launches of several matrices: a quantised checkpoint's, and the formats that need most registers.
MIXED = (
    ("norm_linears_2", 1, (Format(DType.BF16), QUICK[5])),
    ("linears_2", 8, WORST),
    ("linears_3", 32, (Format(DType.BF16), *WORST)),
)


def mixed_launches() -> Iterator[KernelLaunch]:
    for op, rows, forms in MIXED:
        named = {f"w{i}": form for i, form in enumerate(forms)}
        yield from kernels.EXPANSIONS[op](
            replace(
                shape(op, rows, DType.BF16X2, DType.BF16, 132),
                dtypes={name: form.dtype for name, form in named.items()},
                groups={name: form.groups for name, form in named.items() if form.groups},
            )
        )


@pytest.mark.parametrize(
    "arch", [a if a == "sm_90" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]
)
def test_several_formats_compile_without_spills(arch: str) -> None:
    """Red: launch bounds of one format for the code of another."""
    assert compile_all(arch, mixed_launches()) == {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The widest formats on three architectures; with `--all-formats`, all on all."""
    if "form" in metafunc.fixturenames:
        is_all = metafunc.config.getoption("--all-formats")
        cases = [(a, f) for a in MAIN_ARCHS for f in (FORMATS if is_all else WORST)]
        cases += [(a, f) for a in ARCHS if is_all and a not in MAIN_ARCHS for f in WORST]
        metafunc.parametrize(("arch", "form"), cases, ids=str)


@pytest.mark.slow
def test_a_format_compiles_without_spills(
    request: pytest.FixtureRequest, arch: str, form: Format
) -> None:
    """Red as above; all rows, parts and lengths with `--all-formats`."""
    acts: tuple[DType, ...] = (DType.BF16, DType.BF16X2, DType.F32)
    if request.config.getoption("--all-formats"):
        made = launches((form,), acts, (1, 16, 32), (2560, 2561))
    else:
        acts = (DType.BF16, DType.BF16X2)
        made = launches((form,), acts, (1,), (2560,))
    assert compile_all(arch, itertools.chain(made, of_experts(form, acts))) == {}
