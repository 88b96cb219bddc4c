"""Tiny models as quantised checkpoints store them, each with the plain checkpoint of its values.

IS: for every format, rounding that is good enough for a model to be one, the stored tensors, and
the float32 values by the formula of the format, written without the code that is tested. IS NOT: a
quantiser, nor the proof that the libraries read the same (tests/unit/test_quantised_formats.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from flashrt.core.groups import Scales
from flashrt.core.region import DType
from flashrt.weights.random_checkpoint import ExpertSizes, Shape, write_random_checkpoint

Array = NDArray[Any]
Floats = NDArray[np.float32]
Packed = tuple[dict[str, Array], Floats]  # tensors of a module by part, and the values
Pack = Callable[[Floats], Packed]
Kind = gguf.GGMLQuantizationType

SHAPE = Shape(256, 4, 256, (4, 2, 32), (2, 4, 32), 512)
RAGGED = Shape(256, 4, 192, (4, 2, 32), (2, 4, 32), 512)  # no whole blocks of 128 in the MLP
MOE = Shape(256, 4, 0, (4, 2, 32), (2, 4, 32), 512, experts=ExpertSizes(4, 2, 128, 128))
MATRIX = re.compile(
    r"(.*layers\.\d+\..*\.(?:[qkvo]|gate|up|down|out|in_proj_qkv|in_proj_z)(?:_proj)?)\.weight"
)
BFLOAT16, FLOAT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64",
    "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A way to store a checkpoint: how each matrix is packed, and what the configuration says."""

    name: str
    pack: Callable[[str], Pack | None]  # by the module; None keeps it plain
    regions: frozenset[tuple[DType, Scales]]  # what kernels must be given: codes, not values
    section: Mapping[str, object] = field(default_factory=dict)
    side: Mapping[str, object] | None = None  # hf_quant_config.json
    shape: Shape = SHAPE
    has_draft_head: bool = False

    def __str__(self) -> str:
        return self.name


