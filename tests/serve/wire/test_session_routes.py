"""/v1/sessions, sessions in chat requests, flashrt.client and the OpenAPI document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from flashrt.client import Client, ServerError, Session
from flashrt.serve.access import OPEN, Access
from flashrt.serve.app import make_app
from flashrt.serve.ask import SessionConflict
from flashrt.serve.served import Served
from flashrt.serve.wire import chat_completions, completions, messages, responses
from flashrt.serve.wire.openapi import document
from flashrt.store.store import Store
from tests.serve.listening import ask
from tests.serve.wire.running import NAME, SEARCH, WALK, Running
from tests.serve.wire.test_mutations import bytes_of, mutated

MORE = "start in column one row two . east where am i ?"


@pytest.fixture
def client(server: Running) -> Any:
    with Client(server.url) as made:
        yield made


def said(session: Session, text: str = WALK, **options: Any) -> Any:
    return session.say(text, **{"max_tokens": 8, "temperature": 0, **options})


def body_of(session: str, *texts: str, **options: Any) -> dict[str, Any]:
    spoken = [{"role": "user", "content": text} for text in texts]
    return {"session": session, "messages": spoken, "max_tokens": 6, "temperature": 0, **options}


def test_a_session_is_what_the_whole_conversation_gives(server: Running, client: Client) -> None:
    """Fault: a turn in a session is rendered without the turns before it, or with one twice."""
    system = {"role": "system", "content": SEARCH}
    session = client.session("a walk")
    first = said(session, [system, {"role": "user", "content": WALK}])  # type: ignore[arg-type]
    second = said(session, MORE)
    talk = [system, {"role": "user", "content": WALK}, dict(first.message),
            {"role": "user", "content": MORE}]  # fmt: skip
    whole = server.post(
        "/v1/chat/completions", {"messages": talk, "max_tokens": 8, "temperature": 0}
    ).json()
    assert whole["choices"][0]["message"]["content"] == second.text
    assert whole["usage"]["prompt_tokens"] == second.prompt_tokens
    assert second.cached_tokens >= first.prompt_tokens + first.generated_tokens - 1
    roles = [m["role"] for m in session.messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    # The same system message again, as clients of Anthropic send it with each turn.
    third = said(session, [system, {"role": "user", "content": WALK}])  # type: ignore[arg-type]
    assert [m["role"] for m in session.messages()].count("system") == 1
    assert third.cached_tokens >= second.prompt_tokens


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_every_chat_route_goes_on_a_session(server: Running, client: Client, route: str) -> None:
    """Fault: a route takes `session`, and answers as if it were a new conversation."""
    session = client.session()
    first = said(session)
    body: dict[str, Any] = {"model": NAME, "session": session.id, "temperature": 0}
    body |= {"max_output_tokens": 8} if "responses" in route else {"max_tokens": 8}
    new = [{"role": "user", "content": MORE}]
    body |= {"input": new} if "responses" in route else {"messages": new}
    found = server.post(route, body).json()
    tree = session.tree()
    place = found["session"]
    assert place == {
        "id": session.id, "node": tree["session"]["tip"], "etag": tree["session"]["etag"],
    }  # fmt: skip
    assert [n["parent"] for n in tree["nodes"]][-1] == first.node
    assert [m["content"] for m in session.refresh().messages()][:3] == [WALK, first.text, MORE]


def test_fork_and_rollback(client: Client) -> None:
    """Fault: a branch changes what another one says, or a node is lost."""
    session = client.session()
    said(session, [{"role": "system", "content": SEARCH}, {"role": "user", "content": WALK}])  # type: ignore[arg-type]
    start = session.snapshot("start")
    one = said(session, MORE)
    other = session.fork("start", name="other")
    assert (other.tip, other.name) == (start, "other")
    again = said(other, MORE)
    assert (again.text, again.node != one.node) == (one.text, True)
    assert session.rollback().tip == start
    two = said(session, "where is the red box ?")
    assert {n["id"] for n in session.tree()["nodes"]} >= {start, one.node, two.node}
    assert session.restore(str(one.node)).tip == one.node
    assert [m["content"] for m in session.messages()][3:] == [MORE, one.text]
    with pytest.raises(ServerError, match="turns") as refused:
        session.rollback(9)
    assert refused.value.status == 404
    other.delete()
    with pytest.raises(ServerError) as gone:
        other.refresh()
    assert (gone.value.status, gone.value.code) == (404, "not_found")
    assert [s.id for s in client.sessions()].count(session.id) == 1
    assert said(session, WALK).cached_tokens > 0


def test_if_match(server: Running, client: Client) -> None:
    """Fault: a change that somebody made meanwhile is undone, or said twice after a retry."""
    session = client.session()
    first = said(session)
    stale = client.open(session.id)
    said(session, MORE)
    for change in (
        lambda: stale.say(MORE), lambda: list(stale.stream(MORE)), stale.rollback, stale.delete,
        lambda: stale.restore(str(first.node)), lambda: stale.snapshot("x"), stale.fork,
    ):  # fmt: skip
        with pytest.raises(ServerError) as refused:
            change()
        assert (refused.value.status, refused.value.code) == (412, "etag_mismatch")
    assert len(session.tree()["nodes"]) == 3
    path = f"/v1/sessions/{session.id}"
    shown = server.get(path)
    etag = shown.headers["etag"]
    assert etag == f'"{session.etag}"' == f'"{shown.json()["etag"]}"'
    for match in (etag, f'"0", {etag}', "*"):
        done = server.post(f"{path}/snapshot", {"name": "n"}, headers={"if-match": match})
        assert done.status_code == 200
    for match in ("W/" + etag, etag.strip('"'), '""'):
        done = server.post(f"{path}/snapshot", {"name": "m"}, headers={"if-match": match})
        assert done.status_code == 412
    assert [n["name"] for n in stale.refresh().tree()["nodes"]] == [None, None, "n"]


def test_a_turn_begins_where_its_prompt_was_made(server: Running, client: Client) -> None:
    """Fault: a rollback between reading the conversation and the turn's begin goes unnoticed: the
    turn's messages are of one branch, its place in the tree is on another.
    """
    session = client.session()
    first = said(session)
    said(session, MORE)
    core = server.server.core
    with pytest.raises(SessionConflict, match="moved on"):
        ask(core, [1, 2, 3], owner=OPEN, session=session.id, tip=first.node)
    assert ask(core, [1, 2, 3], owner=OPEN, session=session.id, tip=session.tip).wait().nodes[0]


def test_idempotency(server: Running, client: Client) -> None:
    """Fault: a request that is sent again forks again, or another one has its answer."""
    session = client.session()
    said(session)
    path = f"/v1/sessions/{session.id}/fork"

    def fork(name: str, key: str = "k1") -> httpx.Response:
        return server.post(path, {"name": name}, headers={"idempotency-key": key})

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: fork("twice"), range(8)))
    assert {m.status_code for m in made} == {201}
    assert len({m.content for m in made}) == 1
    assert [s.name for s in client.sessions()].count("twice") == 1
    other = fork("thrice")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert fork("thrice", "k2").status_code == 201
    # An error is not kept: it changed nothing.
    headers = {"idempotency-key": "k3"}
    body = {"node": "later"}
    missing = server.post(f"/v1/sessions/{session.id}/restore", body, headers=headers)
    session.snapshot("later")
    found = server.post(f"/v1/sessions/{session.id}/restore", body, headers=headers)
    assert (missing.status_code, found.status_code) == (404, 200)


def test_keys_do_not_see_each_other(started: Callable[..., Running]) -> None:
    """Fault: an id is enough to read, change or continue another key's session."""
    running = started(Access(keys=("ann", "bob")))
    with Client(running.url, "ann") as ann, Client(running.url, "bob") as bob:
        session = ann.session()
        first = said(session)
        path = f"/v1/sessions/{session.id}"
        for method, suffix, body in (
            ("GET", "", None), ("GET", "/tree", None), ("GET", f"/nodes/{first.node}", None),
            ("POST", "/snapshot", {"name": "n"}), ("POST", "/fork", {}), ("POST", "/rollback", {}),
            ("POST", "/restore", {"node": first.node}), ("DELETE", "", None),
        ):  # fmt: skip
            for key, status in (("bob", 404), ("eve", 401)):
                headers = {"authorization": f"Bearer {key}", "idempotency-key": "same"}
                found = httpx.request(method, running.url + path + suffix, json=body,
                                      headers=headers)  # fmt: skip
                assert found.status_code == status, (method, suffix, key)
        with pytest.raises(ServerError) as refused:
            bob.chat(body_of(session.id, MORE), None)
        assert refused.value.status == 404
        assert bob.sessions() == []
        assert [t["session"] for t in ann.ask("GET", "/v1/status")["turns"]] == [session.id]
        assert bob.ask("GET", "/v1/status")["turns"] == []
        assert len(session.tree()["nodes"]) == 2


