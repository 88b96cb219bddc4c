"""build.py: every kernel compiles for every architecture without a GPU, and says what it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import build
from flashrt.backends.cuda.kernels import EXPANSIONS
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.core.region import DType


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = build.main(arguments)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_every_kernel_is_compiled_and_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, text = run(
        capsys, "cuda", "--arch", "sm_90", "--shape", "tiny", "--no-spills",
        "--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "rows.md"),
    )  # fmt: skip
    assert status == 0, text
    rows = json.loads((tmp_path / "rows.json").read_text())
    kernels = {row["kernel"] for row in rows}
    missing = [op for op in EXPANSIONS if not any(kernel.startswith(op) for kernel in kernels)]
    # rows of this shape are so short that norm_silu has room, and all its weights have one format
    of_shapes = {"linear_silu", "linears_2", "linears_3", "norm_linears_2", "norm_linears_3"}
    of_families = {
        "activations", "add_layer_norm", "attend_patches", "conv_biased", "gated_conv", "gelu",
        "draft_input_seen", "embed_seen", "mix_rows", "place_rows", "relu_squared", "rope_placed",
        "scale_rows",
        "silu_rmsnorm", "ssm", "turn_patches",
        "route", "experts_in", "experts_out", "add_gated",
        "image_patches", "all_rows", "geglu", "adaptive_rmsnorm",
    }  # fmt: skip
    of_cameras = {
        "see", "chunk_begin", "chunk_end", "ensemble", "conv2d", "conv2d_add", "max_pool",
        "layer_norm", "add_rows", "normalize", "attend",
        "rope_rows", "append_rows", "flow_noise", "guide", "euler",
    }  # fmt: skip
    assert set(missing) == of_shapes | of_families | of_cameras
    assert {"copy_batch", "digest_terms"} <= kernels
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert all(row["spill_bytes"] == 0 for row in rows)
    table = (tmp_path / "rows.md").read_text().splitlines()
    assert table[0].endswith("| sm_90 |")
    assert len(table) == 2 + len(rows)


def test_the_output_folder_is_a_kernel_cache(tmp_path: Path) -> None:
    launches = [build.kernels.copy_launch(1, 108), build.kernels.digest_launch(1, 108)]
    compiler = Nvrtc("sm_90", tmp_path / "cuda")
    build.compile_all(compiler, launches)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(first) == 2
    build.compile_all(Nvrtc("sm_90", tmp_path / "cuda"), launches)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == first


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "cuda", "--arch", "sm_10", "--shape", "tiny")
    assert status == 1
    assert "cannot compile for sm_10" in text
    with pytest.raises(SystemExit):
        run(capsys, "cuda", "--precision", "half")
    assert "unknown ['half']" in capsys.readouterr().err


def test_precisions_and_devices_widen_the_set_of_variants() -> None:
    arguments = build._parser().parse_args(["cuda", "--shape", "tiny"])
    both = build._parser().parse_args(["cuda", "--shape", "tiny", "--precision", "bfloat16,high"])
    few, many = (build._launches(a, build._recorded(a), "sm_90") for a in (arguments, both))
    assert set(few) < set(many)
    assert build.ACTS["high"].narrow is DType.BF16X2