def write_file(path: Path, tensors: Mapping[str, Array]) -> None:
    """A safetensors file, float8 and all."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, a in tensors.items():
        header[name] = {
            "dtype": _NAMES[a.dtype.name], "shape": list(a.shape),
            "data_offsets": [at, at + a.nbytes],
        }  # fmt: skip
        at += a.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for a in tensors.values():
            file.write(np.ascontiguousarray(a).tobytes())


def write_both(folder: Path, form: Form) -> tuple[Path, Path]:
    """A checkpoint in a form, and the same one with the values as float32."""
    made = write_random_checkpoint(
        folder / "plain", form.shape, seed=3, has_draft_head=form.has_draft_head
    )
    config = json.loads((made / "config.json").read_text())
    stored: dict[str, Array] = {}
    values: dict[str, Array] = {}
    for name, tensor in safetensors.numpy.load_file(made / "model.safetensors").items():
        found = MATRIX.fullmatch(name)
        pack = form.pack(found[1]) if found else None
        if found is None or pack is None:
            stored[name] = values[name] = tensor
            continue
        parts, values[name] = pack(tensor.astype(np.float32))
        stored |= {f"{found[1]}.{part}": array for part, array in parts.items()}
    quantised, plain = folder / form.name, folder / f"{form.name} float32"
    for path, tensors in ((quantised, stored), (plain, values)):
        path.mkdir()
        write_file(path / "model.safetensors", tensors)
        section = (
            {"quantization_config": form.section} if form.section and path is quantised else {}
        )
        (path / "config.json").write_text(json.dumps(config | section))
    if form.side is not None:
        (quantised / "hf_quant_config.json").write_text(json.dumps(form.side))
    return quantised, plain


# -- float8 ---------------------------------------------------------------------------------------


def float8_blocks(w: Floats) -> Packed:
    """The official FP8: a scale per 128 x 128, to multiply by."""
    n, k = w.shape
    grid = np.zeros((-(-n // 128) * 128, -(-k // 128) * 128), np.float32)
    grid[:n, :k] = np.abs(w)
    largest = grid.reshape(grid.shape[0] // 128, 128, -1, 128).max(axis=(1, 3))
    scale = (largest / 448).astype(BFLOAT16)
    s = np.repeat(np.repeat(scale.astype(np.float32), 128, axis=0), 128, axis=1)[:n, :k]
    codes = np.clip(w / s, -448, 448).astype(FLOAT8)
    return {"weight": codes, "weight_scale_inv": scale}, codes.astype(np.float32) * s


def float8_rows(w: Floats) -> Packed:
    """A scale per row."""
    scale = (np.abs(w).max(axis=1, keepdims=True) / 448).astype(np.float32)
    codes = np.clip(w / scale, -448, 448).astype(FLOAT8)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


# -- float4 ---------------------------------------------------------------------------------------


def nvfp4(w: Floats, *, is_divided: bool) -> Packed:
    """A float8 scale per 16 columns, a float32 one for the matrix: divided by, or multiplied."""
    largest = np.abs(w).reshape(len(w), -1, 16).max(axis=2)
    whole = np.float32(448 * 6 / largest.max())
    second = np.float32(1) / whole
    inner = np.clip(largest / 6 * whole, None, 448).astype(FLOAT8)
    s = inner.astype(np.float32) / whole if is_divided else inner.astype(np.float32) * second
    s = np.repeat(s, 16, axis=1)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nearest = np.abs(np.abs(w / s)[:, :, None] - magnitudes).argmin(axis=2).astype(np.uint8)
    codes = nearest | np.where(w < 0, np.uint8(8), np.uint8(0))
    values = np.where(w < 0, -magnitudes[nearest], magnitudes[nearest]) * s
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    if is_divided:
        parts = {"weight_packed": packed, "weight_global_scale": np.array([whole])}
    else:
        parts = {"weight": packed, "weight_scale_2": np.array(second)}
    return parts | {"weight_scale": inner}, values


# -- integers -------------------------------------------------------------------------------------


def words(codes: Array, bits: int = 4) -> Array:
    """Unsigned codes along the last axis as int32, the first one in the lowest bits."""
    parts = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    packed: Array = np.bitwise_or.reduce(parts << shifts, axis=-1).view(np.int32)
    return packed


def rounded(
    w: Floats, size: int, dtype: np.dtype[Any], *, has_zeros: bool
) -> tuple[Array, Array, Array, Floats]:
    """Codes of 4 bits, scales and zero points [n, k / size], and (q - zero) s."""
    groups = w.reshape(len(w), -1, size)
    if has_zeros:
        low, high = np.minimum(groups.min(axis=2), 0), groups.max(axis=2)
        scale = ((high - low) / 15).astype(dtype)
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, 15).astype(np.uint8)
    else:
        scale = (np.abs(groups).max(axis=2) / 7.5).astype(dtype)
        zero = np.full(scale.shape, 8, np.uint8)
    s, z = (np.repeat(a.astype(np.float32), size, axis=1) for a in (scale, zero))
    codes = np.clip(np.rint(w / s) + z, 0, 15)
    return codes.astype(np.uint8), scale, zero, ((codes - z) * s).astype(np.float32)


def packed_int4(w: Floats, size: int, *, has_zeros: bool) -> Packed:
    """pack-quantized of compressed-tensors."""
    codes, scale, zero, values = rounded(w, size, BFLOAT16, has_zeros=has_zeros)
    parts = {
        "weight_packed": words(codes), "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }  # fmt: skip
    if has_zeros:
        parts["weight_zero_point"] = words(zero.T).T
    return parts, values


def int8_rows(w: Floats) -> Packed:
    """int-quantized of compressed-tensors: a scale per row."""
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(BFLOAT16)
    s = scale.astype(np.float32)
    codes = np.clip(np.rint(w / s), -128, 127)
    return {"weight": codes.astype(np.int8), "weight_scale": scale}, codes * s


def gptq(w: Floats) -> Packed:
    """Symmetric, in groups of 128; zero points are stored less one."""
    codes, scale, zero, values = rounded(w, 128, np.dtype(np.float16), has_zeros=False)
    return {
        "qweight": words(codes).T, "scales": scale.T, "qzeros": words(zero.T - 1),
        "g_idx": (np.arange(w.shape[1]) // 128).astype(np.int32),
    }, values  # fmt: skip


def awq(w: Floats) -> Packed:
    """AutoAWQ's gemm: words of eight rows, interleaved."""
    codes, scale, zero, values = rounded(w, 128, np.dtype(np.float16), has_zeros=True)

    def interleaved(a: Array) -> Array:
        return words(a.T.reshape(a.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]])[:, :, 0]

    return {
        "qweight": interleaved(codes), "scales": scale.T, "qzeros": interleaved(zero),
    }, values  # fmt: skip


