"""`flashrt inspect`: what a checkpoint directory or a capsule file holds, and whether it is whole.

IS: a reader of headers, and of all bytes with `--verify`. IS NOT: loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed
from flashrt.capsule import file
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.plan import lay_out, model_of
from flashrt.core.region import Region
from flashrt.load import DRAFT_HEAD_TENSOR, text_of
from flashrt.models import Model
from flashrt.view.units import bytes_text
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.folder import is_part_of_model
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.stored import Rows
from flashrt.weights.loader import load
from flashrt.weights.opening import open_weights

CONTEXTS = (2048, 8192, 32768, 131072)


def inspect(path: Path, is_verified: bool, as_json: bool) -> int:
    """The command: a directory is a checkpoint, a file is a capsule."""
    is_checkpoint = path.is_dir() or is_part_of_model(path)
    found = _checkpoint(path, is_verified) if is_checkpoint else _capsule(path, is_verified)
    if as_json:
        console.print_json(found)
    elif is_checkpoint:
        _show_checkpoint(found)
    else:
        _show_capsule(found)
    return 0


# -- checkpoints ----------------------------------------------------------------------------------


def _checkpoint(path: Path, is_verified: bool) -> dict[str, Any]:
    checkpoint = open_weights(path)
    model, draft_head = _model(checkpoint)
    options = EngineOptions(draft=draft_head == _WITH_HEAD)
    tensors = checkpoint.tensors.values()
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "model_type": checkpoint.config.get("model_type"),
        "config": _scalars(checkpoint.config),
        "layers": dict(Counter(_layer_types(checkpoint.config))),
        "tensors": len(tensors),
        "tensor_bytes": sum(t.nbytes for t in tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors)),
        "files": sorted({t.path.name for t in tensors}),
        "has_tokenizer": text_of(checkpoint).tokenizer is not None,
        "has_draft_head": DRAFT_HEAD_TENSOR in checkpoint.tensors,
        "draft_head": draft_head,
        "stop_tokens": checkpoint.stop_tokens,
        "notes": checkpoint.notes,
        "memory": [_memory(checkpoint, context, options) for context in CONTEXTS],
    }
    if is_verified:
        found["verified"] = _verify_checkpoint(checkpoint, model)
    return found


_WITH_HEAD, _WITHOUT_HEAD = "yes", "no"


def _model(checkpoint: Checkpoint) -> tuple[Model, str]:
    """The model, with its draft head where that can be run; and whether it can, or why not."""
    try:
        model = model_of(checkpoint, EngineOptions())
    except CheckpointError as error:
        if DRAFT_HEAD_TENSOR not in checkpoint.tensors:
            raise
        try:
            return model_of(checkpoint, EngineOptions(draft=False)), f"not usable: {error}"
        except CheckpointError:
            raise error from None
    return model, _WITH_HEAD if DRAFT_HEAD_TENSOR in checkpoint.tensors else _WITHOUT_HEAD


def _memory(checkpoint: Checkpoint, context: int, options: EngineOptions) -> dict[str, int]:
    """Bytes at a context length, one lane, no room for capsules."""
    at_context = replace(options, max_positions=context, pool_bytes=0)
    planned = lay_out(model_of(checkpoint, at_context), at_context)
    lane = planned.arena.lanes[0]
    return {
        "positions": context,
        "weights_bytes": planned.weights.nbytes,
        "fixed_bytes": lane.fixed.nbytes,
        "rows_bytes": lane.rows.nbytes,
        "arena_bytes": planned.arena.nbytes,
        "total_bytes": planned.arena.nbytes + planned.weights.nbytes,
    }


def _verify_checkpoint(checkpoint: Checkpoint, model: Model) -> dict[str, Any]:
    """Every value read. Raises CheckpointError where one is NaN or infinite."""
    bad: list[str] = []

    def check(region: Region, first_row: int, rows: Rows) -> None:
        if not np.isfinite(dequantise(region.dtype, region.groups, rows)).all():
            bad.append(f"{region.name} from row {first_row}")

    with console.progress_bars() as progress:
        report = load(model.weights, checkpoint, check, progress)
    if bad:
        raise CheckpointError(f"{checkpoint.path}: NaN or infinity in {listed(bad)}")
    return {"digest": report.digest, "bytes": report.source_nbytes}


def _layer_types(config: Mapping[str, object]) -> list[str]:
    nested = config.get("text_config")
    layers = (nested if isinstance(nested, Mapping) else config).get("layer_types")
    return [str(kind) for kind in layers] if isinstance(layers, list) else []


def _scalars(config: Mapping[str, object]) -> dict[str, object]:
    nested = config.get("text_config")
    flat = {**config, **(nested if isinstance(nested, Mapping) else {})}
    return {k: v for k, v in flat.items() if isinstance(v, str | int | float | bool)}


_SHOWN = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "vocab_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim", "tie_word_embeddings",
)  # fmt: skip


def _show_checkpoint(found: Mapping[str, Any]) -> None:
    screen = console.screen()
    layers = ", ".join(f"{count} {kind}" for kind, count in found["layers"].items())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    facts = [
        ["model type", str(found["model_type"])],
        ["layers", layers],
        *([name, str(found["config"][name])] for name in _SHOWN if name in found["config"]),
        ["tensors", f"{found['tensors']} ({dtypes}) in {listed(found['files'])}"],
        ["parameters", f"{found['parameters']:,}, {bytes_text(found['tensor_bytes'])}"],
        ["tokenizer", "yes" if found["has_tokenizer"] else "no: token ids only"],
        ["draft head", found["draft_head"]],
        ["stop tokens", listed(found["stop_tokens"]) or "none"],
        *(["note", note] for note in found["notes"]),
    ]
    screen.print(console.table(f"Checkpoint {found['path']}", ("", "~"), facts))
    columns = ("context", "weights", "fixed state", "rows", "arena", "total")
    rows = [
        [f"{m['positions']:,}", *(bytes_text(m[k]) for k in _MEMORY_KEYS)] for m in found["memory"]
    ]
    title = "Memory by context length (one lane, no room for capsules)"
    screen.print(console.table(title, [f">{c}" for c in columns], rows))
    if "verified" in found:
        verified = found["verified"]
        screen.print(
            console.styled("verified", "green"),
            f": {bytes_text(verified['bytes'])} fit the model, all finite; xxh3-128 "
            f"{verified['digest']}",
        )


_MEMORY_KEYS = ("weights_bytes", "fixed_bytes", "rows_bytes", "arena_bytes", "total_bytes")


# -- capsules -------------------------------------------------------------------------------------


def _capsule(path: Path, is_verified: bool) -> dict[str, Any]:
    header = file.read_header(path)
    if is_verified:
        file.read_tensors(header)
    return {
        "kind": "capsule",
        "path": str(path),
        "name": header.name,
        "position": header.position,
        "fingerprint": header.fingerprint,
        "digest": header.digest,
        "parent_digest": header.parent_digest,
        "tensor_bytes": header.nbytes,
        "tensors": [
            {
                "name": name,
                "shape": shape,
                "bytes": int(np.prod(shape)),
                "xxh3_128": header.sums[name],
            }
            for name, (shape, _) in header.table.items()
        ],
        "is_verified": is_verified,
    }


def _show_capsule(found: Mapping[str, Any]) -> None:
    screen = console.screen()
    facts = [
        ["name", found["name"] or "none"],
        ["position", f"{found['position']:,}"],
        ["digest", found["digest"]],
        ["parent digest", found["parent_digest"] or "none"],
        ["fingerprint", found["fingerprint"]],
        ["bytes", f"{found['tensor_bytes']:,} ({bytes_text(found['tensor_bytes'])})"],
    ]
    screen.print(console.table(f"Capsule {found['path']}", ("", "~"), facts))
    rows = [
        [t["name"], " x ".join(map(str, t["shape"])), f"{t['bytes']:,}", t["xxh3_128"]]
        for t in found["tensors"]
    ]
    screen.print(console.table("Tensors", ("tensor", "stored as", ">bytes", "xxh3-128"), rows))
    if found["is_verified"]:
        screen.print(console.styled("verified", "green"), ": every tensor matches its checksum")
    else:
        screen.print("the header matches its checksum; --verify checks every tensor too")
