"""`flashrt inspect`: what a checkpoint directory or a capsule file holds, and whether it is whole.

IS: a reader of headers, of all bytes with `--verify`. IS NOT: loading. Called by: cli.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.capsule import file as blob
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.plan import lay_out, model_of
from flashrt.core.region import Region
from flashrt.load import DRAFT_HEAD_TENSOR
from flashrt.view.units import bytes_text
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.loader import load, resolve

CONTEXTS = (2048, 8192, 32768, 131072)


def inspect(path: Path, is_verified: bool, as_json: bool) -> int:
    """The command: a directory is a checkpoint, a file is a capsule."""
    found = _checkpoint(path, is_verified) if path.is_dir() else _capsule(path, is_verified)
    if as_json:
        console.print_json(found)
    elif path.is_dir():
        _show_checkpoint(found)
    else:
        _show_capsule(found)
    return 0


# -- checkpoints ----------------------------------------------------------------------------------


def _checkpoint(path: Path, is_verified: bool) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors.values()
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "model_type": checkpoint.config.get("model_type"),
        "config": _scalars(checkpoint.config),
        "layers": dict(Counter(_layer_types(checkpoint.config))),
        "tensors": len(tensors),
        "tensor_bytes": sum(t.nbytes for t in tensors),
        "parameters": sum(int(np.prod(t.shape)) for t in tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors)),
        "files": sorted({t.path.name for t in tensors}),
        "has_tokenizer": (path / "tokenizer.json").is_file(),
        "has_draft_head": DRAFT_HEAD_TENSOR in checkpoint.tensors,
        "stop_tokens": checkpoint.stop_tokens,
        "memory": [_memory(checkpoint, context) for context in CONTEXTS],
    }
    if is_verified:
        found["verified"] = _verify_checkpoint(checkpoint)
    return found


def _memory(checkpoint: Checkpoint, context: int) -> dict[str, int]:
    """Bytes at a context length, one lane, no room for capsules."""
    options = EngineOptions(max_positions=context, pool_bytes=0)
    planned = lay_out(model_of(checkpoint, options), options)
    lane = planned.arena.lanes[0]
    return {
        "positions": context,
        "weights_bytes": planned.weights.nbytes,
        "fixed_bytes": lane.fixed.nbytes,
        "rows_bytes": lane.rows.nbytes,
        "arena_bytes": planned.arena.nbytes,
        "total_bytes": planned.arena.nbytes + planned.weights.nbytes,
    }


def _verify_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Names, shapes and dtypes against the model; every value read. Raises CheckpointError."""
    rules = model_of(checkpoint, EngineOptions()).weights
    resolve(rules, checkpoint)
    bad: list[str] = []

    def look(region: Region, first_row: int, rows: NDArray[np.generic]) -> None:
        is_bits = rows.dtype == np.uint16  # bfloat16: all exponent bits set means inf or NaN
        finite = (rows & 0x7F80) != 0x7F80 if is_bits else np.isfinite(rows)  # type: ignore[operator]
        if not finite.all():
            bad.append(f"{region.name} from row {first_row}")

    with console.progress_bars() as progress:
        report = load(rules, checkpoint, look, progress)
    if bad:
        raise CheckpointError(f"{checkpoint.path}: NaN or infinity in {', '.join(bad)}")
    return {"digest": report.digest, "bytes": report.source_nbytes, "notes": report.notes}


def _layer_types(config: Mapping[str, object]) -> list[str]:
    nested = config.get("text_config")
    layers = (nested if isinstance(nested, Mapping) else config).get("layer_types")
    return [str(kind) for kind in layers] if isinstance(layers, list) else []


def _scalars(config: Mapping[str, object]) -> dict[str, object]:
    nested = config.get("text_config")
    flat = {**config, **(nested if isinstance(nested, Mapping) else {})}
    return {k: v for k, v in flat.items() if isinstance(v, str | int | float | bool)}


_SHOWN = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads",
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
        ["tensors", f"{found['tensors']} ({dtypes}) in {', '.join(found['files'])}"],
        ["parameters", f"{found['parameters']:,}, {bytes_text(found['tensor_bytes'])}"],
        ["tokenizer", "yes" if found["has_tokenizer"] else "no: token ids only"],
        ["draft head", "yes" if found["has_draft_head"] else "no"],
        ["stop tokens", ", ".join(map(str, found["stop_tokens"])) or "none"],
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
            f"[green]verified[/]: {bytes_text(verified['bytes'])} fit the model, all finite; "
            f"xxh3-128 {verified['digest']}"
        )
        for note in verified["notes"]:
            screen.print(f"note: {note}")


_MEMORY_KEYS = ("weights_bytes", "fixed_bytes", "rows_bytes", "arena_bytes", "total_bytes")


# -- capsules -------------------------------------------------------------------------------------


def _capsule(path: Path, is_verified: bool) -> dict[str, Any]:
    header = blob.read_header(path)
    if is_verified:
        blob.read_tensors(header)
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
        screen.print("[green]verified[/]: every tensor matches its checksum")
    else:
        screen.print("the header matches its checksum; --verify checks every tensor too")