# -- checkpoints ----------------------------------------------------------------------------------


def compressed(stored: str, *groups: tuple[str, Mapping[str, object]]) -> dict[str, object]:
    """quantization_config of compressed-tensors: per group, targets and what weights are."""
    return {
        "quant_method": "compressed-tensors", "format": stored, "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": {"targets": [targets], "weights": weights}
            for i, (targets, weights) in enumerate(groups)
        },
    }  # fmt: skip


def ints(bits: int, size: int | None, *, is_symmetric: bool = True) -> dict[str, object]:
    strategy = (
        {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    )
    return {"num_bits": bits, "type": "int", "symmetric": is_symmetric, **strategy}


ROWS8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
          "group_size": 16}  # fmt: skip


def everywhere(pack: Pack) -> Callable[[str], Pack | None]:
    return lambda module: pack


def nvfp4_divided(w: Floats) -> Packed:
    return nvfp4(w, is_divided=True)


def nvfp4_multiplied(w: Floats) -> Packed:
    return nvfp4(w, is_divided=False)


def mixed(module: str) -> Pack | None:
    """Of matrices that are stacked, no two neighbours in one format."""
    match module.rpartition(".")[2]:
        case "q_proj" | "in_proj_z" | "gate_proj" | "down_proj":
            return float8_rows
        case "v_proj" | "in_proj_qkv" | "up_proj":
            return nvfp4_divided
    return None


def _of(*formats: tuple[DType, Scales]) -> frozenset[tuple[DType, Scales]]:
    return frozenset(formats)


def but_routers(pack: Pack) -> Callable[[str], Pack | None]:
    return lambda module: None if module.endswith(".mlp.gate") else pack


FORMS = (
    Form(
        "fp8", everywhere(float8_blocks), _of((DType.E4M3, Scales.F32)),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
         "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "mtp.fc"]},
        shape=RAGGED, has_draft_head=True,
    ),
    Form(
        "fp8-rows", everywhere(float8_rows), _of((DType.E4M3, Scales.F32)),
        compressed("float-quantized", ("Linear", ROWS8)),
    ),
    Form(
        "nvfp4", everywhere(nvfp4_divided), _of((DType.E2M1, Scales.E4M3_OVER)),
        compressed("nvfp4-pack-quantized", ("Linear", FLOAT4)),
    ),
    Form(
        "nvfp4-modelopt", everywhere(nvfp4_multiplied), _of((DType.E2M1, Scales.E4M3_TIMES)),
        side={"producer": {"name": "modelopt"},
              "quantization": {"quant_algo": "NVFP4", "group_size": 16,
                               "exclude_modules": ["lm_head"]}},
    ),
    Form(
        "gptq", lambda module: gptq if ".mlp." in module else None, _of((DType.U4, Scales.F16)),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
         "checkpoint_format": "gptq",
         "dynamic": {"-:.*attn.*": {}, "-:lm_head": {}, "-:.*shared_expert.*": {}}},
    ),
    Form(
        "awq", everywhere(awq), _of((DType.U4, Scales.F32_MIN)),
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True,
         "version": "gemm", "modules_to_not_convert": ["visual"]},
    ),
    Form(
        "int4", everywhere(lambda w: packed_int4(w, 32, has_zeros=False)),
        _of((DType.U4, Scales.F32)),
        compressed("pack-quantized", ("Linear", ints(4, 32))),
    ),
    Form(
        "int4-zeros", everywhere(lambda w: packed_int4(w, 128, has_zeros=True)),
        _of((DType.U4, Scales.F32_MIN)),
        compressed("pack-quantized", ("Linear", ints(4, 128, is_symmetric=False))),
    ),
    Form(
        "int8", everywhere(int8_rows), _of((DType.I8, Scales.F32)),
        compressed("int-quantized", ("Linear", ints(8, None))),
    ),
    Form(
        "fp8-moe", but_routers(float8_blocks), _of((DType.E4M3, Scales.F32)),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
         "modules_to_not_convert": ["lm_head", "mtp.fc", "mlp.gate", "shared_expert_gate"]},
        shape=MOE, has_draft_head=True,
    ),
    Form(
        "nvfp4-modelopt-moe", but_routers(nvfp4_multiplied), _of((DType.E2M1, Scales.E4M3_TIMES)),
        side={"producer": {"name": "modelopt"},
              "quantization": {"quant_algo": "NVFP4", "group_size": 16,
                               "exclude_modules": ["lm_head", "*.mlp.gate"]}},
        shape=MOE,
    ),
    Form(
        "gptq-moe", lambda module: gptq if ".experts." in module else None,
        _of((DType.U4, Scales.F16)),
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
         "dynamic": {"-:.*attn.*": {}, "-:lm_head": {}, "-:.*shared_expert.*": {}}},
        shape=MOE,
    ),
    Form(
        "int4-moe", but_routers(lambda w: packed_int4(w, 32, has_zeros=False)),
        _of((DType.U4, Scales.F32)),
        compressed("pack-quantized", ("Linear", ints(4, 32))) | {"ignore": ["re:.*mlp.gate$"]},
        shape=MOE,
    ),
    Form(
        "mixed", mixed, _of((DType.E4M3, Scales.F32), (DType.E2M1, Scales.E4M3_OVER)),
        compressed("mixed-precision",
                   ("re:.*(q_proj|in_proj_z|gate_proj|down_proj)$", ROWS8),
                   ("re:.*(v_proj|in_proj_qkv|up_proj)$", FLOAT4)),
    ),
)  # fmt: skip


