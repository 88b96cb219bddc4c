"""Which files of a model on the hub flashrt needs.

IS: the choice, by names alone: configuration, tokenizer, a robot policy's processors, and the
weights in one format; of several GGUF files the one that is asked for. IS NOT: a download. Exists
because a repository often holds its weights several times, in formats and sizes that would fill a
disk.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable

CONFIG_FILE = "config.json"
SMALL = (".json", ".jinja")  # at the top: configuration, tokenizer, template, the shards' index
_PROCESSORS = ("policy_preprocessor", "policy_postprocessor")  # of LeRobot: with statistics
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# GGUF files that are no language model: a vision tower, and what quantisation was tuned by.
_BESIDE_GGUF = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def needed_files(files: Sequence[str], model: str, pattern: str | None = None) -> list[str]:
    """The files to fetch, of all that a model has. `pattern`: of the weights' file, with `*`, in
    place of a choice by format. Raises CheckpointError where nothing, or too much, could be meant.
    """
    top = [name for name in files if "/" not in name]
    small = [name for name in top if name.endswith(SMALL) or name.startswith(_PROCESSORS)]
    if pattern is not None:
        weights = _asked_for(files, model, pattern)
    else:
        weights = _safetensors(top) or _gguf(files, model)
    return sorted({*small, *weights})


def first_parts(files: Iterable[str]) -> list[str]:
    """GGUF files of a language model, of a split one the first part only."""
    kept = []
    for name in sorted(files):
        part = _PART.fullmatch(name)
        if not _BESIDE_GGUF.search(name) and (part is None or int(part[2]) == 1):
            kept.append(name)
    return kept


def _asked_for(files: Sequence[str], model: str, pattern: str) -> list[str]:
    weights = sorted(name for name in files if name.endswith((".gguf", ".safetensors")))
    found = [n for n in weights if n == pattern] or fnmatch.filter(weights, pattern)
    if not found:
        raise CheckpointError(
            f"{model} has no weights file {printable(pattern)}; it has {listed(weights) or 'none'}"
        )
    whole = {name: parts_of(name, files) for name in found}
    if len(set(whole.values())) > 1 and any(name.endswith(".gguf") for name in found):
        raise CheckpointError(
            f"{printable(pattern)} means {len(found)} files of {model}: {listed(found)}; name one"
        )
    return [part for parts in whole.values() for part in parts]


def parts_of(name: str, files: Iterable[str]) -> tuple[str, ...]:
    """All parts of the split file that a name is one of; else the name alone."""
    part = _PART.fullmatch(name)
    if part is None:
        return (name,)
    others = [(other, _PART.fullmatch(other)) for other in files]
    return tuple(sorted(o for o, m in others if m and (m[1], m[3]) == (part[1], part[3])))


def _safetensors(top: Sequence[str]) -> list[str]:
    """Of a model in that format. Some repositories keep their makers' own format beside it."""
    if CONFIG_FILE not in top:
        return []
    found = [name for name in top if name.endswith(".safetensors")]
    return [name for name in found if name.startswith("model")] or found


def _gguf(files: Sequence[str], model: str) -> list[str]:
    found = [name for name in files if name.endswith(".gguf")]
    whole = first_parts(found)
    if not whole:
        raise CheckpointError(
            f"{model} has neither safetensors nor GGUF files (it has {listed(sorted(files))}); "
            "look for a model that was saved in one of these formats"
        )
    if len(whole) > 1:
        raise CheckpointError(
            f"{model} has {len(whole)} GGUF files; choose one with `flashrt pull {model} "
            f"--file NAME`: {listed(whole)}"
        )
    return list(parts_of(whole[0], found))
