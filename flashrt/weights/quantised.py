"""Whether a checkpoint is quantised, and in which format.

IS: what config.json, hf_quant_config.json and the stored tensors say about it. IS NOT: reading of
quantised weights, which flashrt does not do yet. Exists because such a checkpoint shows as hundreds
of tensors with unknown names and sizes, and never says what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable, shown

_SECTIONS = ("quantization_config", "compression_config", "quantization")
_SIDE_FILE = "hf_quant_config.json"  # of NVIDIA's ModelOpt
_METHODS = {
    "awq": "AWQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "fp8": "FP8", "fbgemm_fp8": "FP8", "gptq": "GPTQ", "mlx": "MLX", "modelopt": "ModelOpt",
    "mxfp4": "MXFP4", "torchao": "torchao",
}  # fmt: skip
_SUFFIXES = (  # of tensors that stand beside, or in place of, a quantised weight
    (".qweight", "GPTQ or AWQ"), (".qzeros", "GPTQ or AWQ"), (".weight_scale_2", "NVFP4, ModelOpt"),
    (".weight_packed", "compressed-tensors"), (".weight_scale_inv", "FP8"),
    (".weight_scale", "FP8 or compressed-tensors"), (".absmax", "bitsandbytes"),
    (".quant_map", "bitsandbytes"), (".scales", "MLX"),
)  # fmt: skip
_BITS = ("bits", "w_bit", "num_bits")
TAKES = "flashrt takes weights in bfloat16, float16 or float32 for now"


def refuse_quantised(
    root: Path, config: Mapping[str, object], stored: Iterable[tuple[str, str]]
) -> None:
    """Raises CheckpointError if the checkpoint is quantised; `stored` are (name, dtype) pairs."""
    section = _section_of(config)
    by_config = None if section is None else _described(*section)
    if section is None and (root / _SIDE_FILE).is_file():
        by_config = f"ModelOpt: it has {_SIDE_FILE}"
    by_tensors = format_of_tensors(stored)
    if by_config is not None and by_tensors is None:
        place = _SIDE_FILE if section is None else f"{section[0]} in config.json"
        raise CheckpointError(
            f"{root}: {place} says that the weights are quantised ({by_config}), but they are "
            f"stored as plain numbers; if they are whole, remove {place} and load again"
        )
    if by_tensors is not None:
        raise CheckpointError(f"{root}: {refusal(by_config or by_tensors)}")


def refusal(quantised_format: str) -> str:
    """What to say about a quantised checkpoint."""
    return (
        f"a quantised checkpoint ({quantised_format}). {TAKES}: take the model that this one was "
        "made from, which its model card names"
    )


def format_of_config(config: Mapping[str, object]) -> str | None:
    """The format that config.json names, at the top or in a nested config."""
    section = _section_of(config)
    return None if section is None else _described(*section)


def format_of_tensors(stored: Iterable[tuple[str, str]]) -> str | None:
    """The format that names and dtypes of tensors give away; dtypes are safetensors' codes."""
    for name, dtype in stored:
        for suffix, quantised_format in _SUFFIXES:
            if name.endswith(suffix):
                return quantised_format
        if dtype.startswith(("F8", "F6", "F4")):
            return f"{dtype} values"
    return None


def _section_of(config: Mapping[str, object]) -> tuple[str, object] | None:
    for place in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        for name in _SECTIONS:
            if place.get(name) is not None:
                return name, place[name]
    return None


def _described(name: str, section: object) -> str:
    if not isinstance(section, Mapping):
        return f"{name} is {shown(section)}"
    method = section.get("quant_method")
    if method is None:
        method = "mlx" if name == "quantization" or "group_size" in section else "unknown format"
    words = [_METHODS.get(method, method) if isinstance(method, str) else shown(method)]
    words += [v for v in (section.get(n) for n in ("quant_algo", "format")) if isinstance(v, str)]
    bits = [v for v in (section.get(n) for n in _BITS) if isinstance(v, int)]
    bits += [n for n in (4, 8) if section.get(f"load_in_{n}bit") is True]
    words += [f"{shown(n)} bits" for n in bits[:1]]
    return printable(", ".join(words))
