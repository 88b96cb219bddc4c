"""Formats of weights by name, and the model of a shape whose weights are stored so.

IS: which matrices a checkpoint of each format has as codes. IS NOT: a checkpoint: nothing is drawn.

bfloat16 is as released checkpoints are. int8 and int4 are what `flashrt.load(weights=)` makes of
them: embedding and head become int8 in both. nvfp4 and fp8 are as released checkpoints of these
formats are: matrices of layers, with embedding, head and the gates' projections in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from flashrt.base.errors import CheckpointError
from flashrt.commands.quantize import WEIGHTS
from flashrt.core.groups import Groups, Scales
from flashrt.core.region import DType
from flashrt.models import TokenModel, model_for
from flashrt.weights.formats.write import is_chosen
from flashrt.weights.quantising import quantising
from flashrt.weights.rules import Source, Stored, in_bfloat16
from flashrt.weights.synthetic import synthetic_checkpoint

_CODES: Final[Mapping[str, tuple[DType, Groups]]] = {
    "nvfp4": (DType.E2M1, Groups(16, Scales.E4M3_OVER)),
    "fp8": (DType.E4M3, Groups(128, Scales.F32)),  # blocks of 128 x 128
}
FORMATS: Final = ("bfloat16", *WEIGHTS, *_CODES)


def model_of(shape: str, form: str, max_positions: int) -> TokenModel:
    """The model of a named shape, without a draft head. Raises CheckpointError for an unknown shape
    or format, naming the known ones.
    """
    if form not in FORMATS:
        raise CheckpointError(f"format {form!r} is unknown; formats: {', '.join(FORMATS)}")
    checkpoint = synthetic_checkpoint(shape)
    stored: Callable[[Source], Stored] = in_bfloat16
    if form in WEIGHTS:
        stored = quantising(checkpoint, form).stored
    elif form in _CODES:
        stored = _in_layers(*_CODES[form])
    return model_for(checkpoint.config, max_positions=max_positions, stored=stored)


def _in_layers(dtype: DType, groups: Groups) -> Callable[[Source], Stored]:
    def stored(source: Source) -> Stored:
        is_coded = is_chosen(source.name, source.shape, groups.size)
        return (dtype, groups) if is_coded else (DType.BF16, None)

    return stored
