"""`flashrt inspect`: what a checkpoint, a robot policy or a capsule file holds; if it is whole.

IS: a reader of headers, and of all bytes with `--verify`. IS NOT: loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed
from flashrt.capsule import file
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.plan import lay_out, lay_out_policy, model_of, policy_of
from flashrt.core.groups import Planes
from flashrt.core.region import Region
from flashrt.engine.actions import STATISTICS, check_statistics
from flashrt.engine.engine import Layout, max_positions_of
from flashrt.load import DRAFT_HEAD_TENSOR, text_of
from flashrt.models import Model
from flashrt.models.actions import ActionModel
from flashrt.models.policies import is_policy
from flashrt.models.prefix import TASK, PrefixModel
from flashrt.view.units import bytes_text
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.folder import is_part_of_model
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.stored import Rows
from flashrt.weights.loader import load
from flashrt.weights.opening import open_weights
from flashrt.weights.rules import WeightRule

CONTEXTS = (2048, 8192, 32768, 131072)


def inspect(path: Path, is_verified: bool, as_json: bool) -> int:
    """The command: a directory is a checkpoint or a policy, a file is a capsule."""
    is_checkpoint = path.is_dir() or is_part_of_model(path)
    found = _opened(path, is_verified) if is_checkpoint else _capsule(path, is_verified)
    if as_json:
        console.print_json(found)
    else:
        _SHOW[found["kind"]](found)
    return 0


def _opened(path: Path, is_verified: bool) -> dict[str, Any]:
    checkpoint = open_weights(path)
    if is_policy(checkpoint.config):
        return _policy(path, checkpoint, is_verified)
    return _checkpoint(path, checkpoint, is_verified)


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """What lies in the weight files."""
    tensors = checkpoint.tensors.values()
    return {
        "tensors": len(tensors),
        "tensor_bytes": sum(t.nbytes for t in tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors)),
        "files": sorted({t.path.name for t in tensors}),
    }


def _sizes(planned: Layout) -> dict[str, int]:
    """Bytes, of one lane."""
    lane = planned.arena.lanes[0]
    return {
        "weights_bytes": planned.weights.nbytes,
        "fixed_bytes": lane.fixed.nbytes,
        "rows_bytes": lane.rows.nbytes,
        "arena_bytes": planned.arena.nbytes,
        "total_bytes": planned.arena.nbytes + planned.weights.nbytes,
    }


def _verified(
    rules: Sequence[WeightRule], checkpoint: Checkpoint, look: Callable[[Region, Rows], None]
) -> dict[str, Any]:
    """Every value read and shown to `look`. Raises CheckpointError where one is NaN or infinite."""
    bad: list[str] = []

    def check(region: Region, first_row: int, rows: Rows) -> None:
        look(region, rows)
        if not np.isfinite(dequantise(region.dtype, region.groups, rows)).all():
            bad.append(f"{region.name} from row {first_row}")

    with console.progress_bars() as progress:
        report = load(rules, checkpoint, check, progress)
    if bad:
        raise CheckpointError(f"{checkpoint.path}: NaN or infinity in {listed(bad)}")
    return {"digest": report.digest, "bytes": report.source_nbytes}


# -- checkpoints ----------------------------------------------------------------------------------


def _checkpoint(path: Path, checkpoint: Checkpoint, is_verified: bool) -> dict[str, Any]:
    model, draft_head = _model(checkpoint)
    options = EngineOptions(draft=draft_head == _WITH_HEAD)
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(path),
        "model_type": checkpoint.config.get("model_type"),
        "config": _scalars(checkpoint.config),
        "layers": dict(Counter(_layer_types(checkpoint.config))),
        **_stored(checkpoint),
        "has_tokenizer": text_of(checkpoint).tokenizer is not None,
        "has_draft_head": DRAFT_HEAD_TENSOR in checkpoint.tensors,
        "draft_head": draft_head,
        "stop_tokens": checkpoint.stop_tokens,
        "notes": checkpoint.notes,
        "memory": [_memory(checkpoint, context, options) for context in CONTEXTS],
    }
    if is_verified:
        found["verified"] = _verified(model.weights, checkpoint, lambda region, rows: None)
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
    return {"positions": context, **_sizes(planned)}


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
    facts = [
        ["model type", str(found["model_type"])],
        ["layers", layers],
        *([name, str(found["config"][name])] for name in _SHOWN if name in found["config"]),
        *_stored_facts(found),
        ["tokenizer", "yes" if found["has_tokenizer"] else "no: token ids only"],
        ["draft head", found["draft_head"]],
        ["stop tokens", listed(found["stop_tokens"]) or "none"],
        *(["note", note] for note in found["notes"]),
    ]
    screen.print(console.table(f"Checkpoint {found['path']}", ("", "~"), facts))
    columns = ("context", "weights", "fixed state", "rows", "arena", "total")
    _show_memory("Memory by context length (one lane, no room for capsules)", columns, found)
    _show_verified(found)


_MEMORY_KEYS = ("weights_bytes", "fixed_bytes", "rows_bytes", "arena_bytes", "total_bytes")


def _stored_facts(found: Mapping[str, Any]) -> list[list[str]]:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    return [
        ["tensors", f"{found['tensors']} ({dtypes}) in {listed(found['files'])}"],
        ["parameters", f"{found['parameters']:,}, {bytes_text(found['tensor_bytes'])}"],
    ]


def _show_memory(title: str, columns: Sequence[str], found: Mapping[str, Any]) -> None:
    rows = [
        [f"{m['positions']:,}", *(bytes_text(m[k]) for k in _MEMORY_KEYS)] for m in found["memory"]
    ]
    console.screen().print(console.table(title, [f">{c}" for c in columns], rows))


def _show_verified(found: Mapping[str, Any]) -> None:
    if "verified" in found:
        verified = found["verified"]
        console.screen().print(
            console.styled("verified", "green"),
            f": {bytes_text(verified['bytes'])} fit the model, all finite; xxh3-128 "
            f"{verified['digest']}",
        )


# -- robot policies -------------------------------------------------------------------------------


def _policy(path: Path, checkpoint: Checkpoint, is_verified: bool) -> dict[str, Any]:
    stored = _stored(checkpoint)
    policy, source = policy_of(checkpoint, EngineOptions())
    has_tokenizer, tokenizer = _tokenizer(policy)
    c, scaling = policy.config, policy.scaling
    planned = lay_out_policy(policy, EngineOptions(pool_bytes=0))
    found: dict[str, Any] = {
        "kind": "policy",
        "path": str(path),
        "type": checkpoint.config.get("type", checkpoint.config.get("model_type")),
        "config": _scalars(checkpoint.config),
        "observation": _observation(policy),
        "action_dim": c.action_dim,
        "chunk_size": c.chunk_size,
        "n_action_steps": c.n_action_steps,
        "num_inference_steps": c.num_inference_steps,
        "stacks": {name: dict(sizes) for name, sizes in policy.stacks.items()},
        "normalization": {} if scaling is None else dict(scaling.modes),
        "processor_files": [] if scaling is None else [file.name for file in scaling.files],
        **stored,
        "has_tokenizer": has_tokenizer,
        "tokenizer": tokenizer,
        "notes": [*checkpoint.notes, *_note_on_unused(checkpoint, source)],
        "memory": [{"positions": max_positions_of(policy), **_sizes(planned)}],
    }
    if is_verified:
        if has_tokenizer is False:
            raise CheckpointError(tokenizer)  # as a load would
        found["verified"] = _verify_policy(policy, source)
    return found


def _tokenizer(policy: ActionModel) -> tuple[bool | None, str]:
    """Whether there is one that can be used, None where none is needed; and which, or why not."""
    if not isinstance(policy, PrefixModel):
        return None, "none needed"
    try:
        return True, str(policy.tokenizer().path)
    except CheckpointError as error:
        return False, str(error)


def _observation(policy: ActionModel) -> dict[str, dict[str, Any]]:
    """Parts by name, as an observation has them; one vector where they have no names."""
    if not policy.parts:
        return {"observation": {"kind": "vector", "shape": [policy.config.observation_dim]}}
    found: dict[str, dict[str, Any]] = {}
    for part in policy.parts:
        if part.name == TASK:
            found[part.name] = {"kind": "text", "max_tokens": policy.config.tokenizer_max_length}
        else:
            kind = "image" if len(part.shape) == 3 else "vector"
            found[part.name] = {"kind": kind, "shape": list(part.shape)}
    return found


def _note_on_unused(checkpoint: Checkpoint, source: Checkpoint) -> list[str]:
    used = {(t.path, t.stored_name) for t in source.tensors.values()}
    unused = [
        t.stored_name for t in checkpoint.tensors.values() if (t.path, t.stored_name) not in used
    ]
    if not unused:
        return []
    return [f"{len(unused)} tensors are not used to act, and not loaded: {listed(sorted(unused))}"]


def _verify_policy(policy: ActionModel, source: Checkpoint) -> dict[str, Any]:
    """Every value read. Raises CheckpointError where one is NaN or infinite, or is a statistic that
    divides by 0.
    """
    statistics: dict[str, NDArray[np.float32]] = {}

    def look(region: Region, rows: Rows) -> None:
        if region.name.startswith(STATISTICS) and not isinstance(rows, Planes):
            statistics[region.name] = rows.astype(np.float32)

    found = _verified(policy.weights, source, look)
    check_statistics(policy, statistics)
    return found


def _show_policy(found: Mapping[str, Any]) -> None:
    screen = console.screen()
    tokenizer, n_steps = found["tokenizer"], found["num_inference_steps"]
    facts = [
        ["type", str(found["type"])],
        *([name, _seen_as(about)] for name, about in found["observation"].items()),
        ["action", f"{found['action_dim']} numbers"],
        [
            "chunk",
            f"{found['chunk_size']} actions, {found['n_action_steps']} of them executed; made "
            + (f"in {n_steps} steps" if n_steps > 1 else "at once"),
        ],
        *(
            [name.replace("_", " "), ", ".join(f"{k} {v}" for k, v in sizes.items())]
            for name, sizes in found["stacks"].items()
        ),
        [
            "normalization",
            ", ".join(f"{name} {mode}" for name, mode in found["normalization"].items())
            or "by statistics among the tensors",
        ],
        ["processor files", ", ".join(found["processor_files"]) or "none needed"],
        *_stored_facts(found),
        ["tokenizer", f"not usable: {tokenizer}" if found["has_tokenizer"] is False else tokenizer],
        *(["note", note] for note in found["notes"]),
    ]
    screen.print(console.table(f"Policy {found['path']}", ("", "~"), facts))
    columns = ("rows of a lane", "weights", "fixed state", "rows", "arena", "total")
    _show_memory("Memory (one lane, no room for capsules)", columns, found)
    _show_verified(found)


def _seen_as(about: Mapping[str, Any]) -> str:
    if about["kind"] == "text":
        return f"text, {about['max_tokens']} tokens at most"
    if about["kind"] == "image":
        return f"image, {' x '.join(map(str, about['shape']))}"
    return f"{about['shape'][0]} numbers"


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


_SHOW: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "checkpoint": _show_checkpoint,
    "policy": _show_policy,
    "capsule": _show_capsule,
}
