"""A Hugging Face checkpoint directory: configuration, tensor table, reads of tensor bytes.

IS: config.json + model.safetensors, or the shards named by model.safetensors.index.json. The
safetensors library validates each header against its file; bytes are then read by offset into
a buffer of the caller, because that library hands bfloat16 to numpy only as whole copies.
IS NOT: knowledge of what the tensors mean (`rules`) or where they go (`loader`).
Called by: engine (load), loader, cli (inspect).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import safetensors

from flashrt.base.errors import CheckpointError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PREFIX, NESTED_PREFIX = "model.", "model.language_model."  # text only; the same when multimodal
IGNORED_PREFIX = "model.visual."  # the vision tower of a multimodal checkpoint


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
    are both `model.x`.
    """

    path: Path
    config: Mapping[str, object]
    generation: Mapping[str, object]
    tensors: Mapping[str, Tensor]
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
                        f"{tensor.path}: ends inside {tensor.stored_name}; fetch the file again"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{tensor.path}: cannot read {tensor.stored_name}: {error}"
            ) from error

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-sequence ids of generation_config.json, else of config.json; empty if neither
        names one.
        """
        nested = self.config.get("text_config")
        for place in (self.generation, self.config, nested if isinstance(nested, Mapping) else {}):
            ids = place.get("eos_token_id")
            if ids is not None:
                listed = ids if isinstance(ids, list) else [ids]
                return tuple(i for i in listed if isinstance(i, int))
        return ()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the configuration and the headers of all weight files; no tensor is read yet.

    Raises CheckpointError if a file is missing, truncated or unreadable, or a name occurs twice.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(
            f"{root}: no such directory; give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = read_json(root / CONFIG_FILE)
    generation = read_json(root / GENERATION_FILE) if (root / GENERATION_FILE).is_file() else {}
    stored: dict[str, Tensor] = {}
    for file, wanted in _weight_files(root).items():
        tensors = _read_header(file)
        if wanted is not None and (lost := sorted(wanted - tensors.keys())):
            raise CheckpointError(
                f"{file}: {INDEX_FILE} promises {_listed(lost)}, which the file does not hold"
            )
        if twice := sorted(tensors.keys() & stored.keys()):
            raise CheckpointError(
                f"{file}: {_listed(twice)} was already in {stored[twice[0]].path.name}"
            )
        stored |= tensors
    return Checkpoint(root, config, generation, _canonical(root, stored))


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; is {path.parent} a Hugging Face checkpoint?"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _weight_files(root: Path) -> dict[Path, Collection[str] | None]:
    """Weight files, each with the tensor names that the index promises (None without an index)."""
    if (root / WEIGHTS_FILE).is_file():
        return {root / WEIGHTS_FILE: None}
    if not (root / INDEX_FILE).is_file():
        found = sorted(p.name for p in root.glob("*.bin"))
        hint = f"; found {_listed(found)}: convert to safetensors first" if found else ""
        raise CheckpointError(f"{root}: neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    placed = read_json(root / INDEX_FILE).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{root / INDEX_FILE}: has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{root / INDEX_FILE}: {name} is in {file!r}; a plain file name is expected"
            )
        files.setdefault(root / file, set()).add(name)
    if lost := sorted(f.name for f in files if not f.is_file()):
        raise CheckpointError(f"{root}: shards missing: {_listed(lost)}; fetch them again")
    return dict(files)


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensor table of one file, after the safetensors library has checked offsets, shapes and
    file size.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            header_nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_nbytes))
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    header.pop("__metadata__", None)
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
                f"{root}: both {tensors[short].stored_name} and {name} are there; keep one"
            )
        tensors[short] = tensor
    return tensors


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