# -- GGUF -----------------------------------------------------------------------------------------


def q4_k(w: Floats) -> Array:
    """Blocks of 256: eight scales and minima of 6 bits, and what they are multiples of."""
    x = w.reshape(-1, 8, 32)
    low = np.maximum(-x.min(axis=2), 0)
    step = (x.max(axis=2) + low) / 15
    d, e = ((a.max(axis=1) / 63).astype(np.float16) for a in (step, low))
    wide_d, wide_e = (a.astype(np.float32)[:, None] for a in (d, e))
    i, j = (
        np.clip(np.rint(a / b), 1, 63).astype(np.uint8) for a, b in ((step, wide_d), (low, wide_e))
    )
    q = np.clip(np.rint((x + (wide_e * j)[:, :, None]) / (wide_d * i)[:, :, None]), 0, 15)
    q = q.astype(np.uint8)
    first = np.concatenate([i[:, :4] | i[:, 4:] >> 4 << 6, j[:, :4] | j[:, 4:] >> 4 << 6], axis=1)
    scales = np.concatenate([first, (i[:, 4:] & 15) | j[:, 4:] << 4], axis=1)
    codes = (q[:, ::2] | q[:, 1::2] << 4).reshape(-1, 128)
    heads = np.stack([d, e], axis=1).view(np.uint8)
    return np.concatenate([heads, scales, codes], axis=1).reshape(len(w), -1)


def packed_gguf(values: Array, kind: Kind) -> tuple[Array, Kind]:
    """Blocks of a kind, or of Q8_0 where rows have no whole ones: as llama.cpp falls back."""
    w = values.astype(np.float32)
    if kind is Kind.Q4_K and w.shape[1] % 256 == 0:
        return q4_k(w), kind
    kind = Kind.Q8_0 if kind is Kind.Q4_K else kind
    return gguf.quants.quantize(w, kind), kind


def write_gguf(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, tuple[Array, Kind | None]]
) -> Path:
    """A qwen35 file by ggml's writer; arrays with a kind are blocks of it."""
    writer = gguf.GGUFWriter(path, "qwen35")
    for key, value in keys.items():
        name = key if "." in key else f"qwen35.{key.replace('__', '.')}"
        kind = gguf.GGUFValueType.get_type(value)
        inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(name, value, kind, inner)
    for name, (array, blocks) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_both_ggufs(
    folder: Path, kind: Kind, keys: Mapping[str, Any], tensors: Mapping[str, Array]
) -> tuple[Path, Path]:
    """A file whose matrices are of a kind, and the same one with the values that ggml reads."""
    stored: dict[str, tuple[Array, Kind | None]] = {}
    values: dict[str, tuple[Array, Kind | None]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != np.float16:  # vectors and convolutions
            stored[name] = values[name] = tensor, None
            continue
        raw, found = packed_gguf(tensor, kind)
        stored[name] = raw, found
        values[name] = gguf.quants.dequantize(raw, found), None
    made = write_gguf(folder / f"{kind.name}.gguf", keys, stored)
    return made, write_gguf(folder / f"{kind.name} float32.gguf", keys, values)
