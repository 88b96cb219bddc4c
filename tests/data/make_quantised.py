"""Makes quantised.safetensors and quantised.json: matrices as other libraries store and read them.

Needs torch, transformers 5.24, compressed-tensors 0.20, and the sources of AutoGPTQ 0.7.1 and
AutoAWQ 0.2.9 (two folders, given as arguments; only their torch code runs). Not part of the suite:

    python make_quantised.py AUTO_GPTQ_FOLDER AUTO_AWQ_FOLDER

Each case is packed by the library that defines the format, and read by it in float32: the digest of
those values is what flashrt must come to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.compressors import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    NVFP4PackedCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

HERE = Path(__file__).parent
MODULE = "model.layers.0.mlp.up_proj"
torch.manual_seed(1)
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def module_from(path: Path) -> ModuleType:
    """One file of a library, without the rest of it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def compressed(
    compressor: Any,
    stored: str,
    shape: tuple[int, int],
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    more: dict[str, torch.Tensor] | None = None,
    **arguments: Any,
) -> Case:
    """A case of compressed-tensors."""
    args = QuantizationArgs(symmetric=zero is None, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": torch.randn(shape) * 0.05, "weight_scale": scale, **(more or {})}
    if zero is not None:
        state["weight_zero_point"] = zero
    state["weight"] = state["weight"].to(torch.float32)
    packed = compressor.compress(dict(state), scheme)
    wide = dict(packed)
    if scale.dtype in (torch.float16, torch.bfloat16):
        wide["weight_scale"] = packed["weight_scale"].float()
    if compressor is NVFP4PackedCompressor:  # whose `decompress` rounds to bfloat16 at the end
        codes = unpack_fp4_from_uint8(packed["weight_packed"], *shape, dtype=torch.float32)
        values = dequantize(
            codes, packed["weight_scale"].float(), args=args, dtype=torch.float32,
            global_scale=packed["weight_global_scale"],
        )  # fmt: skip
    else:
        values = compressor.decompress(wide, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    group["weights"].pop("zp_dtype", None)
    group["weights"].pop("scale_dtype", None)
    config = {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*shared_expert_gate$"],
    }
    return config, packed, values


def scales(rows: int, groups: int, dtype: torch.dtype, low: float = 0.01) -> torch.Tensor:
    return (torch.rand(rows, groups) * 0.01 + low).to(dtype)


def of_compressed_tensors() -> dict[str, Case]:
    pack, whole = PackedQuantizationCompressor, {"strategy": "channel"}
    zeros = torch.randint(-8, 8, (20, 3), dtype=torch.int8)
    zeros8 = torch.randint(-100, 100, (20, 2), dtype=torch.int8)
    cases = {
        "packed int4, groups of 32": compressed(
            pack, "pack-quantized", (20, 96), scales(20, 3, torch.bfloat16),
            num_bits=4, strategy="group", group_size=32),
        "packed int4 with zero points": compressed(
            pack, "pack-quantized", (20, 96), scales(20, 3, torch.bfloat16), zeros,
            num_bits=4, strategy="group", group_size=32),
        "packed int4, float16": compressed(
            pack, "pack-quantized", (20, 128), scales(20, 1, torch.float16),
            num_bits=4, strategy="group", group_size=128),
        "packed int4, a scale per row": compressed(
            pack, "pack-quantized", (20, 264), scales(20, 1, torch.float32), num_bits=4, **whole),
        "packed int8 with zero points": compressed(
            pack, "pack-quantized", (20, 128), scales(20, 2, torch.float16, 0.001), zeros8,
            num_bits=8, strategy="group", group_size=64),
        "int8, a scale per row": compressed(
            IntQuantizationCompressor, "int-quantized", (20, 300),
            scales(20, 1, torch.bfloat16, 0.001), num_bits=8, **whole),
        "int8, groups of 64, with zero points": compressed(
            IntQuantizationCompressor, "int-quantized", (20, 128),
            scales(20, 2, torch.float16, 0.001), zeros8,
            num_bits=8, strategy="group", group_size=64),
        "float8, a scale per row": compressed(
            FloatQuantizationCompressor, "float-quantized", (20, 300),
            scales(20, 1, torch.float32, 0.001), num_bits=8, type="float", **whole),
        "float8, one scale": compressed(
            FloatQuantizationCompressor, "float-quantized", (20, 100),
            torch.tensor([0.0123], dtype=torch.bfloat16), num_bits=8, type="float",
            strategy="tensor"),
        "float8, blocks of 16 x 32": compressed(
            FloatQuantizationCompressor, "float-quantized", (40, 70),
            scales(3, 3, torch.float32, 0.001), num_bits=8, type="float", strategy="block",
            block_structure=[16, 32]),
        "nvfp4": compressed(
            NVFP4PackedCompressor, "nvfp4-pack-quantized", (20, 96),
            (torch.rand(20, 6) * 200 + 40).to(torch.float8_e4m3fn).float(), num_bits=4,
            type="float", strategy="tensor_group", group_size=16,
            more={"weight_global_scale": torch.tensor([5237.0])}),
    }  # fmt: skip
    packed = cases["nvfp4"][1]
    packed["input_global_scale"] = torch.tensor([41.5])  # of activations: changes nothing
    return cases


def of_transformers() -> dict[str, Case]:
    """The official FP8: transformers derives the block from the sizes, so they are multiples."""
    weight = (torch.randn(256, 128) * 100).to(torch.float8_e4m3fn)
    scale = scales(2, 1, torch.bfloat16, 0.0005)
    values = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    config = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "model.visual"],
    }  # fmt: skip
    return {"float8, official": (config, {"weight": weight, "weight_scale_inv": scale}, values)}


