"""The gate: what a request must pass before any route sees it.

IS: an ASGI layer that checks Host, Origin and API key, answers CORS, and turns requests away while
the server shuts down. IS NOT: routes (app), or limits of a body (http).

Host and Origin are checked because a page in a browser can reach loopback: by a name that an
attacker points there, or by a form that needs no permission.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrt.base.messages import printable
from flashrt.serve.access import Access
from flashrt.serve.refusal import Refusal, Shape

OPEN_PATHS = frozenset({  # they tell nothing that a key protects
    "/health", "/v1/health", "/", "/page/page.css", "/page/page.js", "/page/tree.js",
    "/page/icon.svg", "/openapi.json",
})  # fmt: skip
_CORS = {
    "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
    "access-control-max-age": "600",
}


def shape_of(scope: Scope) -> Shape:
    """Which API's errors a client expects."""
    path: str = scope["path"]
    is_anthropic = path.startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope)
    return "anthropic" if is_anthropic else "openai"


def refuse(refusal: Refusal, shape: Shape) -> Response:
    """The response that a refusal is."""
    return JSONResponse(refusal.body(shape), refusal.status, refusal.headers())


class Gate:
    """`is_draining`: whether the server shuts down. The owner goes into the scope's state."""

    def __init__(self, app: ASGIApp, access: Access, is_draining: Callable[[], bool]) -> None:
        self._app, self._access, self._is_draining = app, access, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = self._allowed(origin)
        answer = send if allowed is None else _with_cors(send, allowed)
        try:
            self._check_host(headers)
            self._check_origin(headers, origin, allowed)
            if allowed and scope["method"] == "OPTIONS":
                asked = headers.get("access-control-request-headers", "*")
                extra = {**_CORS, "access-control-allow-headers": asked}
                await Response(status_code=204, headers=extra)(scope, receive, answer)
                return
            scope.setdefault("state", {})["owner"] = self._owner(scope, headers)
            if self._is_draining():
                raise Refusal(503, "the server is shutting down", retry_after_s=5.0)
        except Refusal as refusal:
            await refuse(refusal, shape_of(scope))(scope, receive, answer)
            return
        await self._app(scope, receive, answer)

    def _allowed(self, origin: str | None) -> str | None:
        """What to answer a page of that origin with; None for nothing."""
        if origin is None or not self._access.origins:
            return None
        if "*" in self._access.origins:
            return "*"
        return origin if origin in self._access.origins else None

    def _check_host(self, headers: Headers) -> None:
        hosts = self._access.hosts
        given = headers.get("host", "")
        name = (urlsplit(f"//{given}").hostname or "") if _is_plain(given) else ""
        if hosts and name.lower() not in hosts:
            raise Refusal(
                403,
                f"the server answers to {', '.join(sorted(hosts))}, not to the host "
                f"{printable(given)!r} (--allow-host)",
                code="host_not_allowed",
            )

    @staticmethod
    def _check_origin(headers: Headers, origin: str | None, allowed: str | None) -> None:
        if origin is None or allowed is not None:
            return
        own = headers.get("host", "")
        if origin.partition("://")[2] != own:
            raise Refusal(
                403,
                f"pages of {printable(origin)} may not use this server (--cors)",
                code="origin_not_allowed",
            )

    def _owner(self, scope: Scope, headers: Headers) -> str:
        key = headers.get("x-api-key")
        if key is None:
            kind, _, value = headers.get("authorization", "").partition(" ")
            key = value.strip() if kind.lower() == "bearer" else None
        owner = self._access.owner(key)
        if owner is None and scope["path"] in OPEN_PATHS:
            return ""
        if owner is None:
            what = "is missing" if key is None else "is not one of this server's"
            how = "send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise Refusal(401, f"the API key {what}; {how}")
        return owner


def _is_plain(host: str) -> bool:
    try:
        urlsplit(f"//{host}").hostname  # noqa: B018 (raises for half a bracket)
    except ValueError:
        return False
    return not set(host) & set("/?#@\\ ")


def _with_cors(send: Send, allowed: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = allowed
            headers.add_vary_header("origin")
        await send(message)

    return sending
