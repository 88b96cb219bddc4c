"""Keys of requests, and the choice of a replica.

Red when one conversation has other keys on another route, two owners share one, a beginning that
many share decides where all of them go, or a replica that comes or goes moves roots that are not
its own.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from flashrt.fleet.replicas.keys import response_key, session_key, wish_of
from flashrt.fleet.replicas.ring import Directory, choose, order_of

SYSTEM, FIRST, REPLY, SECOND = "be brief", "hello", "hi", "and now ?"
NAMES = [f"replica-{i}" for i in range(10)]


def chat(path: str = "/v1/chat/completions", owner: str = "", **body: Any) -> Any:
    headers = {"authorization": owner} if owner else {}
    return wish_of("POST", path, headers, json.dumps(body).encode())


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_conversation_has_the_same_keys_on_every_route() -> None:
    system = {"role": "system", "content": SYSTEM}
    openai = chat(messages=[system, *said(FIRST, REPLY, SECOND)])
    parts = [{"type": "text", "text": SYSTEM}]
    anthropic = chat("/v1/messages", system=parts, messages=said(FIRST, REPLY, SECOND))
    responses = chat("/v1/responses", instructions=SYSTEM, input=said(FIRST, REPLY, SECOND))
    assert openai.is_continued and openai.keys
    assert openai == anthropic == responses
    assert chat(owner="ann", messages=said(FIRST, REPLY, SECOND)).keys != (
        chat(owner="bob", messages=said(FIRST, REPLY, SECOND)).keys
    )


def test_an_image_is_the_same_on_every_route() -> None:
    """And another image is another conversation. Fault: its next turn goes where nothing is known
    of it, or all images of a question share a home.
    """

    def keys(path: str, part: dict[str, Any], name: str = "messages") -> Any:
        first = [{"type": "text", "text": FIRST}, part]
        return chat(path, **{name: [{"role": "user", "content": first}, *said("?", REPLY, "!")]})

    url = "data:image/png;base64,iVBORw0KGgo="
    openai = keys(
        "/v1/chat/completions", {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    )
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert openai == keys("/v1/messages", {"type": "image", "source": source}) and openai.keys
    item = {"type": "input_image", "image_url": url}
    assert openai == keys("/v1/responses", item, "input")
    other = keys("/v1/messages", {"type": "image", "source": {**source, "data": "iVBORw0KGgp="}})
    assert not set(openai.keys) & set(other.keys)


def test_the_next_turn_finds_what_the_last_one_taught() -> None:
    known = Directory()
    known.learn(chat(messages=said(FIRST)).learned, "a")
    assert known.find(chat(messages=said(FIRST, REPLY, SECOND)).keys) == "a"
    assert known.find(chat(messages=said("else", REPLY, SECOND)).keys) is None
    # A first message that many send places nobody; the root, which they share, does.
    assert chat(messages=said(FIRST)).keys == ()
    assert chat(messages=said(FIRST)).root == chat(messages=said(SECOND)).root
    text = "x" * 5000
    known.learn(chat("/v1/completions", prompt=text).learned, "b")
    assert known.find(chat("/v1/completions", prompt=text + "y" * 300).keys) == "b"
    assert known.find(chat("/v1/completions", prompt=text[:600] + "y" * 3000).keys) is None


def test_what_is_kept_by_name_goes_to_its_name() -> None:
    id_ = "0123456789abcdef0123456789abcdef"
    fork = id_[:8] + "f" * 24
    assert chat(session=id_, messages=said(FIRST)).keys == (session_key(fork),)
    assert not chat(session=id_, messages=said(FIRST)).is_repeatable
    assert wish_of("GET", f"/v1/sessions/{id_}/tree", {}, b"").session == id_
    assert wish_of("POST", f"/v1/sessions/{id_}/fork", {}, b"{}").keys == (session_key(id_),)
    assert chat("/v1/responses", previous_response_id="resp_1", input="x").keys == (
        response_key("resp_1"),
    )
    assert wish_of("POST", "/slots/5", {}, b"{}").slot == 5
    for body in (b"", b"[1]", b"{", b"[" * 100_000, json.dumps({"messages": 7}).encode()):
        assert wish_of("POST", "/v1/chat/completions", {}, body).keys == ()


def test_who_comes_or_goes_moves_only_its_own() -> None:
    roots = [b"%d" % i for i in range(2000)]
    before = {root: order_of(root, NAMES)[0] for root in roots}
    after = {root: order_of(root, NAMES[:-1])[0] for root in roots}
    moved = [root for root in roots if before[root] != after[root]]
    assert moved == [root for root in roots if before[root] == NAMES[-1]]
    assert 100 < len(moved) < 300


def test_no_replica_has_more_than_its_share_where_one_begins() -> None:
    loads: Counter[str] = Counter()
    for i in range(200):
        root = b"the same" if i % 2 else b"%d" % i
        chosen = choose(root, NAMES, loads)
        assert chosen is not None
        loads[chosen] += 1
    assert max(loads.values()) <= 1.25 * 20 + 1
    assert choose(b"r", [], {}) is None
    assert choose(None, NAMES, loads) == min(NAMES, key=lambda n: (loads[n], n))


def test_a_directory_forgets_what_was_used_longest_ago() -> None:
    known = Directory(most=2)
    known.learn([b"1", b"2"], "a")
    assert known.find([b"1"]) == "a"
    known.learn([b"3"], "b")
    assert known.find([b"2"]) is None and known.find([b"2", b"1"]) == "a" and len(known) == 2
