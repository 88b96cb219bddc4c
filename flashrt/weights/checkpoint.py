"""A Hugging Face checkpoint directory: configuration, tensor table, reads of tensor bytes.

IS: config.json + model.safetensors, or the shards named by model.safetensors.index.json. A header
is checked against its file; bytes are then read by offset into a buffer of the caller. IS NOT:
knowledge of what the tensors mean (rules), where they go (loader) or what else a path can be
(folder).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.files import opened, read_file, read_into
from flashrt.base.messages import listed, printable, shown
from flashrt.base.system import read_at
from flashrt.base.tensor_file import MOST_HEADER_NBYTES, parse_json, read_table
from flashrt.weights.experts import apart
from flashrt.weights.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    folder_of,
    unfinished,
    without_weights,
)
from flashrt.weights.formats.detect import (
    activation_scales,
    is_quantised,
    names_used,
    stored_matrix,
)
from flashrt.weights.formats.quantisation import SIDE_FILE, Quantisation, quantisation_of
from flashrt.weights.formats.stored import (
    PLAIN_DTYPES,
    PlainArray,
    PlainMatrix,
    StoredArray,
    StoredMatrix,
    Tensor,
)
from flashrt.weights.rules import Source, Stored, in_bfloat16
from flashrt.weights.stop_tokens import stop_tokens_of

GENERATION_FILE = "generation_config.json"
PREFIX, NESTED_PREFIX = "model.", "model.language_model."  # text only; the same when multimodal
BACKBONE_PREFIX = "backbone."  # for `model.`, in files of Nemotron-H
TOWER_PREFIX = "model.visual."  # the vision tower of a multimodal checkpoint
IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # of old exports: what the config says anyway
_MOST_CONFIG_NBYTES = 8 << 20
_MOST_INDEX_NBYTES = 64 << 20  # some 500,000 tensors
_POINTER = b"version https://git-lfs"  # begins a file of git-lfs that was not pulled


@dataclass(slots=True)
class Checkpoint:
    """An open checkpoint. `tensors` go by canonical names: `model.language_model.x`, `backbone.x`
    and `model.x` are all `model.x`, and experts that are stored stacked are a tensor each (see
    `experts`). `stop_tokens` end what the model writes; `load` adds the tokenizer's. `notes`: what
    a user should know of it. `quantisation`: what its configuration says of weights that are stored
    as codes. `tower`: tensors of the vision tower, by their names in it.
    """

    path: Path
    config: Mapping[str, object]
    generation: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    stop_tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    quantisation: Quantisation | None = None
    tower: Mapping[str, Tensor] = field(default_factory=dict)
    _handles: dict[Path, int] = field(default_factory=dict, repr=False)
    _files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def matrix(self, name: str) -> StoredMatrix | None:
        """The matrix of a canonical name, in whatever format it is stored; None if there is none.

        Raises CheckpointError where its format is unknown or its tensors do not fit each other.
        """
        if (coded := stored_matrix(self.tensors, name, self.quantisation)) is not None:
            return coded
        tensor = self.tensors.get(name)
        is_plain = tensor is not None and tensor.dtype in PLAIN_DTYPES and len(tensor.shape) == 2
        return PlainMatrix(tensor) if tensor is not None and is_plain else None

    def array(self, name: str) -> StoredArray | None:
        """The array of a canonical name, None if there is none."""
        tensor = self.tensors.get(name)
        is_plain = tensor is not None and tensor.dtype in PLAIN_DTYPES
        return PlainArray(tensor) if tensor is not None and is_plain else None

    def stored(self, source: Source) -> Stored:
        """How the matrix of a source is stored: for `rules.as_stored`. One that is missing counts
        as bfloat16, and is `loader.check_sources`' to report.
        """
        matrix = self.matrix(source.name)
        return in_bfloat16(source) if matrix is None else (matrix.dtype, matrix.groups)

    def names_behind(self, name: str) -> Collection[str]:
        """Canonical names of all tensors that a matrix or array may be stored in."""
        return names_used(name)

    def read_into(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """Read len(out) bytes of a tensor, from byte `first_byte` on. Raises CheckpointError."""
        try:
            read_into(self.file_of(tensor), out, tensor.offset + first_byte)
        except OSError as error:
            name = printable(tensor.stored_name)
            is_cut = error.errno == errno.ENODATA
            what = f"ends inside {name}" if is_cut else f"cannot read {name}: {error.strerror}"
            raise CheckpointError(f"{tensor.path}: {what}; fetch the file again") from error

    def file_of(self, tensor: Tensor) -> int:
        """A descriptor of the tensor's file, until `close`. Raises OSError."""
        if tensor.path not in self._handles:
            self._handles[tensor.path], _ = self._files.enter_context(opened(tensor.path))
        return self._handles[tensor.path]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._handles.clear()
        self._files.close()


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration and the headers of all weight files; no tensor is read yet.

    Raises CheckpointError if the path is no checkpoint (see folder), a file is missing, truncated
    or unreadable, a name occurs twice, or the weights are quantised in a way that is not read.
    """
    root = folder_of(path)
    config = read_json(root / CONFIG_FILE)
    generation = read_json(root / GENERATION_FILE) if (root / GENERATION_FILE).is_file() else {}
    stored: dict[str, Tensor] = {}
    for file, wanted in _weight_files(root).items():
        tensors = read_header(file)
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
    quantisation = _quantisation(root, config, stored.values())
    stop = stop_tokens_of(
        ((str(root / GENERATION_FILE), generation), (str(root / CONFIG_FILE), config))
    )
    tensors = _canonical(root, stored)
    notes = (*(quantisation.notes if quantisation else ()), *_note_on_activations(tensors))
    return Checkpoint(
        root, config, generation, tensors, stop, notes, quantisation, _tower_of(stored)
    )


def read_json(path: Path, most_nbytes: int = _MOST_CONFIG_NBYTES) -> Mapping[str, object]:
    """A JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        value = parse_json(read_file(path, most_nbytes))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; is {path.parent} a Hugging Face checkpoint?"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; fetch it again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _quantisation(
    root: Path, config: Mapping[str, object], stored: Collection[Tensor]
) -> Quantisation | None:
    """What the configuration says, where the tensors agree that weights are codes."""
    has_side = (root / SIDE_FILE).is_file()
    found = quantisation_of(root, config, read_json(root / SIDE_FILE) if has_side else None)
    if found is not None and not is_quantised(stored):
        raise CheckpointError(
            f"{found.place} says that the weights are quantised ({found.method}), but they are "
            "stored as plain numbers; if they are whole, remove it and load again"
        )
    return found