@pytest.mark.parametrize(
    ("verb", "body", "words"),
    [
        ("snapshot", {}, "name"),
        ("snapshot", {"name": ""}, "characters"),
        ("snapshot", {"name": 3}, "name"),
        ("fork", {"nodes": "x"}, "did you mean node"),
        ("rollback", {"turns": -1}, "turns"),
        ("rollback", {"turns": 1, "node": "x"}, "one of"),
        ("rollback", {"turns": True}, "turns"),
        ("restore", {}, "node"),
    ],
)
def test_what_is_wrong_is_told(client: Client, verb: str, body: dict[str, Any], words: str) -> None:
    session = client.session()
    with pytest.raises(ServerError, match=words) as refused:
        client.change(f"/v1/sessions/{session.id}/{verb}", body)
    assert refused.value.status == 400


def test_mutated_bodies_of_sessions(server: Running, client: Client) -> None:
    """Fault: a value of a wrong kind reaches code that expects another."""
    draw = random.Random(17)
    session = client.session()
    said(session)
    node = session.snapshot("n")
    bodies: dict[str, dict[str, Any]] = {
        "snapshot": {"name": "n"}, "fork": {"node": node, "name": "x"}, "rollback": {"turns": 1},
        "restore": {"node": node},
    }  # fmt: skip
    seen = set()
    with httpx.Client(timeout=60) as http:
        for _ in range(150):
            verb = draw.choice(list(bodies))
            data = bytes_of(mutated(bodies[verb], draw), draw)
            found = http.post(f"{server.url}/v1/sessions/{session.id}/{verb}", content=data)
            about = f"{verb} {data!r} -> {found.status_code} {found.text[:500]}"
            assert found.status_code in (200, 201, 400, 404), about
            seen.add(found.status_code)
            if found.is_error:
                assert found.json()["error"]["message"], about
                assert len(found.content) < 4000, about
    assert len(seen) == 4
    assert session.refresh().restore(node).tip == node
    assert said(session, MORE).cached_tokens > 0


