"""Idempotency-Key: a request that is sent again gets the answer of the first, and does nothing.

IS: answers of changes, by owner and key, the oldest forgotten. IS NOT: kept over a restart, or for
answers that stream: for turns, If-Match does what is needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.responses import Response

from flashrt.serve.http import Call, Handler
from flashrt.serve.refusal import Refusal

MOST_KEPT = 1000  # of one owner
MOST_KEY = 255  # characters


@dataclass(slots=True)
class _Kept:
    digest: str  # of the request
    answer: asyncio.Future[Response]


class Idempotency:
    """Used in the event loop alone."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[str, _Kept]] = {}

    def of(self, handler: Handler) -> Handler:
        """The handler, run once per key. An error is not kept: nothing was changed, and the next
        one tries again.
        """

        async def run(call: Call) -> Response:
            key = call.request.headers.get("idempotency-key")
            if key is None:
                return await handler(call)
            if not 0 < len(key) <= MOST_KEY:
                raise Refusal(400, f"Idempotency-Key: give 1 to {MOST_KEY} characters")
            return await self._once(call, key, lambda: handler(call))

        return run

    async def _once(
        self, call: Call, key: str, work: Callable[[], Awaitable[Response]]
    ) -> Response:
        kept = self._kept.setdefault(call.owner, OrderedDict())
        digest = _digest(call)
        while (found := kept.get(key)) is not None:
            if found.digest != digest:
                raise Refusal(
                    422,
                    "this Idempotency-Key came with another request; use a new one",
                    "idempotency-key",
                )
            # A waiter that goes away must not take the others' answer with it.
            await asyncio.wait({found.answer})
            if not found.answer.cancelled():
                return found.answer.result()
        made: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        mine = kept[key] = _Kept(digest, made)
        try:
            response = await work()
        except BaseException:
            if kept.get(key) is mine:
                del kept[key]
            made.cancel()  # those who wait try by themselves
            raise
        made.set_result(response)
        while len(kept) > MOST_KEPT:
            kept.popitem(last=False)
        return response


def _digest(call: Call) -> str:
    request = call.request
    body = json.dumps(call.fields.value, sort_keys=True)
    match = request.headers.get("if-match", "")
    text = "\n".join((request.method, request.url.path, match, body))
    return hashlib.sha256(text.encode()).hexdigest()
