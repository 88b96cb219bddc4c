"""HTTP of a request: its body within limits, its answer as JSON or as a stream of events.

IS: what every route shares: reading, refusing, server-sent events, and noticing that a client has
gone. IS NOT: who may ask (gate), or any API's JSON (wire).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import visible
from flashrt.serve.access import Access
from flashrt.serve.body import Fields, parse
from flashrt.serve.gate import refuse, shape_of
from flashrt.serve.refusal import Refusal, Shape, refusal_of

log = logging.getLogger("flashrt.serve")
_T = TypeVar("_T")
_DATA, _SHOWN_NBYTES = re.compile(rb"[A-Za-z0-9+/\\]{2000,}"), 40  # images, in the log
_CLIENT_GONE = 499  # nobody reads it; for the log


@dataclass(frozen=True, slots=True)
class Call:
    """A request that passed the gate. `owner`: whose it is."""

    request: Request
    owner: str
    fields: Fields
    shape: Shape


class Cancellable(Protocol):
    """An answer that nobody may want any more."""

    def cancel(self) -> None:
        """See Answer."""


Handler = Callable[[Call], Awaitable[Response]]


def endpoint(handler: Handler, access: Access) -> Callable[[Request], Awaitable[Response]]:
    """A starlette endpoint whose errors have the API's own shape."""

    async def run(request: Request) -> Response:
        response = await answered(request)
        log.info("%s %s %d", request.method, visible(request.url.path)[:200], response.status_code)
        return response

    async def answered(request: Request) -> Response:
        shape = shape_of(request.scope)
        try:
            fields = Fields({})
            if request.method == "POST":
                body = await _body(request, access)
                if access.logs_prompts:
                    log.info("%s", visible(_DATA.sub(_cut, body).decode(errors="replace")))
                # Large ones take a while, and others wait for this thread.
                if len(body) >= 65_536:
                    fields = await asyncio.to_thread(parse, body)
                elif body:  # none at all is an object without fields
                    fields = parse(body)
            return await handler(Call(request, request.scope["state"]["owner"], fields, shape))
        except Refusal as refusal:
            return refuse(refusal, shape)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception as error:
            return refuse(_worded(error, access), shape)

    return run


def _worded(error: Exception, access: Access) -> Refusal:
    """What an error is as an answer."""
    if isinstance(error, Refusal):
        return error
    found = refusal_of(error) if isinstance(error, FlashrtError) else None
    return hidden(error, access) if found is None or found.status == 500 else found


def hidden(error: Exception, access: Access) -> Refusal:
    """A fault of the server as an answer that tells nothing; its story goes to the log. Words of an
    error that is not flashrt's may be a prompt's, so they do not.
    """
    name = f"err_{secrets.token_hex(8)}"
    is_told = access.logs_prompts or isinstance(error, FlashrtError)
    words = f": {visible(str(error))}" if is_told else ""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s%s\n%s", name, type(error).__name__, words, frames)
    return Refusal(500, f"an error in the server; its log tells more under {name}", code=name)


def _cut(found: re.Match[bytes]) -> bytes:
    return found[0][:_SHOWN_NBYTES] + b"..."


async def _body(request: Request, access: Access) -> bytes:
    most = access.body_nbytes
    stated = request.headers.get("content-length", "")
    too_large = Refusal(413, f"the body has over {most:,} bytes, the most that is taken")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise too_large
    pieces: list[bytes] = []
    count = 0
    try:
        async with asyncio.timeout(access.body_s):
            async for piece in request.stream():
                count += len(piece)
                if count > most:
                    raise too_large
                pieces.append(piece)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {access.body_s:g} s") from error
    return b"".join(pieces)


async def unless_gone(
    request: Request, answer: Cancellable, result: Coroutine[Any, Any, Response]
) -> Response:
    """The result; if the client goes first, the answer is cancelled."""
    work = asyncio.ensure_future(result)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else Response(status_code=_CLIENT_GONE)
    finally:
        answer.cancel()
        for task in (work, watch):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def unless_left(request: Request, result: Awaitable[_T]) -> _T:
    """The result; raises ClientDisconnect if the client goes first."""
    work, watch = asyncio.ensure_future(result), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, until they end or the client goes; then the answer is cancelled.

    `failed` words what ends them early, in the API's own way.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Cancellable,
        chunks: AsyncIterator[str],
        failed: Callable[[Refusal], str],
        access: Access,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._chunks, self._failed, self._access = answer, chunks, failed, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        work = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answer.cancel()
            for task in (work, watch):
                if not task.done():
                    task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for text in self._said():
            data = text.encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _said(self) -> AsyncIterator[str]:
        try:
            async for text in self._chunks:
                yield text
        except Exception as error:
            yield self._failed(_worded(error, self._access))


def sse(value: object, event: str | None = None) -> str:
    """One event."""
    head = "" if event is None else f"event: {event}\n"
    data = value if isinstance(value, str) else dumps(value)
    return f"{head}data: {data}\n\n"


QUIET = ": still here\n\n"  # a comment, for proxies that close what is silent


def dumps(value: object) -> str:
    """Compact JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class Json(JSONResponse):
    """JSON as `dumps` has it."""

    def render(self, content: Any) -> bytes:
        """See starlette."""
        return dumps(content).encode()
