"""What a path that should be a checkpoint is, and what to do where it is something else.

IS: the directory that a path means, its weight files, and one error for each thing that people give
instead: a hub name, a file, a cache folder, an adapter, an unfinished download. IS NOT: reading of
any of them (checkpoint). Exists because "no such file" does not tell a user how to go on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable, shown

CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
WANTED = f"a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, or its shards, is needed"
_STATISTICS = ("policy_preprocessor_", "policy_postprocessor_")  # of LeRobot, beside the weights
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_GGUF = "a GGUF file is a checkpoint by itself: give the path of the file"
_PICKLED = (
    "PyTorch files, which flashrt does not read: load them with transformers and write safetensors "
    "with save_pretrained"
)


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint, `~` expanded; it has a config.json.

    Raises CheckpointError that says what the path is instead, and what to do.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CheckpointError(f"the path of a checkpoint is {shown(path)}; {WANTED}")
    try:
        root = Path(path).expanduser()
        if root.is_file():
            raise CheckpointError(_of_file(root))
        if not root.is_dir():
            raise CheckpointError(_of_nothing(root))
        if (root / ADAPTER_FILE).is_file():
            raise CheckpointError(_of_adapter(root))
        if not (root / CONFIG_FILE).is_file():
            raise CheckpointError(_without_config(root))
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))}: {error.strerror}; {WANTED}") from error
    except RuntimeError as error:  # of expanduser
        raise CheckpointError(f"{printable(str(path))}: no home for ~; {WANTED}") from error
    return root


def is_part_of_model(path: Path) -> bool:
    """Whether a file is one that people give in place of their checkpoint's directory."""
    names = (CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE, INDEX_FILE)
    return path.name in names or path.suffix in (".gguf", *_PICKLES)


def has_weights(root: Path) -> bool:
    """Whether a directory has a model's weights, or some of them, in any format."""
    others = _matching(root, ".gguf", *_PICKLES)
    return bool(_safetensors(root) or others) or (root / INDEX_FILE).is_file()


def without_weights(root: Path) -> str:
    """Why a directory has neither model.safetensors nor an index, and what to do."""
    found = _safetensors(root)
    shards = [name for name in found if "-of-" in name]
    if (root / WEIGHTS_FILE).is_symlink() or (root / INDEX_FILE).is_symlink():
        why = f"{WEIGHTS_FILE} is a link to a file that is gone: fetch the model again"
    elif unfinished(root):
        why = f"no {WEIGHTS_FILE} yet{unfinished(root)}"
    elif shards:
        why = f"{listed(shards)} without {INDEX_FILE}, which says what is in each: fetch it too"
    elif found:
        why = f"no {WEIGHTS_FILE}, but {listed(found)}; if that is the model, rename it"
    elif pickles := _matching(root, *_PICKLES):
        why = f"neither {WEIGHTS_FILE} nor {INDEX_FILE}; {listed(pickles)} are {_PICKLED}"
    elif gguf := _matching(root, ".gguf"):
        why = f"no {WEIGHTS_FILE}, but {listed(gguf)}; {_GGUF}"
    else:
        why = f"neither {WEIGHTS_FILE} nor {INDEX_FILE}: fetch the model's weights too"
    return f"{root}: {why}"


def unfinished(root: Path) -> str:
    """What to say where a download has left partial files; empty where there are none."""
    places = [root, root / ".cache" / "huggingface" / "download"]
    if root.parent.name == "snapshots":  # of a hub cache, where files wait in blobs/
        places.append(root.parent.parent / "blobs")
    count = sum(1 for place in places for _ in place.glob("*.incomplete"))
    return f"; {count} .incomplete files say that a download did not finish: run it again" * (
        count > 0
    )


def _of_file(file: Path) -> str:
    if file.suffix == ".gguf":
        return f"{file} is a GGUF file, which is loaded as it is; here {WANTED}"
    if file.suffix in _PICKLES:
        return f"{file} is one of the {_PICKLED}"
    if file.suffix in (".json", ".safetensors"):
        return f"{file} is a file of a model; give its directory: {file.parent}"
    return f"{file} is a file; {WANTED}"


def _of_nothing(root: Path) -> str:
    text = str(root)
    if _HUB_NAME.fullmatch(text) and not root.parent.exists():
        return (
            f"{text}: no such directory. If this is a model's name on the Hugging Face hub: a load "
            f"fetches nothing; fetch it with `flashrt pull {text}`, and the name will do"
        )
    return f"{printable(text)}: no such directory; {WANTED}"


def _of_adapter(root: Path) -> str:
    try:
        base = json.loads((root / ADAPTER_FILE).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = None
    of = f" of {shown(base)}" if isinstance(base, str) else ""
    return (
        f"{root}: a LoRA adapter{of}, not a model; merge it first (in peft: merge_and_unload, "
        "then save_pretrained) and give the directory of the result"
    )


def _without_config(root: Path) -> str:
    if (root / "snapshots").is_dir():
        return _of_cache(root)
    found = sorted(p.name for p in root.iterdir())
    below = [name for name in found if (root / name / CONFIG_FILE).is_file()]
    if not found:
        return f"{root}: is empty; {WANTED}"
    if below:
        return f"{root}: has no {CONFIG_FILE} of its own; give one of {listed(below)} in it"
    if gguf := _matching(root, ".gguf"):
        return f"{root}: has no {CONFIG_FILE}, but {listed(gguf)}; {_GGUF}"
    return f"{root}: has no {CONFIG_FILE}{unfinished(root)}; {WANTED}"


def _of_cache(root: Path) -> str:
    """Of models--OWNER--NAME, as the hub's cache keeps a model."""
    snapshots = sorted(p for p in (root / "snapshots").iterdir() if p.is_dir())
    main = root / "refs" / "main"
    if main.is_file():
        named = root / "snapshots" / main.read_text(errors="replace").strip()
        snapshots = [named] if named in snapshots else snapshots
    if not snapshots:
        return f"{root}: a cache folder of the Hugging Face hub without a snapshot: fetch the model"
    return f"{root}: a cache folder of the Hugging Face hub; give a snapshot: {listed(snapshots)}"


def _matching(root: Path, *suffixes: str) -> Sequence[str]:
    return sorted(p.name for p in root.iterdir() if p.suffix in suffixes)


def _safetensors(root: Path) -> Sequence[str]:
    return [n for n in _matching(root, ".safetensors") if not n.startswith(_STATISTICS)]