def _note_on_activations(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Scales that are there and are not used."""
    if not (names := activation_scales(tensors)):
        return ()
    return (
        f"{listed(names)} scale activations, or keys and values; flashrt computes with these as "
        "they are, and does not use the scales",
    )


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


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensor table of one file: offsets, shapes and the file's size agree."""
    try:
        with opened(path) as (handle, nbytes):
            start = memoryview(bytearray(len(_POINTER)))
            if start[: read_at(handle, start, 0)] == _POINTER:
                raise CheckpointError(
                    f"{path}: a pointer of git-lfs in place of the weights; run `git lfs pull`"
                )
            table = read_table(handle, nbytes, MOST_HEADER_NBYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from error
    if table.metadata.get("format") == "mlx":
        raise CheckpointError(
            f"{path}: written by MLX, which stores norms and convolutions differently; take the "
            "model that it was converted from"
        )
    return {
        name: Tensor(name, t.dtype, t.shape, path, t.offset, t.nbytes)
        for name, t in table.tensors.items()
    }


def _canonical(root: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith(TOWER_PREFIX) or name.endswith(IGNORED_SUFFIX):
            continue
        short = name
        for prefix in (NESTED_PREFIX, BACKBONE_PREFIX):
            if name.startswith(prefix):
                short = PREFIX + name.removeprefix(prefix)
        for own, part in apart(short, tensor).items():
            if own in tensors:
                raise CheckpointError(
                    f"{root}: both {printable(tensors[own].stored_name)} and "
                    f"{printable(part.stored_name)} are there; keep one"
                )
            tensors[own] = part
    return tensors


def _tower_of(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the vision tower, by their names in it."""
    return {
        name.removeprefix(TOWER_PREFIX): tensor
        for name, tensor in stored.items()
        if name.startswith(TOWER_PREFIX)
    }
