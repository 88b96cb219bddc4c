"""tokenizer_config.json: what a checkpoint says about its special tokens, and its chat template.

IS: the file as an object, the spellings of special tokens, the id that ends a turn. IS NOT: the
tokenizer's own file (tokenizer), or a template that is ready to render (template).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.files import read_file
from flashrt.text.tokenizer import Tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MOST_NBYTES = 64 << 20  # of this file, and of a template


def tokenizer_config(checkpoint: Path) -> Mapping[str, object]:
    """The file as an object, empty if there is none. Raises CheckpointError if it is no JSON."""
    path = checkpoint / TOKENIZER_CONFIG_FILE
    try:
        config = json.loads(read_file(path, MOST_NBYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and the like: spelled out, or as an object with a `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def end_of_turn(checkpoint: Path, tokenizer: Tokenizer, vocab_size: int | None) -> tuple[int, ...]:
    """The id of `eos_token`, which ends a turn of chat models; empty if the file names none.

    config.json often names only the token that ends a document. Raises CheckpointError if the id is
    beyond the model's vocabulary.
    """
    spelling = special_tokens(tokenizer_config(checkpoint)).get("eos_token")
    token = None if spelling is None else tokenizer.token_id(spelling)
    if token is None:
        return ()
    if vocab_size is not None and token >= vocab_size:
        raise CheckpointError(
            f"{checkpoint / TOKENIZER_CONFIG_FILE}: eos_token {spelling!r} has id {token} in "
            f"{tokenizer.path.name}, which is not in [0, {vocab_size}); these files belong to "
            "another model"
        )
    return (token,)


def first_token(checkpoint: Path, tokenizer: Tokenizer) -> int | None:
    """The id that begins a text, where `add_bos_token` asks for it or tokenizer.json puts it there;
    None if nothing does.
    """
    config = tokenizer_config(checkpoint)
    spelling = special_tokens(config).get("bos_token")
    token = None if spelling is None else tokenizer.token_id(spelling)
    wants = config.get("add_bos_token")
    if token is None or wants is False:
        return None
    return token if wants is True or tokenizer.first_of_all == token else None
