"""Experts that a checkpoint stores stacked, as the tensors of one expert each.

IS: the names of stacked tensors [experts, rows, columns], and the part of the file that each expert
has in them: a slice is a tensor like any other. So rules, checks and loading see the same names
whichever way experts are stored, and read each expert from its place. IS NOT: reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from flashrt.weights.formats.stored import Tensor

# Endings of stacked tensors; for each matrix of an expert in it, from the first row on, the ending
# that it has where every expert is stored by itself: as transformers fuses them, and as Granite was
# released.
_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_HALVES = {
    f"{block}.experts": tuple(f"{block}.experts.{{}}.{name}.weight" for name in names)
    for block, names in (
        ("mlp", _GATE_UP_DOWN),
        ("block_sparse_moe", _GATE_UP_DOWN),
        ("feed_forward", ("w1", "w3", "w2")),
    )
}
_STACKED: Mapping[str, tuple[str, ...]] = {
    **{f"{at}.gate_up_proj": names[:2] for at, names in _HALVES.items()},
    **{f"{at}.down_proj": names[2:] for at, names in _HALVES.items()},
    "mlp.experts.gate_proj": _HALVES["mlp.experts"][:1],  # of GGUF files
    "mlp.experts.up_proj": _HALVES["mlp.experts"][1:2],
    "block_sparse_moe.input_linear.weight": _HALVES["block_sparse_moe.experts"][:2],
    "block_sparse_moe.output_linear.weight": _HALVES["block_sparse_moe.experts"][2:],
}
_MOST_EXPERTS = 1 << 14  # beyond it a damaged shape would only cost memory


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor [n, ...] as n tensors, one behind the other in its file."""
    n, *rest = tensor.shape
    nbytes, shape = tensor.nbytes // n, tuple(rest)
    for i in range(n):
        name, offset = f"{tensor.stored_name}[{i}]", tensor.offset + i * nbytes
        yield replace(tensor, stored_name=name, shape=shape, offset=offset, nbytes=nbytes)


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of experts in a stacked one, by the names that they have where each is stored by
    itself; every other tensor as it is.
    """
    ending = next((e for e in _STACKED if name.endswith(f".{e}")), None)
    if ending is None or len(tensor.shape) != 3:
        return {name: tensor}
    n, rows, columns = tensor.shape
    names = _STACKED[ending]
    n_parts = n * len(names)
    is_whole = 0 < n <= _MOST_EXPERTS and not rows % len(names) and all(tensor.shape)
    if not is_whole or tensor.nbytes % n_parts:
        return {name: tensor}
    found: dict[str, Tensor] = {}
    before = name.removesuffix(ending)
    for expert, whole in enumerate(slices(tensor)):
        parts = [whole]
        if len(names) > 1:
            parts = list(slices(replace(whole, shape=(len(names), rows // len(names), columns))))
        found |= {before + n.format(expert): part for n, part in zip(names, parts, strict=True)}
    return found
