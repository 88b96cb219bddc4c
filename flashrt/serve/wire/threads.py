"""Requests in a session: its own conversation goes before what is new.

IS: the `session` field of chat requests, and If-Match. IS NOT: the routes of sessions (sessions),
or what becomes of a turn (serve.sessions).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from starlette.requests import Request

from flashrt.serve.conversation import Conversation
from flashrt.serve.core import Sessions
from flashrt.serve.http import Call
from flashrt.serve.refusal import Refusal
from flashrt.serve.sessions import SessionView
from flashrt.serve.wire import common

_ORDERS = ("system", "developer")


async def resumed(call: Call, sessions: Sessions, told: Conversation) -> Conversation:
    """A conversation as its session has it, with what is new; as it is for none.

    Messages are new, unless they begin with all that the session has: clients that know of no
    sessions send everything each time. A first system message that the session begins with too is
    not said again. Raises NoSession, and Refusal (412) for one that If-Match does not match.
    """
    id_ = common.session_of(call.fields)
    if id_ is None:
        return told
    view = await asyncio.wrap_future(sessions.view(call.owner, id_))
    check_match(call.request, view)
    # Of that node, wherever the tip goes meanwhile; the turn begins there, or not at all.
    known = await asyncio.wrap_future(sessions.messages(call.owner, id_, view.tip))
    new = told.messages
    if known and len(new) > len(known) and all(map(_is_same, known, new)):
        new = new[len(known) :]
    elif known and len(new) > 1 and new[0]["role"] in _ORDERS and _is_same(known[0], new[0]):
        new = new[1:]
    told.messages = [*map(dict, known), *new]
    told.session, told.tip, told.known = id_, view.tip, len(known)
    return told


def check_match(request: Request, view: SessionView) -> None:
    """Refuse (412) where If-Match names other states than the session's."""
    wanted = _etags(request)
    if wanted is not None and view.etag not in wanted:
        raise Refusal(
            412,
            f'session {view.id} is at "{view.etag}", which If-Match does not name; look again',
            "if-match",
        )


def _etags(request: Request) -> Collection[str] | None:
    """What If-Match names; None for anything. Weak ones match nothing."""
    given = request.headers.getlist("if-match")
    names = [name.strip() for line in given for name in line.split(",")]
    if not names or "*" in names:
        return None
    return {name[1:-1] for name in names if len(name) > 1 and name[0] == name[-1] == '"'}


def _is_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """But for thoughts, which clients seldom send back."""
    left_out = "reasoning_content"
    one, other = ({k: v for k, v in m.items() if v and k != left_out} for m in (old, new))
    return one == other
