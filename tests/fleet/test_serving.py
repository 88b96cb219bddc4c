"""Replicas that share a store, behind a front; without Ray.

Red when: a moved session loses a turn or its capsules, an old copy of it is served or written over
a newer one, a foreign state is restored, another owner's prefixes are warm, or the front sends a
request of a session elsewhere than where it lives.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashrt.base.errors import FleetError
from flashrt.fleet.replicas.front import Front
from flashrt.fleet.replicas.station import Arrival, NotHere
from flashrt.serve.access import Access
from flashrt.weights.bundled import bundled_checkpoint
from tests.fleet.stations import LocalLink, fleet, options_of
from tests.seeing import FILE, write

WALK = "start in column six row six . west east south south where am i ?"
MORE = "west west where am i ?"


def run(
    work: Callable[[Front, LocalLink, httpx.AsyncClient], Awaitable[None]], *options: Any
) -> None:
    async def go() -> None:
        async with fleet(*options) as (front, link, client):
            await work(front, link, client)

    asyncio.run(go())


async def say(client: httpx.AsyncClient, session: str, text: Any, **more: Any) -> dict[str, Any]:
    body = {
        "session": session, "messages": [{"role": "user", "content": text}], "max_tokens": 6,
        "temperature": 0, **more,
    }  # fmt: skip
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code == 503:  # it died: once more, as clients do
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def told(answer: dict[str, Any]) -> tuple[str, int, int]:
    """Text, tokens of the prompt, those of them that were known."""
    usage = answer["usage"]
    text = answer["choices"][0]["message"]["content"]
    return text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def talk(client: httpx.AsyncClient) -> tuple[str, list[tuple[str, int, int]]]:
    """A new session, two turns."""
    id_ = (await client.post("/v1/sessions", json={})).json()["id"]
    return id_, [told(await say(client, id_, WALK)), told(await say(client, id_, MORE))]


def home_of(link: LocalLink) -> str:
    return link.homes_of("/v1/chat/completions")[-1]


def test_a_session_goes_on_elsewhere_as_if_it_had_stayed(tmp_path: Path) -> None:
    """After a drain and after a kill: same text, same counts as on one replica that stays."""
    expected: list[tuple[str, int, int]] = []

    async def alone(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, turns = await talk(client)
        expected.extend(
            [*turns, told(await say(client, id_, MORE)), told(await say(client, id_, MORE))]
        )

    async def moved(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, turns = await talk(client)
        first = home_of(link)
        assert await front.drain(first) == 1
        turns.append(told(await say(client, id_, MORE)))
        second = home_of(link)
        assert second != first
        link.kill(second)
        turns.append(told(await say(client, id_, MORE)))
        assert len({first, second, home_of(link)}) == 3
        assert turns == expected
        tree = (await client.get(f"/v1/sessions/{id_}/tree")).json()
        assert len(tree["nodes"]) == 5
        assert front.tally.moved == 2 and front.tally.drained == 1

    run(alone, options_of(tmp_path / "one"))
    run(moved, *[options_of(tmp_path / "three")] * 3)


def test_conversations_with_images_have_a_home(tmp_path: Path) -> None:
    """Sent whole each time, and as a session that moves. Fault: a body with an image is refused,
    the next turn goes elsewhere, or a replica that never saw the image does not go on.
    """
    checkpoint = write(tmp_path / "seeing")
    url = f"data:image/png;base64,{base64.b64encode(FILE.read_bytes()).decode()}"
    content: Any = [{"type": "image_url", "image_url": {"url": url}}]

    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        messages: list[Any] = [{"role": "user", "content": content}]
        body = {"max_tokens": 6, "temperature": 0}
        path, known, homes = "/v1/chat/completions", 0, set()
        for _ in range(3):
            answer = await client.post(path, json={**body, "messages": messages})
            assert answer.status_code == 200, answer.text
            text, n_prompt, cached = told(answer.json())
            assert cached >= known
            known = n_prompt
            homes.add(home_of(link))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "?"}]
        assert len(homes) == 1
        id_ = (await client.post("/v1/sessions", json={})).json()["id"]
        first = told(await say(client, id_, content))[0]
        before = home_of(link)
        await front.drain(before)
        second = told(await say(client, id_, "?"))[0]
        assert home_of(link) != before
        assert [first, second] == [m["content"] for m in messages if m["role"] == "assistant"][:2]

    options = options_of(tmp_path / "store", checkpoint=str(checkpoint), images=None)
    run(work, *[options] * 2)


def test_a_turn_that_dies_with_its_replica_is_said_again(tmp_path: Path) -> None:
    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, _ = await talk(client)
        home = home_of(link)
        before = (await client.get(f"/v1/sessions/{id_}")).json()
        link.kill_at = (home, 0)
        body = {"session": id_, "messages": [{"role": "user", "content": MORE}], "max_tokens": 6}
        headers = {"if-match": f'"{before["etag"]}"'}
        broken = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert broken.status_code == 503 and broken.json()["error"]["code"] == "replica_died"
        assert broken.headers["retry-after"] == "1"
        # The replica here lives on, and has finished the turn: it is a zombie, whose turn counts
        # because it was first. A client that repeats with If-Match learns so.
        link.stations[home].core.close()
        again = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert again.status_code in (200, 412)
        assert home_of(link) != home

    run(work, *[options_of(tmp_path)] * 2)


def test_what_another_replica_wrote_is_never_written_over(tmp_path: Path) -> None:
    """Two routers that do not know of each other: the copy that is old is read anew, and a turn
    that ran meanwhile is not kept.
    """

    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, _ = await talk(client)
        a = home_of(link)
        (b,) = set(link.stations) - {a}
        other = Front(LocalLink([link.stations[b]]))
        transport = httpx.ASGITransport(app=other)
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as second:
            await say(second, id_, "north north where am i ?")
            at_b = (await second.get(f"/v1/sessions/{id_}")).json()
            assert at_b["n_nodes"] == 4
            seen = (await client.get(f"/v1/sessions/{id_}")).json()
            assert seen["etag"] == at_b["etag"]  # a has read it anew
            book, key = link.stations[a].core.book, _owner_folder(tmp_path)
            files = await asyncio.wrap_future(
                link.stations[a].core.call(lambda: book.snapshot("everyone", id_, "old")[1])
            )
            await say(second, id_, MORE)
            with pytest.raises(Exception, match="went on at another server"):
                book.write(files)
            document = json.loads((tmp_path / "serve" / key / id_ / "session.json").read_text())
            assert len(document["nodes"]) == 5 and document["writer"] == b

    run(work, *[options_of(tmp_path)] * 2)


def _owner_folder(store: Path) -> str:
    (folder,) = (store / "serve").iterdir()
    return folder.name


def test_another_precision_computes_again_and_another_tokenizer_refuses(tmp_path: Path) -> None:
    """A rolling update: what an engine of another fingerprint left is never restored."""
    other = tmp_path / "other"
    shutil.copytree(bundled_checkpoint(), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))

    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        link.hidden = {"b", "c"}
        id_, (_, last) = await talk(client)
        link.hidden = {"c"}
        await front.drain("a")
        _, n_prompt, cached = told(await say(client, id_, MORE))
        assert n_prompt > last[1] and cached == 0, "it was made again from its messages"
        assert link.stations["b"].core.book.n_foreign >= 2
        _, n_prompt, cached = told(await say(client, id_, MORE))
        assert cached > n_prompt // 2, "what b made itself is warm"
        link.hidden = set()
        await front.drain("b")
        refused = await client.get(f"/v1/sessions/{id_}")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "foreign_session"

    a = options_of(tmp_path / "store")
    run(work, a, replace(a, weights="int8"), replace(a, checkpoint=str(other)))


def test_prompts_are_warm_at_a_new_home_and_only_for_their_owner(tmp_path: Path) -> None:
    """Through a store that is no folder: it has no locks, and each read is a request."""
    access = Access(keys=("ann", "bob"))

    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": WALK}]

        async def ask(key: str) -> tuple[str, int, int]:
            body = {"messages": messages, "max_tokens": 6, "temperature": 0}
            headers = {"authorization": f"Bearer {key}"}
            response = await client.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return told(response.json())

        text, n_prompt, cached = await ask("ann")
        assert cached == 0
        messages += [
            {"role": "assistant", "content": text}, {"role": "user", "content": MORE},
        ]  # fmt: skip
        first = home_of(link)
        link.kill(first)
        _, _, cached = await ask("ann")
        assert cached >= n_prompt and home_of(link) != first
        _, _, cached = await ask("bob")
        assert cached == 0

    run(work, *[options_of(f"memory://{tmp_path.name}", access=access)] * 2)


def test_responses_slots_lists_and_metrics_know_all_replicas(tmp_path: Path) -> None:
    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        first = (
            await client.post("/v1/responses", json={"input": WALK, "max_output_tokens": 6})
        ).json()
        home = link.homes_of("/v1/responses")[-1]
        body = {"input": MORE, "previous_response_id": first["id"], "max_output_tokens": 6}
        second = (await client.post("/v1/responses", json=body)).json()
        assert link.homes_of("/v1/responses")[-1] == home
        assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
        sessions = [(await client.post("/v1/sessions", json={})).json()["id"] for _ in range(3)]
        slots = (await client.get("/slots")).json()
        assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
        slot = next(slot["id"] for slot in slots if slot["n_past"])
        saved = await client.post(f"/slots/{slot}?action=save", json={"filename": "walk"})
        assert saved.json()["id_slot"] == slot and saved.json()["n_saved"] > 0
        other = (slot + 2) % 4
        brought = await client.post(f"/slots/{other}?action=restore", json={"filename": "walk"})
        assert brought.json()["n_restored"] == saved.json()["n_saved"]
        metrics = (await client.get("/metrics")).text
        assert 'replica="a"' in metrics and 'replica="b"' in metrics
        status = (await client.get("/v1/status")).json()
        assert [lane["index"] for lane in status["lanes"]] == [0, 1, 2, 3]
        link.kill(home)
        front._bury(home)
        third = await client.post(
            "/v1/responses", json={**body, "previous_response_id": second["id"]}
        )
        assert third.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0
        listed = (await client.get("/v1/sessions")).json()["data"]
        assert {s["id"] for s in listed} == set(sessions)

    run(work, *[options_of(tmp_path)] * 2)


def test_a_call_that_strays_is_sent_back_and_placed_anew(tmp_path: Path) -> None:
    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, _ = await talk(client)
        home = home_of(link)
        (other,) = set(link.stations) - {home}
        link.strayed = [other]
        reply = await client.get(f"/v1/sessions/{id_}")
        assert reply.headers["x-flashrt-replica"] == home and front.tally.repeated == 1
        assert reply.headers["x-flashrt-tries"] == "2"
        reply = await client.get(f"/v1/sessions/{id_}")
        assert "x-flashrt-tries" not in reply.headers
        assert link.stations[other].homing.n_adopted == 0
        await front.drain(home)
        with pytest.raises(NotHere):  # it has left: nothing begins there, whoever sends it
            await anext(link.stations[home].answer(home, {}, b"", Arrival()))

    run(work, *[options_of(tmp_path)] * 2)


def test_the_last_replica_is_not_drained(tmp_path: Path) -> None:
    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        with pytest.raises(FleetError, match="the only replica"):
            await front.drain("a")
        with pytest.raises(FleetError, match=r"no replica 'x' to drain; there are: a$"):
            await front.drain("x")

    run(work, options_of(tmp_path))


def test_a_store_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    async def work(front: Front, link: LocalLink, client: httpx.AsyncClient) -> None:
        id_, _ = await talk(client)
        (folder,) = (tmp_path / "serve").iterdir()
        file = folder / id_ / "session.json"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        body = {"session": id_, "messages": [{"role": "user", "content": MORE}], "max_tokens": 6}
        refused = await client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 500
        file.write_bytes(whole)
        view = (await client.get(f"/v1/sessions/{id_}")).json()
        assert view["n_nodes"] == 3 and not view["is_busy"]
        await say(client, id_, MORE)

    run(work, options_of(tmp_path))