def test_a_stream_that_is_left(client: Client) -> None:
    """Fault: what was said until then is missing from the conversation, or blocks the session."""
    session = client.session()
    heard = []
    stream = session.stream(WALK, max_tokens=600, temperature=0, logit_bias={"0": -100})
    for piece in stream:
        heard.append(piece)
        if len(heard) == 3:
            break
    stream.close()  # type: ignore[attr-defined]
    user, reply = session.messages()
    assert user["content"] == WALK
    assert reply["content"].startswith("".join(heard))
    assert said(session, MORE).cached_tokens > 0


def test_a_stream_gives_what_a_whole_reply_gives(client: Client) -> None:
    """Fault: the last chunk has no place in the session, or a piece is lost."""
    session = client.session()
    text = "".join(session.stream(WALK, max_tokens=8, temperature=0))
    streamed = session.reply
    assert streamed is not None and streamed.text == text
    assert session.rollback().tip != streamed.node
    whole = said(session)
    assert (whole.text, whole.finish_reason) == (text, streamed.finish_reason)
    assert (whole.prompt_tokens, whole.generated_tokens) == (
        streamed.prompt_tokens, streamed.generated_tokens,
    )  # fmt: skip


def test_a_reply_that_goes_on_is_one_message(client: Client) -> None:
    """Fault: a continued message is in the session twice, or only its end is."""
    session = client.session()
    start = {"role": "assistant", "content": "column six"}
    spoken = [{"role": "user", "content": WALK}, start]
    reply = said(session, spoken, continue_final_message=True)  # type: ignore[arg-type]
    user, joined = session.messages()
    assert (user["content"], joined["content"]) == (WALK, "column six" + reply.text)
    assert said(session, MORE).cached_tokens >= reply.prompt_tokens