def of_gptq(folder: Path) -> dict[str, Case]:
    qlinear = module_from(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    cases = {}
    for name, bits, size, is_symmetric, columns in (
        ("gptq int4", 4, 32, True, 96), ("gptq int4, whole rows", 4, -1, True, 288),
        ("gptq int4 with zero points", 4, 64, False, 128), ("gptq int8", 8, 32, True, 64),
        ("gptq int8 with zero points", 8, 32, False, 64),
    ):  # fmt: skip
        linear = torch.nn.Linear(columns, 32, bias=False)
        linear.weight.data = (torch.randn(32, columns) * 0.04).half()
        groups = 1 if size == -1 else columns // size
        low = 0.02 if bits == 4 else 0.001
        scale = scales(32, groups, torch.float16, low).float()
        middle = 1 << (bits - 1)
        zero = torch.full((32, groups), float(middle))
        if not is_symmetric:
            zero = torch.randint(middle - 4, middle + 4, (32, groups)).float()
        packed = qlinear(bits, size, columns, 32, False)
        packed.pack(linear, scale, zero)
        state = {k: getattr(packed, k).clone() for k in ("qweight", "qzeros", "scales", "g_idx")}
        packed.scales = packed.scales.float()
        values = packed(torch.eye(columns)).T  # a product with ones and zeros: the weights
        config = {
            "quant_method": "gptq", "bits": bits, "group_size": size, "sym": is_symmetric,
            "desc_act": False, "checkpoint_format": "gptq",
            "dynamic": {"-:.*self_attn.*": {}, "-:lm_head": {}},
        }  # fmt: skip
        cases[name] = (config, state, values)
    return cases


def of_awq(folder: Path) -> dict[str, Case]:
    packing = module_from(folder / "awq/utils/packing_utils.py")
    rows, columns, size = 40, 128, 64
    words = torch.randint(-(2**31), 2**31 - 1, (columns, rows // 8), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (columns // size, rows // 8), dtype=torch.int32)
    scale = scales(rows, columns // size, torch.float16).T.contiguous()
    values = packing.dequantize_gemm(words, zeros, scale.float(), 4, size).T
    config = {
        "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": ["visual"],
    }  # fmt: skip
    return {"awq": (config, {"qweight": words, "qzeros": zeros, "scales": scale}, values)}


def main() -> None:
    gptq, awq = map(Path, sys.argv[1:])
    cases = of_compressed_tensors() | of_transformers() | of_gptq(gptq) | of_awq(awq)
    stored, facts = {}, {}
    for name, (config, tensors, values) in cases.items():
        for part, tensor in tensors.items():
            stored[f"{name}/{MODULE}.{part}"] = tensor.contiguous()
        array = values.detach().float().contiguous().numpy() + 0  # -0 is 0
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        facts[name] = {
            "quantization_config": config, "shape": list(array.shape), "sha256": digest,
            "first": array[0, :4].tolist(),
        }  # fmt: skip
    save_file(stored, HERE / "quantised.safetensors")
    (HERE / "quantised.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
