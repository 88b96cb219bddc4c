"""A quantised checkpoint of a plain one, as compressed-tensors stores it: `pack-quantized`.

IS: the choice of matrices, the files, and a directory that appears under its name when it is whole.
transformers, vLLM and flashrt read it. IS NOT: the quantiser (quantise).

Matrices of the layers are quantised, as in the official FP8 checkpoints: not embeddings, heads,
norms, convolutions, routers, vision towers, nor the two small projections of a delta rule's gates.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.files import opened, read_into, sync_folder
from flashrt.base.messages import listed, printable, shown
from flashrt.base.system import write_at
from flashrt.base.tensor_file import METADATA, MOST_HEADER_NBYTES, StoredTensor, read_table
from flashrt.core.backend import Progress
from flashrt.core.groups import Planes
from flashrt.core.region import DType
from flashrt.weights.checkpoint import open_checkpoint, read_json
from flashrt.weights.experts import apart
from flashrt.weights.folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from flashrt.weights.formats.detect import is_quantised
from flashrt.weights.formats.quantise import TARGETS, Loss, Target, quantise
from flashrt.weights.formats.stored import Tensor

SHARD_NBYTES = 4 << 30
CHUNK_NBYTES = 16 << 20
_MOST_COPIED = 256 << 20  # of one file beside the weights
_COPIED = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ".py")
_FLOATS: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)
}  # fmt: skip
_NBYTES = {"I64": 8, "I32": 4, "F16": 2}
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)\.weight")
_LEFT_OUT = {"in_proj_a", "in_proj_b", "in_proj_ba", "gate", "shared_expert_gate", "router"}
_VISION = re.compile(r"visual|vision|audio")


@dataclass(frozen=True, slots=True)
class _Out:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Job:
    """A tensor of the source, and what it becomes: itself, or words, scales and sizes."""

    name: str
    path: Path
    source: StoredTensor
    outs: tuple[_Out, ...]
    is_quantised: bool


def quantise_checkpoint(
    src: str | Path, dst: str | Path, weights: str = "int4", progress: Progress | None = None
) -> list[tuple[str, float]]:
    """Write a quantised checkpoint directory; gives names of quantised tensors and their errors.

    weights: int4 or int8; errors are relative, as in `Loss`. Raises CheckpointError if the source
    is not plain, the destination is taken, or the disk refuses; then nothing is left of it.
    """
    target, folder = TARGETS.get(weights), Path(dst).expanduser()
    if target is None:
        raise CheckpointError(f"weights {shown(weights)}: one of {listed(TARGETS)} is expected")
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: already exists; remove it or give another path")
    checkpoint = open_checkpoint(src)
    checkpoint.close()
    if is_quantised(checkpoint.tensors.values()):
        raise CheckpointError(
            f"{checkpoint.path}: its weights are quantised already; quantise the model that this "
            "one was made from"
        )
    jobs = _jobs(checkpoint.path, target)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _copy_others(checkpoint.path, partial)
        config = {**checkpoint.config, "quantization_config": _section(jobs, target)}
        _write_text(partial / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        losses = _write_shards(partial, jobs, target, progress)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return losses


# -- what becomes of each tensor ------------------------------------------------------------------


def is_chosen(name: str, shape: tuple[int, ...], size: int) -> bool:
    """Whether a tensor is a matrix of a layer that is quantised, in groups of `size`."""
    found = _LAYER.search(name)
    if found is None or len(shape) != 2 or shape[1] % size or not shape[0]:
        return False
    return found[1].rsplit(".", 1)[-1] not in _LEFT_OUT and not _VISION.search(name)


def _jobs(root: Path, target: Target) -> list[_Job]:
    jobs = []
    for path, name, tensor in _stored(root):
        is_matrix = name.endswith(".weight") and len(tensor.shape) == 2
        if is_matrix and tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {printable(name)} is {tensor.dtype}; matrices of BF16, F16 or F32 are "
                "quantised"
            )
        is_quantised = is_chosen(name, tensor.shape, target.groups.size)
        outs = (
            _packed(name.removesuffix(".weight"), tensor.shape, target)
            if is_quantised
            else (_Out(name, tensor.dtype, tensor.shape, tensor.nbytes),)
        )
        jobs.append(_Job(name, path, tensor, outs, is_quantised))
    if not any(job.is_quantised for job in jobs):
        raise CheckpointError(f"{root}: no matrix of a layer is there to be quantised")
    return jobs


def _stored(root: Path) -> Iterator[tuple[Path, str, StoredTensor]]:
    """All tensors by their stored names: those of vision towers too, which flashrt does not run; of
    stacked experts each by itself, as quantised checkpoints have them.
    """
    if (root / WEIGHTS_FILE).is_file():
        names = {WEIGHTS_FILE}
    else:
        placed = read_json(root / INDEX_FILE, MOST_HEADER_NBYTES)["weight_map"]
        assert isinstance(placed, dict)  # open_checkpoint has looked
        names = set(placed.values())
    for name in sorted(names):
        path = root / name
        try:
            with opened(path) as (handle, nbytes):
                table = read_table(handle, nbytes, MOST_HEADER_NBYTES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; fetch it again") from error
        for stored, tensor in sorted(table.tensors.items(), key=lambda item: item[1].offset):
            whole = Tensor(stored, tensor.dtype, tensor.shape, path, tensor.offset, tensor.nbytes)
            for own, part in apart(stored, whole).items():
                at = StoredTensor(part.dtype, part.shape, part.offset, part.nbytes)
                yield path, own, at


def _packed(module: str, shape: tuple[int, ...], target: Target) -> tuple[_Out, ...]:
    rows, columns = shape
    parts = {
        "weight_packed": ("I32", (rows, columns * target.bits // 32)),
        "weight_scale": ("F16", (rows, columns // target.groups.size)),
        "weight_shape": ("I64", (2,)),
    }
    return tuple(
        _Out(f"{module}.{part}", dtype, sizes, math.prod(sizes) * _NBYTES[dtype])
        for part, (dtype, sizes) in parts.items()
    )


def _section(jobs: Sequence[_Job], target: Target) -> dict[str, object]:
    """quantization_config of compressed-tensors."""
    scheme = {
        "num_bits": target.bits, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": target.groups.size, "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": scheme, "input_activations": None,
                "output_activations": None, "format": "pack-quantized",
            }
        },
        "ignore": _ignored(jobs),
        "kv_cache_scheme": None,
    }  # fmt: skip


def _ignored(jobs: Sequence[_Job]) -> list[str]:
    """Modules that stay plain. Patterns of what follows the layer, where all layers agree: one and
    the same layer goes by several names in multimodal and text-only models.
    """
    plain = [j.name.removesuffix(".weight") for j in jobs
             if not j.is_quantised and len(j.source.shape) > 1 and j.name.endswith(".weight")
             and "embed" not in j.name]  # fmt: skip
    chosen = {_tail(job.name) for job in jobs if job.is_quantised}
    found = {"lm_head": None}
    for module in plain:
        tail = _tail(f"{module}.weight")
        is_shared = tail is not None and tail not in chosen and not _VISION.search(module)
        found["re:.*" + re.escape(f".{tail}") + "$" if is_shared else module] = None
    return list(found)


def _tail(name: str) -> str | None:
    found = _LAYER.search(name)
    return None if found is None else re.sub(r"\.\d+\.", ".0.", found[1])


# -- files ----------------------------------------------------------------------------------------


def _copy_others(root: Path, partial: Path) -> None:
    """Tokenizer, templates, generation config, licence: small files that are not weights."""
    for path in sorted(root.iterdir()):
        is_wanted = path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        is_ours = path.name in (CONFIG_FILE, INDEX_FILE) or path.name.startswith(".")
        if is_wanted and not is_ours and path.is_file() and path.stat().st_size <= _MOST_COPIED:
            shutil.copyfile(path, partial / path.name)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_shards(
    partial: Path, jobs: Sequence[_Job], target: Target, progress: Progress | None
) -> list[tuple[str, float]]:
    shards = list(_shards(jobs))
    total, done = sum(job.source.nbytes for job in jobs), 0
    losses: list[tuple[str, float]] = []
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        is_only = len(shards) == 1
        name = WEIGHTS_FILE if is_only else f"model-{i:05}-of-{len(shards):05}.safetensors"
        with (partial / name).open("wb") as file:
            offsets = _write_header(file.fileno(), shard)
            for job in shard:
                placed |= {out.name: name for out in job.outs}
                loss = Loss()
                for nbytes in _write_tensor(file.fileno(), job, offsets, target, loss):
                    done += nbytes
                    if progress is not None:
                        progress("weights", done, total)
                if job.is_quantised:
                    losses.append((job.name, loss.relative))
            os.fsync(file.fileno())
    if len(shards) > 1:
        size = sum(out.nbytes for job in jobs for out in job.outs)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        _write_text(partial / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return losses


def _shards(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    shard: list[_Job] = []
    nbytes = 0
    for job in jobs:
        size = sum(out.nbytes for out in job.outs)
        if shard and nbytes + size > SHARD_NBYTES:
            yield shard
            shard, nbytes = [], 0
        shard.append(job)
        nbytes += size
    yield shard


def _write_header(handle: int, shard: Sequence[_Job]) -> dict[str, int]:
    """Where each tensor begins in the file; the widest elements first, so that all are aligned."""
    outs = [out for job in shard for out in job.outs]
    outs.sort(key=lambda o: (-_NBYTES.get(o.dtype, o.nbytes // max(1, math.prod(o.shape))), o.name))
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    at, offsets = 0, {}
    for out in outs:
        stop = at + out.nbytes
        header[out.name] = {"dtype": out.dtype, "shape": out.shape, "data_offsets": [at, stop]}
        offsets[out.name], at = at, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write_all(handle, len(text).to_bytes(8, "little") + text, 0)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _write_tensor(
    handle: int, job: _Job, offsets: dict[str, int], target: Target, loss: Loss
) -> Iterator[int]:
    """Writes what a tensor becomes, chunk by chunk; gives the bytes that each was read from."""
    source = job.source
    width = source.shape[1] if job.is_quantised else 1
    rows = source.shape[0] if job.is_quantised else source.nbytes
    row_nbytes = source.nbytes // rows if rows else 1
    step = max(1, CHUNK_NBYTES // row_nbytes)
    with opened(job.path) as (reading, _):
        for first in range(0, rows, step):
            n = min(step, rows - first)
            raw = np.empty(n * row_nbytes, np.uint8)
            read_into(reading, raw.data, source.offset + first * row_nbytes)
            if job.is_quantised:
                values = raw.view(_FLOATS[source.dtype]).reshape(n, width).astype(np.float32)
                with _named(job):
                    planes = quantise(values, target, loss)
                words, scales = _words(planes, target), planes.scales[0]
                for out, array in zip(job.outs, (words, scales), strict=False):
                    at = offsets[out.name] + first * (out.nbytes // rows)
                    _write_all(handle, array.reshape(-1).view(np.uint8).data, at)
            else:
                _write_all(handle, raw.data, offsets[job.name] + first)
            yield raw.nbytes
    if job.is_quantised:
        sizes = np.array(source.shape, np.int64)
        _write_all(handle, sizes.view(np.uint8).data, offsets[job.outs[2].name])


@contextlib.contextmanager
def _named(job: _Job) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{job.path}: {printable(job.name)}: {error}; fetch the file again, or take a whole "
            "model"
        ) from error


def _words(planes: Planes, target: Target) -> NDArray[np.generic]:
    """Codes as compressed-tensors packs them: unsigned, the first one in the lowest bits."""
    if target.dtype is DType.U4:
        codes = planes.codes.view(np.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4
    return planes.codes.view(np.uint8) ^ 0x80


def _write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = write_at(handle, view, offset)
        view, offset = view[count:], offset + count