def test_sessions_outlive_the_server(started: Callable[..., Running], tmp_path: Path) -> None:
    """Fault: a reply that was given is not in the store."""
    first = started(store=Store(tmp_path / "store"))
    with Client(first.url) as client:
        session = client.session("kept")
        reply = said(session)
        session.snapshot("here")
    first.end()
    again = started(store=Store(tmp_path / "store"))
    with Client(again.url) as client:
        (found,) = client.sessions()
        assert (found.name, found.tip, found.etag) == ("kept", reply.node, session.etag)
        assert [m["content"] for m in found.messages("here")] == [WALK, reply.text]
        assert said(found, MORE).cached_tokens >= reply.prompt_tokens


def routes_of(server: Running) -> set[tuple[str, str]]:
    gate: Any = make_app(server.server.core, Served(server.engine, NAME), Access())
    return {
        (method.lower(), route.path.replace(":path", ""))
        for route in gate._app.routes
        for method in route.methods
        if method != "HEAD"
    }


def test_the_document_has_every_route(server: Running) -> None:
    """Fault: a route that the document does not know, or one that is not there."""
    paths = document()["paths"]
    listed = {(method, path) for path, methods in paths.items() for method in methods}
    assert listed == routes_of(server)
    served = server.get("/openapi.json")
    assert served.json() == document()
    assert "://" not in served.text


def test_the_document_tells_the_truth(server: Running, client: Client) -> None:
    """Fault: a field that is refused, or an answer that its schema does not allow."""
    schemas = document()["components"]["schemas"]
    modules = {"ChatRequest": chat_completions, "CompletionRequest": completions,
               "ResponseRequest": responses, "MessagesRequest": messages}  # fmt: skip
    for name, module in modules.items():
        assert set(schemas[name]["properties"]) <= module._KNOWN, name
    session = client.session("told")
    reply = said(session)
    session.fork()
    path = f"/v1/sessions/{session.id}"
    answers = {
        "SessionList": "/v1/sessions", "Session": path, "Tree": f"{path}/tree",
        "Turn": f"{path}/nodes/{reply.node}", "Status": "/v1/status", "List": "/v1/models",
    }  # fmt: skip
    found = {name: client.ask("GET", at) for name, at in answers.items()}
    found["ChatCompletion"] = client.chat(body_of(session.id, MORE), None)
    found["Error"] = server.get("/v1/sessions/none").json()
    for name, value in found.items():
        given = {"$ref": f"#/components/schemas/{name}", **document()}
        jsonschema.Draft202012Validator.check_schema(given)
        jsonschema.validate(value, given, jsonschema.Draft202012Validator)
        if schemas[name].get("properties"):
            assert set(value) <= set(schemas[name]["properties"]) | {"system_fingerprint",
                   "first_id", "last_id", "has_more"}, name  # fmt: skip
    assert json.loads(json.dumps(found["Tree"]))["nodes"][1]["n_messages"] == 2
