"""Which format a matrix of a safetensors checkpoint is stored in, by the tensors that are there.

IS: from the name of a weight to its StoredMatrix: the tensors of its module decide, and the
configuration must agree. What is known and not read is refused by name. IS NOT: a format, nor the
parsing of configurations (quantisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable
from flashrt.weights.formats.coded import (
    FETCH_AGAIN,
    OTHER_CHECKPOINT,
    CodedMatrix,
    Parts,
    refused,
)
from flashrt.weights.formats.float8 import CODE_DTYPES, scaled_bytes
from flashrt.weights.formats.nvfp4 import nvfp4
from flashrt.weights.formats.packed_integers import awq, gptq, pack_quantized, shown_bits
from flashrt.weights.formats.quantisation import Method, Quantisation, Scheme
from flashrt.weights.formats.stored import PLAIN_DTYPES, Tensor

Tensors = Mapping[str, Tensor]
_WEIGHT = ".weight"
# Parts of a quantised matrix that are read.
_PARTS = (
    "weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale",
    "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_scale_inv",
    "weight_scale_2",
)  # fmt: skip
# Scales of activations, keys and values: weights do not depend on them.
_ACTIVATIONS = (
    "input_scale", "input_scale_ub", "input_global_scale", "input_zero_point", "activation_scale",
    "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale",
    "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale", "kv_scale",
)  # fmt: skip
# Of formats that are not read, or parts that change what the weights mean.
_FOREIGN = {
    "weight.absmax": "bitsandbytes", "weight.quant_map": "bitsandbytes",
    "weight.nested_absmax": "bitsandbytes, quantised twice", "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes", "biases": "MLX", "B": "Marlin's own order", "s": "Marlin",
    "workspace": "Marlin's own order", "meta": "2:4 sparse", "weight_meta": "2:4 sparse",
    "compressed": "sparse", "bitmask": "sparse", "weight.compressed": "sparse",
    "weight.bitmask": "sparse", "pre_quant_scale": "AWQ of ModelOpt: inputs are scaled too",
    "weight_blocks": "MXFP4", "svdquant_lora_a": "SVDQuant", "perm": "in another order of columns",
}  # fmt: skip
_QUANTISED = tuple(f".{part}" for part in (*_PARTS[1:], *_FOREIGN) if len(part) > 1)
_CODES = ("F8_", "F6_", "F4")


def is_quantised(tensors: Iterable[Tensor]) -> bool:
    """Whether names or dtypes of stored tensors give quantised weights away."""
    return any(t.stored_name.endswith(_QUANTISED) or t.dtype.startswith(_CODES) for t in tensors)


def names_used(name: str) -> tuple[str, ...]:
    """All names that a weight may be read from, and those beside it that need no reading."""
    if not name.endswith(_WEIGHT):
        return (name,)
    module = name.removesuffix(_WEIGHT)
    return tuple(f"{module}.{part}" for part in (*_PARTS, *_ACTIVATIONS))


def activation_scales(tensors: Tensors) -> tuple[str, ...]:
    """Names of scales of activations, keys and values, wherever they stand: not read."""
    endings = tuple(f".{part}" for part in _ACTIVATIONS)
    return tuple(name for name in tensors if name.endswith(endings))


def stored_matrix(
    tensors: Tensors, name: str, quantisation: Quantisation | None
) -> CodedMatrix | None:
    """The matrix of a weight, by its canonical name; None where it is plain, or not there at all.

    Raises CheckpointError where it is in a format that is not read, or is not whole, or where the
    configuration says something else.
    """
    module = name.removesuffix(_WEIGHT)
    if module == name:
        return None
    found = {part: tensors[key] for part in _PARTS if (key := f"{module}.{part}") in tensors}
    foreign = [part for part in _FOREIGN if f"{module}.{part}" in tensors]
    if foreign:
        tensor = tensors[f"{module}.{foreign[0]}"]
        raise refused(
            tensor, f"is of a format that is not read ({_FOREIGN[foreign[0]]})", OTHER_CHECKPOINT
        )
    if not found:
        return None
    parts = Parts(module, found)
    weight = found.get("weight")
    if weight is not None and weight.dtype in PLAIN_DTYPES:
        if len(found) > 1:
            other = next(t for part, t in found.items() if part != "weight")
            what = f"stands beside {printable(weight.stored_name)}, which is {weight.dtype}"
            raise refused(
                other, f"{what}: weights that are to be rounded are not read", OTHER_CHECKPOINT
            )
        return None
    read = _format_of(parts)
    return read(parts, _scheme(parts, quantisation))


def _format_of(parts: Parts) -> Callable[[Parts, Scheme], CodedMatrix]:
    """By the names and dtypes alone."""
    found = parts.tensors
    packed, weight = found.get("weight_packed"), found.get("weight")
    if "qweight" in found:
        return _qweight
    if packed is not None and packed.dtype == "I32":
        return pack_quantized
    if packed is not None and "weight_global_scale" in found:
        return nvfp4
    if packed is not None:
        raise refused(
            packed, f"is {packed.dtype} without weight_global_scale (MXFP4?)", OTHER_CHECKPOINT
        )
    if weight is not None and weight.dtype in CODE_DTYPES:
        return scaled_bytes
    if weight is not None and weight.dtype == "U8" and "weight_scale_2" in found:
        return nvfp4
    odd = next(iter(found.values())) if weight is None else weight
    what = "stands beside no weight" if weight is None else f"is {weight.dtype}, which is not read"
    raise refused(odd, what, OTHER_CHECKPOINT)


def _qweight(parts: Parts, scheme: Scheme) -> CodedMatrix:
    return (awq if scheme.method is Method.AWQ else gptq)(parts, scheme)


_METHODS: dict[Callable[[Parts, Scheme], CodedMatrix], tuple[Method, ...]] = {
    _qweight: (Method.GPTQ, Method.AWQ),
    pack_quantized: (Method.COMPRESSED,),
    nvfp4: (Method.COMPRESSED, Method.MODELOPT),
    scaled_bytes: (Method.FP8, Method.FBGEMM, Method.COMPRESSED, Method.MODELOPT),
}


def _scheme(parts: Parts, quantisation: Quantisation | None) -> Scheme:
    """What the configuration says of the module; it must say that it is quantised, and so."""
    first = next(iter(parts.tensors.values()))
    if quantisation is None:
        what = "is quantised, but config.json has no quantization_config, which says how"
        raise refused(first, what, FETCH_AGAIN)
    scheme = quantisation.scheme_of(_spellings(parts.module))
    if scheme is None:
        raise CheckpointError(
            f"{first.path}: {printable(first.stored_name)} is quantised, but {quantisation.place} "
            f"leaves {printable(parts.module)} out; {FETCH_AGAIN}"
        )
    read = _format_of(parts)
    if scheme.method not in _METHODS[read] or not _agrees(parts, scheme):
        raise CheckpointError(
            f"{first.path}: {printable(first.stored_name)} is {first.dtype}, but "
            f"{quantisation.place} says {scheme.method} with {shown_bits(scheme)}; {FETCH_AGAIN}"
        )
    return scheme


def _agrees(parts: Parts, scheme: Scheme) -> bool:
    """Whether bits and kind of codes are those of the configuration, where it says so."""
    weight = parts.tensors.get("weight")
    if weight is not None and weight.dtype in CODE_DTYPES:
        is_float, bits = weight.dtype == "F8_E4M3", 8
    elif "weight_global_scale" in parts.tensors or "weight_scale_2" in parts.tensors:
        is_float, bits = True, 4
    else:
        return not scheme.is_float
    return scheme.bits in (None, bits) and scheme.is_float in (None, is_float)


def _spellings(module: str) -> tuple[str, ...]:
    """Names by which configurations call a module: with the nesting of multimodal models too."""
    if not module.startswith("model."):
        return (module,)
    inner = module.removeprefix("model.")
    return (
        module,
        f"model.language_model.{inner}",
        f"language_model.model.{inner}",
        f"backbone.{inner}",
    )
