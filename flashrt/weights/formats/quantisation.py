"""What a configuration says of quantised weights: which modules, how many bits, which groups.

IS: quantization_config of config.json (at the top or in a nested config) and ModelOpt's
hf_quant_config.json, parsed once, and a `Scheme` for a module by its name. What would change
results and is not done here (rotations, adapters, sparsity) is refused by name. IS NOT: a look at
tensors: `detect` holds what they are against what this says.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable, shown
from flashrt.weights.formats.coded import OTHER_CHECKPOINT

WHOLE = -1  # the size of a group that is a whole row
SIDE_FILE = "hf_quant_config.json"
READ = "FP8, int8, GPTQ, AWQ and compressed-tensors with 4 or 8 bits, and NVFP4 are read"
Section = Mapping[str, object]


class Method(enum.StrEnum):
    """`quant_method`, of those that are read."""

    FP8 = "fp8"
    FBGEMM = "fbgemm_fp8"
    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED = "compressed-tensors"
    MODELOPT = "modelopt"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of one module are stored. None: the configuration does not say.

    size: columns of a group, WHOLE for a row; zero_offset: what is added to stored zero points.
    """

    method: Method
    bits: int | None = None
    size: int | None = None
    is_symmetric: bool | None = None
    block: tuple[int, int] | None = None
    is_float: bool | None = None
    zero_offset: int = 0


# The scheme of a module that goes by any of these names; None where its weights are plain.
SchemeOf = Callable[[Sequence[str]], Scheme | None]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A parsed configuration. `place` names it in messages; `notes` are for the user."""

    place: str
    method: Method
    scheme_of: SchemeOf
    notes: tuple[str, ...] = ()


def quantisation_of(
    root: Path, config: Section, side: Section | None = None
) -> Quantisation | None:
    """What config.json, or hf_quant_config.json (`side`), says; None where neither says a thing.

    Raises CheckpointError for a method, a number of bits or a variant that is not read.
    """
    found = _section_of(config)
    if found is None and side is not None:
        found = SIDE_FILE, side.get("quantization", side)
    if found is None:
        return None
    name, value = found
    place = f"{root}: {name}" if name == SIDE_FILE else f"{root}: {name} in config.json"
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{place} is {shown(value)}, expected an object; {OTHER_CHECKPOINT}")
    section = _Section(place, value)
    word = "modelopt" if name == SIDE_FILE else section.text("quant_method")
    if name == "quantization" and word is None:
        word = "mlx" if "group_size" in value and "quant_algo" not in value else "modelopt"
    if word not in set(Method):
        raise section.refused(f"is {_described(word, value)}, which is not read: {READ}")
    method = Method(word)
    scheme_of, notes = _PARSERS[method](section)
    return Quantisation(place, method, scheme_of, notes)


def _section_of(config: Section) -> tuple[str, object] | None:
    for place in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        for name in ("quantization_config", "compression_config", "quantization"):
            if place.get(name) is not None:
                return name, place[name]
    return None


_NAMES = {
    "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4", "mlx": "MLX", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound", "torchao": "torchao", "quanto": "Quanto", "hqq": "HQQ",
    "aqlm": "AQLM", "vptq": "VPTQ", "eetq": "EETQ", "higgs": "HIGGS", "spqr": "SpQR",
    "bitnet": "BitNet", "quark": "Quark", "fp_quant": "FP-Quant",
}  # fmt: skip


def _described(word: str | None, value: Section) -> str:
    if word is None:
        return "without a quant_method"
    bits = next((b for b in (4, 8) if value.get(f"load_in_{b}bit") is True), value.get("bits"))
    name = _NAMES.get(word, printable(word))
    return f"{name} of {shown(bits)} bits" if isinstance(bits, int) else name


@dataclass(frozen=True, slots=True)
class _Section:
    """An object of the configuration whose values are checked as they are taken."""

    place: str
    value: Section

    def refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.place} {what}; {OTHER_CHECKPOINT}")

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        return self.refused(f"has {key} {shown(self.value[key])}, expected {expected}")

    def text(self, key: str) -> str | None:
        found = self.value.get(key)
        if found is not None and not isinstance(found, str):
            raise self._wrong(key, "a text")
        return found

    def flag(self, key: str) -> bool | None:
        found = self.value.get(key)
        if found is not None and not isinstance(found, bool):
            raise self._wrong(key, "true or false")
        return found

    def count(self, key: str, least: int = 1) -> int | None:
        found = self.value.get(key)
        if found is not None and not (type(found) is int and least <= found < 1 << 31 and found):
            raise self._wrong(key, "a count")
        return found if isinstance(found, int) else None

    def block(self, key: str) -> tuple[int, int] | None:
        found = self.value.get(key)
        if found is None:
            return None
        if isinstance(found, str):  # "128x128", of old files
            found = [int(n) if n.isascii() and n.isdecimal() else 0 for n in found[:20].split("x")]
        if isinstance(found, list) and len(found) == 2:
            high, wide = found
            if all(type(n) is int and 0 < n < 1 << 31 for n in found):
                return high, wide
        raise self._wrong(key, "two counts")

    def names(self, key: str) -> list[str]:
        found = self.value.get(key)
        if found is None:
            return []
        if isinstance(found, list) and all(isinstance(n, str) for n in found):
            return list(found)
        raise self._wrong(key, "a list of names")

    def inner(self, key: str) -> _Section:
        found = self.value.get(key)
        if found is None:
            return _Section(self.place, {})
        if not isinstance(found, Mapping):
            raise self._wrong(key, "an object")
        return _Section(f"{self.place}: {printable(key)}", found)

    def refuse_if(self, *keys: str) -> None:
        """Variants that change what the weights are."""
        for key in keys:
            if self.value.get(key):
                raise self.refused(f"has {key} {shown(self.value[key])}, which is not read")


def _parts_of(name: str) -> str:
    return f".{name.strip('.')}."


def _is_named(names: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether a key is one of the names, or whole parts of one: `mlp.gate`, not `mlp.gate_proj`."""
    return any(k.strip(".") and _parts_of(k) in _parts_of(n) for n in names for k in keys)


