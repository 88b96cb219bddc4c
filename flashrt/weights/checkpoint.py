"""A Hugging Face checkpoint directory: configuration, tensor table, reads of tensor bytes.

IS: config.json + model.safetensors, or the shards named by model.safetensors.index.json. The
safetensors library validates each header against its file; bytes are then read by offset into a
buffer of the caller, because that library hands bfloat16 to numpy only as whole copies. IS NOT:
knowledge of what the tensors mean (rules), where they go (loader) or what else a path can be
(folder).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import safetensors

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable, shown
from flashrt.weights.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    folder_of,
    unfinished,
    without_weights,
)
from flashrt.weights.quantised import refuse_quantised
from flashrt.weights.stop_tokens import stop_tokens_of

GENERATION_FILE = "generation_config.json"
PREFIX, NESTED_PREFIX = "model.", "model.language_model."  # text only; the same when multimodal
IGNORED_PREFIX = "model.visual."  # the vision tower of a multimodal checkpoint
_MOST_CONFIG_NBYTES = 8 << 20
_MOST_INDEX_NBYTES = 64 << 20  # some 500,000 tensors
_MOST_HEADER_NBYTES = 100_000_000  # as the safetensors library has it
_POINTER = b"version https://git-lfs"  # begins a file of git-lfs that was not pulled


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: bytes [offset, offset + nbytes) of a file. `dtype` is safetensors' code,
    e.g. BF16.
    """

    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(slots=True)
class Checkpoint:
    """An open checkpoint. `tensors` go by canonical names: `model.language_model.x` and `model.x`
    are both `model.x`. `stop_tokens` end what the model writes; `load` adds the tokenizer's.
    """

    path: Path
    config: Mapping[str, object]
    generation: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    stop_tokens: tuple[int, ...] = ()
    _files: dict[Path, FileIO] = field(default_factory=dict, repr=False)

    def read_into(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """Read len(out) bytes of a tensor, from byte `first_byte` on. Raises CheckpointError."""
        try:
            if tensor.path not in self._files:
                self._files[tensor.path] = tensor.path.open("rb", buffering=0)
            file = self._files[tensor.path]
            file.seek(tensor.offset + first_byte)
            done = 0
            while done < len(out):
                count = file.readinto(out[done:])
                if not count:
                    raise CheckpointError(
                        f"{tensor.path}: ends inside {printable(tensor.stored_name)}; fetch the "
                        "file again"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{tensor.path}: cannot read {printable(tensor.stored_name)}: {error}"
            ) from error

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration and the headers of all weight files; no tensor is read yet.

    Raises CheckpointError if the path is no checkpoint (see folder), a file is missing, truncated
    or unreadable, a name occurs twice, or the weights are quantised.
    """
    root = folder_of(path)
    config = read_json(root / CONFIG_FILE)
    generation = read_json(root / GENERATION_FILE) if (root / GENERATION_FILE).is_file() else {}
    stored: dict[str, Tensor] = {}
    for file, wanted in _weight_files(root).items():
        tensors = _read_header(file)
        if wanted is not None and (lost := sorted(wanted - tensors.keys())):
            raise CheckpointError(
                f"{file}: {INDEX_FILE} promises {listed(lost)}, which the file does not hold; "
                "fetch both again"
            )
        if twice := sorted(tensors.keys() & stored.keys()):
            raise CheckpointError(
                f"{file}: {listed(twice)} was already in {stored[twice[0]].path.name}; "
                "remove one of the files"
            )
        stored |= tensors
    refuse_quantised(root, config, ((t.stored_name, t.dtype) for t in stored.values()))
    stop = stop_tokens_of(
        ((str(root / GENERATION_FILE), generation), (str(root / CONFIG_FILE), config))
    )
    return Checkpoint(root, config, generation, _canonical(root, stored), stop)


def read_json(path: Path, most_nbytes: int = _MOST_CONFIG_NBYTES) -> Mapping[str, object]:
    """A JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        if path.stat().st_size > most_nbytes:
            raise CheckpointError(f"{path}: larger than {most_nbytes >> 20} MiB; fetch it again")
        value = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; is {path.parent} a Hugging Face checkpoint?"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes) -> object:
    """A JSON value. Raises ValueError; also for a key that occurs twice, and for deep nesting."""
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("objects or lists are nested too deeply") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{listed([n for n in made if counts[n] > 1])} occurs twice")
    return made


def _weight_files(root: Path) -> dict[Path, Collection[str] | None]:
    """Weight files, each with the tensor names that the index promises (None without an index)."""
    if (root / WEIGHTS_FILE).is_file():
        return {root / WEIGHTS_FILE: None}
    if not (root / INDEX_FILE).is_file():
        raise CheckpointError(without_weights(root))
    placed = read_json(root / INDEX_FILE, _MOST_INDEX_NBYTES).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{root / INDEX_FILE}: has no weight_map; fetch it again")
    files: dict[Path, set[str]] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{root / INDEX_FILE}: {printable(name)} is in {shown(file)}; a plain file name is "
                "expected"
            )
        files.setdefault(root / file, set()).add(name)
    if lost := sorted(f.name for f in files if not f.is_file()):
        raise CheckpointError(
            f"{root}: shards missing: {listed(lost)}; fetch them again{unfinished(root)}"
        )
    return dict(files)


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensor table of one file, after the safetensors library has checked offsets, shapes and
    file size.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{path}: a pointer of git-lfs in place of the weights; run `git lfs pull`"
                )
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            header_nbytes = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(header_nbytes, _MOST_HEADER_NBYTES)))
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no object; fetch it again")
    metadata = header.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.get("format") == "mlx":
        raise CheckpointError(
            f"{path}: written by MLX, which stores norms and convolutions differently; take the "
            "model that it was converted from"
        )
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = Tensor(
            name, entry["dtype"], shape, path, 8 + header_nbytes + start, stop - start
        )
    return tensors


def _canonical(root: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith(IGNORED_PREFIX):
            continue
        short = (
            PREFIX + name.removeprefix(NESTED_PREFIX) if name.startswith(NESTED_PREFIX) else name
        )
        if short in tensors:
            raise CheckpointError(
                f"{root}: both {printable(tensors[short].stored_name)} and {printable(name)} are "
                "there; keep one"
            )
        tensors[short] = tensor
    return tensors
