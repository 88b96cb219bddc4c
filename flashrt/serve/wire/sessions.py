"""/v1/sessions: trees of turns that are named, forked and rolled back over HTTP.

IS: the routes, their JSON, ETags and If-Match. IS NOT: what a session is (serve.sessions), or
turns: a chat request with the field `session` makes one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.responses import Response

from flashrt.engine.sight import Image
from flashrt.serve.ask import SessionConflict
from flashrt.serve.conversation import glanced
from flashrt.serve.desk import Desk
from flashrt.serve.http import Call, Json
from flashrt.serve.refusal import Refusal
from flashrt.serve.sessions import MOST_NAME, NodeView, SessionView
from flashrt.serve.wire.threads import check_match

_T = TypeVar("_T")


class SessionRoutes:
    """The routes. Whoever has another key gets 404 for all of a session."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def create(self, call: Call) -> Response:
        """POST /v1/sessions {"name"?}: an empty session."""
        call.fields.only({"name"})
        made = await _done(self._desk.sessions.create(call.owner, _name(call)))
        return _session(made, 201)

    async def list(self, call: Call) -> Response:
        """GET /v1/sessions, oldest first."""
        found = await _done(self._desk.sessions.list(call.owner))
        return Json({"object": "list", "data": [session_json(view) for view in found]})

    async def get(self, call: Call) -> Response:
        """GET /v1/sessions/{id}."""
        return _session(await self._view(call))

    async def tree(self, call: Call) -> Response:
        """GET /v1/sessions/{id}/tree, parents before children."""
        found = await _done(self._desk.sessions.tree(call.owner, _id(call)))
        body = {
            "object": "session.tree",
            "session": session_json(found.session),
            "nodes": [node_json(node) for node in found.nodes],
        }
        return Json(body, headers=_headers(found.session))

    async def node(self, call: Call) -> Response:
        """GET /v1/sessions/{id}/nodes/{node}: with messages and text of its own, by id or name."""
        which = call.request.path_params["node"]
        found = await _done(self._desk.sessions.turn(call.owner, _id(call), which))
        text = await asyncio.to_thread(self._desk.served.text_of, found.tokens)
        return Json(
            {
                **node_json(found.node),
                "etag": found.etag,
                "messages": list(found.messages),
                "text": text,
            }
        )

    async def snapshot(self, call: Call) -> Response:
        """POST /v1/sessions/{id}/snapshot {"name"}: the tip has a name."""
        call.fields.only({"name"})
        name = _name(call)
        if name is None:
            raise call.fields.refuse("name", "a name for the tip")
        view = await self._matched(call)
        etag = view.etag if view else None
        verbs = self._desk.sessions
        await _changed(verbs.snapshot(call.owner, _id(call), name, etag=etag))
        return _session(await self._view(call))

    async def fork(self, call: Call) -> Response:
        """POST /v1/sessions/{id}/fork {"node"?, "name"?}: another session, at a node of this."""
        call.fields.only({"node", "name"})
        node, name = call.fields.text("node"), _name(call)
        view = await self._matched(call)
        if view is not None and node is None:
            node = view.tip  # the one that was meant, whatever happens meanwhile
        made = await _done(self._desk.sessions.fork(call.owner, _id(call), node, name))
        return _session(made, 201)

    async def rollback(self, call: Call) -> Response:
        """POST /v1/sessions/{id}/rollback {"turns" | "node" | "position"}: default is one turn."""
        fields = call.fields
        fields.only({"turns", "node", "position"})
        turns, node = fields.whole("turns", 0), fields.text("node")
        position = fields.whole("position", 0)
        given = [value for value in (turns, node, position) if value is not None]
        if len(given) > 1:
            raise Refusal(400, "give one of turns, node and position", "turns")
        view = await self._matched(call)
        verbs = self._desk.sessions
        images: tuple[Image, ...] = ()
        if position is not None:  # rows may have to be fed again
            told = await _done(verbs.messages(call.owner, _id(call)))
            images = await glanced(self._desk, call.request, told)
        future = verbs.rollback(
            call.owner, _id(call), turns=turns if given else 1, node=node, position=position,
            etag=view.etag if view else None, images=images,
        )  # fmt: skip
        return _session(await _changed(future))

    async def restore(self, call: Call) -> Response:
        """POST /v1/sessions/{id}/restore {"node"}: the tip is any node, by id or name."""
        call.fields.only({"node"})
        node = call.fields.needed_text("node")
        view = await self._matched(call)
        etag = view.etag if view else None
        return _session(
            await _changed(self._desk.sessions.restore(call.owner, _id(call), node, etag=etag))
        )

    async def delete(self, call: Call) -> Response:
        """DELETE /v1/sessions/{id}: what no other session needs goes too."""
        view = await self._matched(call)
        etag = view.etag if view else None
        await _changed(self._desk.sessions.delete(call.owner, _id(call), etag=etag))
        return Json({"id": _id(call), "object": "session", "deleted": True})

    async def _view(self, call: Call) -> SessionView:
        return await _done(self._desk.sessions.view(call.owner, _id(call)))

    async def _matched(self, call: Call) -> SessionView | None:
        """The state that If-Match matches; None where there is no such header."""
        if "if-match" not in call.request.headers:
            return None
        view = await self._view(call)
        check_match(call.request, view)
        return view


def session_json(view: SessionView) -> dict[str, Any]:
    """A session, as it was."""
    forked = view.forked_from
    return {
        "id": view.id,
        "object": "session",
        "name": view.name,
        "created": view.created,
        "tip": view.tip,
        "root": view.root,
        "position": view.position,
        "etag": view.etag,
        "is_busy": view.is_busy,
        "n_nodes": view.n_nodes,
        "forked_from": None if forked is None else {"session": forked[0], "node": forked[1]},
    }


def node_json(node: NodeView) -> dict[str, Any]:
    """A node, as it was."""
    return {
        "id": node.id,
        "object": "session.node",
        "parent": node.parent,
        "position": node.position,
        "base": node.base,
        "digest": node.digest,
        "nbytes": node.nbytes,
        "tier": node.tier,
        "name": node.name,
        "created": node.created,
        "reason": node.reason,
        "n_messages": node.n_messages,
    }


def _session(view: SessionView, status: int = 200) -> Response:
    return Json(session_json(view), status, headers=_headers(view))


def _headers(view: SessionView) -> dict[str, str]:
    return {"etag": f'"{view.etag}"', "cache-control": "no-store"}


def _id(call: Call) -> str:
    return str(call.request.path_params["id"])


def _name(call: Call) -> str | None:
    name = call.fields.text("name")
    if name is not None and not 0 < len(name) <= MOST_NAME:
        raise call.fields.refuse("name", f"1 to {MOST_NAME} characters")
    return name


async def _done(future: Future[_T]) -> _T:
    """A change is carried out even if the client goes: half of one is never seen."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def _changed(future: Future[_T]) -> _T:
    try:
        return await _done(future)
    except SessionConflict as error:  # it moved on since If-Match was compared
        raise Refusal(412, str(error), "if-match") from error
