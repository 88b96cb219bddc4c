"""Images in messages: parts of a content -> pictures, and the prompt with their tokens.

IS: which parts are images, and where they go in a rendered prompt. IS NOT: decoding
(vision/pixels), or the rows of an image (engine/sight). Nothing is fetched from the network.

A template writes one token for an image; the words of the image's rows take its place. What a
message spells is not that token: see text/prompt.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.messages import shown
from flashrt.text.prompt import Prompt
from flashrt.text.template import ChatError, Message
from flashrt.vision.pixels import Picture

_TYPES = ("image", "image_url", "input_image")
_FIELDS = ("image", "base64", "image_url")
_STAND_IN = {"type": "image", "image": ""}  # for templates, which look at the type or the name


def without_pictures(messages: Sequence[Message]) -> tuple[list[Message], list[Picture]]:
    """Messages as a template takes them, and the pictures that were in them, in order.

    A part is an image by its type: {"type": "image", "image": ...} with a path, the bytes of a file
    or an array [height, width, 3] of uint8; {"type": "image", "base64": text}; or {"type":
    "image_url", "image_url": {"url": "data:image/png;base64,..."}}. Raises ChatError.
    """
    made, parts = parts_apart(messages)
    return made, [picture_of(part) for part in parts]


def parts_apart(messages: Sequence[Message]) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """The same with the parts that are images as they were given, unread."""
    found: list[Mapping[str, Any]] = []
    made: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) or not isinstance(content, Sequence):
            made.append(message)
            continue
        parts: list[object] = []
        for part in content:
            if isinstance(part, Mapping) and part.get("type") in _TYPES:
                found.append(part)
                parts.append(_STAND_IN)
            else:
                parts.append(part)
        made.append({**message, "content": parts})
    return made, found


def picture_of(part: Mapping[str, Any]) -> Picture:
    """The picture of a part. Raises ChatError."""
    given = [name for name in _FIELDS if part.get(name) is not None]
    if len(given) != 1:
        raise ChatError(f"an image part has {', '.join(given) or 'none'} of {', '.join(_FIELDS)}")
    value = part[given[0]]
    if given[0] == "base64":
        return _decoded(value)
    if isinstance(value, Mapping):
        value = value.get("url")
    if isinstance(value, str) and value[:5].lower() == "data:":
        return data_of(value)
    if given[0] == "image_url" or (isinstance(value, str) and "://" in value):
        raise ChatError(
            f"an image is at {shown(value)}; images are not fetched: give a data URI, base64, "
            "bytes or a path"
        )
    if isinstance(value, str | bytes | os.PathLike | np.ndarray):
        return value
    raise ChatError(f"an image is a {type(value).__name__}; give a path, bytes or an array")


def data_of(uri: str) -> bytes:
    """The bytes of a data URI, data:image/...;base64,... Raises ChatError."""
    head, _, data = uri.partition(",")
    if not head.lower().endswith(";base64"):
        raise ChatError(f"an image's URI begins with {shown(head[:40])}; expected base64")
    return _decoded(data)


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str | bytes) else "?", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ChatError(f"an image is no base64: {error}") from error


def with_words(prompt: Prompt, image_token: int, words: Sequence[NDArray[np.int32]]) -> Prompt:
    """The prompt with the words of each image in place of its one token.

    Raises ChatError where the template did not write a token for each.
    """
    at = [i for i, token in enumerate(prompt.tokens) if token == image_token]
    if len(at) != len(words):
        raise ChatError(
            f"the messages have {len(words)} images, and the chat template wrote {len(at)}: it "
            "does not know images in this place"
        )
    tokens, start = list[int](), 0
    for place, own in zip(at, words, strict=True):
        tokens += [*prompt.tokens[start:place], *own.tolist()]
        start = place + 1
    tokens += prompt.tokens[start:]

    def moved(position: int) -> int:
        before = (len(own) - 1 for place, own in zip(at, words, strict=True) if place < position)
        return position + sum(before)

    turn_starts = tuple(map(moved, prompt.turn_starts))
    return replace(
        prompt, tokens=tokens, turn_starts=turn_starts, tail_start=moved(prompt.tail_start)
    )
