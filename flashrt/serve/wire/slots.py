"""/slots, as llama.cpp's server has it: the lanes, and their states by hand.

IS: the routes and their JSON. IS NOT: what becomes of a state (serve.slots).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.responses import Response

from flashrt.base.messages import printable
from flashrt.serve.core import Core
from flashrt.serve.desk import Desk
from flashrt.serve.http import Call, Json
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.wire.status import status_of

ACTIONS = ("save", "restore", "erase")
_T = TypeVar("_T")


class SlotRoutes:
    """The routes."""

    def __init__(self, desk: Desk, core: Core) -> None:
        self._desk, self._core = desk, core

    async def list(self, call: Call) -> Response:
        """GET /slots: a lane is a slot. What others are asking is not told."""
        status = await status_of(self._core)
        size = self._desk.served.engine.max_positions
        slots = [
            {
                "id": lane.index,
                "n_ctx": size,
                "is_processing": lane.state != "idle",
                "state": lane.state,
                "n_past": lane.position,
                "n_prompt_tokens": lane.prompt_tokens,
                "n_decoded": lane.generated_tokens,
            }
            for lane in status.lanes
        ]
        return Json(slots)

    async def act(self, call: Call) -> Response:
        """POST /slots/{id}?action=save|restore|erase. A slot that is busy is waited for."""
        lane, verbs = _lane(call), self._core.slots
        action = call.request.query_params.get("action", "")
        if action not in ACTIONS:
            given = printable(action[:80])
            raise bad("action", f"action is {given!r}; give one of {', '.join(ACTIONS)}")
        if action == "erase":
            n = await self._done(verbs.erase(call.owner, lane))
            return Json({"id_slot": lane, "n_erased": n})
        name = call.fields.needed_text("filename")
        if not verbs.has_store:
            raise Refusal(
                501,
                "there is no place to save slots to, or to restore them from; start the server "
                "with --store DIR",
                "action",
            )
        verb = verbs.save if action == "save" else verbs.restore
        done = await self._done(verb(call.owner, lane, name))
        body: dict[str, Any] = {"id_slot": lane, "filename": name}
        if action == "save":
            body |= {"n_saved": done.n_tokens, "n_written": done.nbytes}
        else:
            body |= {"n_restored": done.n_tokens, "n_read": done.nbytes}
        return Json({**body, "timings": {f"{action}_ms": done.seconds * 1e3}})

    async def _done(self, future: Future[_T]) -> _T:
        """Its answer; where that is not begun within the time that a request has, it never is."""
        timeout_s = self._desk.access.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as error:
            if not future.cancel():
                return await asyncio.wrap_future(future)
            raise Refusal(504, f"the slot was busy for {timeout_s:g} s") from error


def _lane(call: Call) -> int:
    given = str(call.request.path_params["id"])
    if not (given.isascii() and given.isdecimal()) or len(given) > 9:
        raise bad("id", f"{printable(given[:80])!r} is not the number of a slot")
    return int(given)