_QUANTIFIER = re.compile(r"[*+{]")
_MOST_QUANTIFIERS = 5  # a name of 100 characters is then matched within milliseconds


def _pattern(section: _Section, text: str) -> re.Pattern[str]:
    """A pattern of a file; one that could take for ever is refused."""
    is_simple = len(_QUANTIFIER.findall(text)) <= _MOST_QUANTIFIERS and len(text) <= 1000
    if not is_simple or re.search(r"\)[*+{]", text):
        raise section.refused(f"has the pattern {shown(text)}, which is too complicated")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise section.refused(f"has the pattern {shown(text)}, which is none") from error


# -- methods --------------------------------------------------------------------------------------


def _fp8(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    if section.text("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise section.refused(f"has fmt {shown(section.text('fmt'))}; float8 e4m3 is read")
    scheme = Scheme(Method.FP8, 8, None, True, section.block("weight_block_size"), True)
    plain = section.names("modules_to_not_convert") + section.names("ignored_layers")
    activations = section.text("activation_scheme")
    return lambda names: None if _is_named(names, plain) else scheme, _activations(activations)


def _fbgemm(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    scheme = Scheme(Method.FBGEMM, 8, WHOLE, True, None, True)
    plain = section.names("modules_to_not_convert")
    return lambda names: None if _is_named(names, plain) else scheme, _activations("dynamic")


def _activations(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return ()
    return (
        f"the checkpoint means activations to be quantised too ({printable(kind)}); flashrt keeps "
        "them as they are, which is closer to the model that it was made from",
    )


def _gptq(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    section.refuse_if("rotation", "adapter", "is_marlin_format", "use_exllama_packing")
    stored = section.text("checkpoint_format") or section.text("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise section.refused(f"has checkpoint_format {shown(stored)}; gptq and gptq_v2 are read")
    if section.text("pack_dtype") not in (None, "int32"):
        raise section.refused(f"has pack_dtype {shown(section.text('pack_dtype'))}; int32 is read")
    default = _gptq_scheme(section, stored)
    rules = [
        (pattern.startswith("-:"), _pattern(section, pattern.removeprefix("-:").removeprefix("+:")),
         _gptq_scheme(_overridden(section, inner), stored))
        for pattern, inner in section.inner("dynamic").value.items()
    ]  # fmt: skip

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        for is_excluded, pattern, scheme in rules:
            if any(pattern.match(name) for name in names):
                return None if is_excluded else scheme
        return default

    return scheme_of, ()


def _overridden(section: _Section, inner: object) -> _Section:
    if not isinstance(inner, Mapping):
        raise section.refused(f"has {shown(inner)} in dynamic, expected objects")
    return _Section(f"{section.place}: dynamic", {**section.value, **inner})


def _gptq_scheme(section: _Section, stored: str) -> Scheme:
    size = section.count("group_size", WHOLE)
    if section.flag("desc_act") and size != WHOLE:
        raise section.refused(
            "has desc_act true (columns in the order of activations), which is not read"
        )
    is_symmetric = section.flag("sym") is True
    offset = 1 if stored == "gptq" else 0
    bits = _bits(section, "bits")
    return Scheme(Method.GPTQ, bits, 128 if size is None else size, is_symmetric,
                  zero_offset=offset)  # fmt: skip


def _bits(section: _Section, key: str, *allowed: int) -> int:
    bits = section.value.get(key)
    if type(bits) is not int or bits not in (allowed or (4, 8)):
        wanted = " or ".join(map(str, allowed or (4, 8)))
        raise section.refused(f"has {key} {shown(bits)}; {wanted} bits are read")
    return bits


def _awq(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    version = (section.text("version") or "gemm").lower()
    if version != "gemm":
        raise section.refused(f"has version {shown(version)}; gemm is read")
    if section.text("backend") == "llm-awq":
        raise section.refused("has backend 'llm-awq'; autoawq is read")
    name = next((n for n in ("bits", "w_bit") if n in section.value), "bits")
    size = section.count("group_size", WHOLE) or section.count("q_group_size", WHOLE) or 128
    is_symmetric = None if section.flag("zero_point") is False else False
    scheme = Scheme(Method.AWQ, _bits(section, name, 4), size, is_symmetric)
    plain = section.names("modules_to_not_convert")
    return lambda names: None if _is_named(names, plain) else scheme, ()


# -- compressed-tensors, and ModelOpt, which writes the same objects ------------------------------

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mixed-precision", "dense", "fakequant",
)  # fmt: skip


def _compressed(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    _need_format(section)
    sparse = section.inner("sparsity_config").text("format")
    if sparse not in (None, "dense"):
        raise section.refused(f"has sparsity {shown(sparse)}, which is not read")
    if section.inner("transform_config").value.get("config_groups"):
        raise section.refused("has transform_config: weights are rotated, which is not read")
    return _by_groups(section, _Names(section, section.names("ignore")), Method.COMPRESSED)


def _need_format(section: _Section) -> None:
    stored = section.text("format")
    if stored not in (None, *_FORMATS):
        raise section.refused(f"has format {shown(stored)}, which is not read: {READ}")


class _Names:
    """Names of modules, and patterns of names (`re:...`), as compressed-tensors matches them."""

    def __init__(self, section: _Section, texts: Sequence[str]) -> None:
        self.names = {text for text in texts if not text.startswith("re:")}
        self.patterns = [_pattern(section, t.removeprefix("re:")) for t in texts if t[:3] == "re:"]

    def match(self, names: Sequence[str]) -> bool:
        return not self.names.isdisjoint(names) or any(
            p.match(name) for p in self.patterns for name in names
        )


def _by_groups(
    section: _Section, ignored: _Names, method: Method
) -> tuple[SchemeOf, tuple[str, ...]]:
    groups = list(_groups(section, method))
    schemes = [(names, scheme) for names, scheme, _ in groups]
    quantised = sorted({kind for *_, kind in groups if kind is not None})
    notes = _activations(", ".join(quantised) or None)
    if section.value.get("kv_cache_scheme"):
        notes += ("the checkpoint means keys and values to be quantised; flashrt keeps them whole",)

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        if ignored.match(names):
            return None
        by_name = (scheme for wanted, scheme in schemes if wanted.match(names))
        by_class = (scheme for wanted, scheme in schemes if "Linear" in wanted.names)
        return next((s for found in (by_name, by_class) for s in found), None)

    return scheme_of, notes


def _groups(
    section: _Section, method: Method
) -> Iterator[tuple[_Names, Scheme | None, str | None]]:
    """Targets, scheme of the weights, and how activations are quantised."""
    groups = section.inner("config_groups")
    for name in groups.value:
        group = groups.inner(name)
        _need_format(group)
        inputs = group.value.get("input_activations")
        is_dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic")
        kind = None if inputs is None else "dynamic" if is_dynamic else "static"
        targets = _Names(group, group.names("targets"))
        if group.value.get("weights") is None:
            yield targets, None, kind
            continue
        weights = group.inner("weights")
        strategy, stored = weights.text("strategy"), weights.text("type")
        if strategy not in (None, "tensor", "channel", "group", "tensor_group", "block"):
            raise weights.refused(f"has strategy {shown(strategy)}, which is not read")
        if stored not in (None, "int", "float"):
            raise weights.refused(f"has type {shown(stored)}, which is not read")
        size = weights.count("group_size", WHOLE)
        if strategy in ("group", "tensor_group") and (size is None or size == WHOLE):
            raise weights.refused(f"has groups and group_size {shown(size)}")
        if strategy in ("tensor", "channel"):
            size = WHOLE
        is_symmetric = weights.flag("symmetric") is not False
        block = weights.block("block_structure")
        if weights.value.get("actorder") in ("group", "dynamic", True):
            raise weights.refused(
                "has actorder group (columns in the order of activations), not read"
            )
        bits = _bits(weights, "num_bits")
        is_float = stored == "float" if stored is not None else method is Method.MODELOPT
        yield targets, Scheme(method, bits, size, is_symmetric, block, is_float), kind


_MODELOPT_ALGORITHMS = ("NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")


def _modelopt(section: _Section) -> tuple[SchemeOf, tuple[str, ...]]:
    scheme = _modelopt_scheme(section)
    plain = section.names("exclude_modules") + section.names("ignore")
    layers = section.inner("quantized_layers")
    by_layer = {name: _modelopt_scheme(layers.inner(name)) for name in layers.value}
    patterns = [re.compile(fnmatch.translate(p[:200])) for p in plain if set(p) & set("*?[")]
    exact = {p for p in plain if not set(p) & set("*?[")}

    def scheme_of(names: Sequence[str]) -> Scheme | None:
        is_plain = not exact.isdisjoint(names) or any(p.match(n) for p in patterns for n in names)
        if is_plain or not by_layer:
            return None if is_plain else scheme
        return next((by_layer[name] for name in names if name in by_layer), None)

    notes = _activations("static or dynamic")
    if section.value.get("kv_cache_quant_algo") or section.value.get("kv_cache_scheme"):
        notes += ("the checkpoint means keys and values to be quantised; flashrt keeps them whole",)
    return scheme_of, notes


def _modelopt_scheme(section: _Section) -> Scheme:
    algorithm = section.text("quant_algo")
    if algorithm not in _MODELOPT_ALGORITHMS:
        raise section.refused(f"has quant_algo {shown(algorithm)}; NVFP4 and FP8 are read")
    if algorithm == "MIXED_PRECISION":
        return Scheme(Method.MODELOPT, is_symmetric=True, is_float=True)
    size = section.count("group_size")
    is_four = algorithm == "NVFP4"
    return Scheme(Method.MODELOPT, 4 if is_four else 8, size if is_four else WHOLE, True,
                  is_float=True)  # fmt: skip


_PARSERS = {
    Method.FP8: _fp8, Method.FBGEMM: _fbgemm, Method.GPTQ: _gptq, Method.AWQ: _awq,
    Method.COMPRESSED: _compressed, Method.MODELOPT: _modelopt,
}  # fmt: skip
