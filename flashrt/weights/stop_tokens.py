"""Ids that end what a model writes, by the configuration files of a checkpoint.

IS: `eos_token_id` of generation_config.json and config.json, all of them, checked. IS NOT: the
tokenizer's word for it, which is often another one (text.config.end_of_turn); load adds that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown

FIELD = "eos_token_id"


def stop_tokens_of(files: Iterable[tuple[str, Mapping[str, object]]]) -> tuple[int, ...]:
    """The union of what configurations name, each with where it stands, as in the first one's
    order. Raises CheckpointError for what is no id of the vocabulary.
    """
    places = [
        (where, part)
        for path, config in files
        for where, part in ((path, config), (f"{path}: text_config", config.get("text_config")))
        if isinstance(part, Mapping)
    ]
    sizes = [size for _, part in places if isinstance(size := part.get("vocab_size"), int)]
    found: dict[int, None] = {}
    for where, part in places:
        if (value := part.get(FIELD)) is not None:
            found |= dict.fromkeys(_ids(value, where, min(sizes, default=None)))
    return tuple(found)


def _ids(value: object, where: str, vocab_size: int | None) -> list[int]:
    listed: list[Any] = value if isinstance(value, list) else [value]
    if not listed:
        raise CheckpointError(f"{where}: {FIELD} is an empty list; name a token, or leave it out")
    found = []
    for token in listed:
        is_whole = isinstance(token, int) and not isinstance(token, bool)
        if is_whole and token >= 0 and (vocab_size is None or token < vocab_size):
            found.append(token)
    if len(found) < len(listed):
        limit = "" if vocab_size is None else f"{vocab_size:,}"
        raise CheckpointError(
            f"{where}: {FIELD} is {shown(value)}; expected token ids in [0, {limit})"
        )
    return found
