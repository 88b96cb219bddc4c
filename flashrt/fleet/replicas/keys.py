"""What a request is about, as far as a router must know: a session, a response, a slot, a prompt.

IS: keys by which a conversation is found again, and the root by which it is placed. IS NOT: checks
of a request: whatever is wrong with it, a replica says so; or the choice of a replica (ring).

A prompt's keys are digests of its messages, each of all up to there, so that they form the same
tree as the prefix index of a server does, in messages instead of tokens. The root is what comes
before the first message of a user: system message and tools. Texts are compared, not the forms of
one API, so a conversation keeps its keys on whatever route it comes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashrt.serve.sessions import FAMILY_DIGITS

Kind = Literal["any", "kept", "prompt", "slot", "sessions", "slots", "status", "metrics"]
Key = bytes
_CHAT = frozenset(
    {
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/completions",
    }
)
_SUMS: Mapping[tuple[str, str], Kind] = {
    ("GET", "/v1/sessions"): "sessions",
    ("GET", "/slots"): "slots",
    ("GET", "/v1/status"): "status",
    ("GET", "/metrics"): "metrics",
}
_SESSION_PATH = re.compile(r"/v1/sessions/([^/]+)(?:/.*)?")
_RESPONSE_PATH = re.compile(r"/v1/responses/([^/]+)")
_SLOT_PATH = re.compile(r"/slots/([0-9]{1,9})")
_BLOCK_CHARS, _BLOCK_TOKENS = 256, 64  # of a prompt that has no messages
_KEY_NBYTES = 16


@dataclass(frozen=True, slots=True)
class Wish:
    """keys: the home of the first that is known has the state, the deepest first. root: places what
    nobody knows; None: wherever there is least to do. learned: keys that stand for it from now on.
    """

    kind: Kind = "any"
    keys: tuple[Key, ...] = ()
    root: Key | None = None
    learned: tuple[Key, ...] = ()
    session: str | None = None
    slot: int = 0
    is_continued: bool = False  # it goes on from something that somebody may have kept
    is_repeatable: bool = True  # nothing lasts but its answer: it may be sent to another replica


def wish_of(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Wish:
    """What a request is about; headers in lower case."""
    if (kind := _SUMS.get((method, path))) is not None:
        return Wish(kind)
    if (found := _SLOT_PATH.fullmatch(path)) is not None:
        return Wish("slot", slot=int(found[1]), is_repeatable=False)
    if (found := _SESSION_PATH.fullmatch(path)) is not None:
        return _of_session(found[1], is_repeatable=method == "GET")
    if (found := _RESPONSE_PATH.fullmatch(path)) is not None:
        return _of_response(found[1])
    if method != "POST":
        return Wish()
    if path == "/v1/sessions":  # sent again, it must find the replica that knows the first answer
        once = headers.get("idempotency-key")
        key = (_key("once", _owner(headers), once),) if once else ()
        return Wish("kept", key, None, key, is_repeatable=False)
    if path not in _CHAT:
        return Wish()
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return Wish()
    return _of_chat(given, _owner(headers)) if isinstance(given, dict) else Wish()


def session_key(id_: str) -> Key:
    """Of a session and its forks."""
    return _key("session", id_[:FAMILY_DIGITS])


def response_key(id_: str) -> Key:
    """Of a response that may be gone on from."""
    return _key("response", id_)


def _of_session(id_: str, *, is_repeatable: bool) -> Wish:
    key = session_key(id_)
    return Wish("kept", (key,), key, (key,), id_, 0, True, is_repeatable)


def _of_response(id_: str) -> Wish:
    key = response_key(id_)
    return Wish("kept", (key,), key, (key,), is_continued=True)


def _of_chat(given: Mapping[str, Any], owner: str) -> Wish:
    session, before = given.get("session"), given.get("previous_response_id")
    if isinstance(session, str):
        return _of_session(session, is_repeatable=False)
    if isinstance(before, str):
        return _of_response(before)
    if "prompt" in given:
        return _of_prompt(given["prompt"], owner)
    return _of_messages(given, owner)


def _of_messages(given: Mapping[str, Any], owner: str) -> Wish:
    at = _key("tools", owner, json.dumps(given.get("tools"), sort_keys=True))
    root, keys = at, list[Key]()
    n_users = 0
    for role, text in _messages(given):
        at = _key("message", at, role, text)
        n_users += role == "user"
        if n_users:
            keys.append(at)
        else:
            root = at
    if not keys:
        return Wish("prompt", (), root)
    # One message of a user is the beginning of many conversations: only its root places it.
    is_continued = n_users > 1
    found = tuple(reversed(keys)) if is_continued else ()
    return Wish("prompt", found, root, (keys[0], keys[-1]), is_continued=is_continued)


def _messages(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Roles and texts, whichever API they are of."""
    for name in ("system", "instructions"):
        if given.get(name):
            yield "system", _text(given[name])
    messages = given.get("messages", given.get("input"))
    if isinstance(messages, str):
        yield "user", messages
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            role = str(message.get("role", message.get("type", "")))
            calls = message.get("tool_calls") or message.get("arguments") or ""
            said = _text(message.get("content", message.get("output")))
            yield (
                "system" if role == "developer" else role,
                said + (json.dumps(calls, sort_keys=True) if calls else ""),
            )


def _text(content: object) -> str:
    if isinstance(content, list):
        parts = [p.get("text", _image(p)) if isinstance(p, dict) else p for p in content]
        return "".join(p if isinstance(p, str) else json.dumps(p, sort_keys=True) for p in parts)
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def _image(part: Mapping[str, Any]) -> object:
    """An image's data, the same in all APIs' forms; a part of another kind as it is."""
    url, source = part.get("image_url"), part.get("source")
    if isinstance(url, dict):
        url = url.get("url")
    if isinstance(url, str):
        return f"image {url.rpartition(',')[2]}"
    if isinstance(source, dict) and isinstance(source.get("data"), str):
        return f"image {source['data']}"
    return part


def _of_prompt(prompt: object, owner: str) -> Wish:
    """A text or token ids; of several prompts the first one decides."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if not isinstance(prompt, str | list):
        return Wish()
    at, keys = _key("prompt", owner), list[Key]()
    for block in _blocks(prompt):
        at = _key("block", at, block)
        keys.append(at)
    if not keys:
        return Wish()
    half = len(keys) // 2  # what has less in common with a prompt is no reason to go where it is
    powers = {(1 << i) - 1 for i in range(len(keys).bit_length())}
    learned = tuple(key for i, key in enumerate(keys) if i in powers or i == len(keys) - 1)
    return Wish(
        "prompt", tuple(reversed(keys[half:])), keys[0], learned, is_continued=len(keys) > 1
    )


def _blocks(prompt: str | Sequence[object]) -> Iterator[str]:
    size = _BLOCK_CHARS if isinstance(prompt, str) else _BLOCK_TOKENS
    for start in range(0, len(prompt), size):
        block = prompt[start : start + size]
        yield block if isinstance(block, str) else repr(block)


def _owner(headers: Mapping[str, str]) -> str:
    return headers.get("x-api-key") or headers.get("authorization") or ""


def _key(kind: str, *parts: str | bytes) -> Key:
    digest = hashlib.blake2b(kind.encode(), digest_size=_KEY_NBYTES)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
