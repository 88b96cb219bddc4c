"""The app: every route, behind the gate.

IS: which path is which handler, and errors of routing in the API's own shape. IS NOT: a server (see
listen), or what a handler does (wire).
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flashrt.serve.access import Access
from flashrt.serve.core import Core
from flashrt.serve.desk import Desk
from flashrt.serve.gate import Gate, refuse, shape_of
from flashrt.serve.history import History
from flashrt.serve.http import Handler, endpoint, hidden
from flashrt.serve.idempotency import Idempotency
from flashrt.serve.refusal import Refusal
from flashrt.serve.served import Served
from flashrt.serve.wire.chat_completions import ChatCompletions
from flashrt.serve.wire.completions import Completions
from flashrt.serve.wire.messages import CountTokens, Messages
from flashrt.serve.wire.openapi import OpenApi
from flashrt.serve.wire.page import page
from flashrt.serve.wire.responses import Responses
from flashrt.serve.wire.sessions import SessionRoutes
from flashrt.serve.wire.slots import SlotRoutes
from flashrt.serve.wire.status import StatusRoutes
from flashrt.serve.wire.tokens import ApplyTemplate, Detokenize, Tokenize


def make_app(
    core: Core,
    served: Served,
    access: Access,
    is_draining: Callable[[], bool] = lambda: False,
    history: History | None = None,
    inner: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> ASGIApp:
    """The ASGI app of a running core. history: where responses are kept (default: in memory).
    inner: a layer between the gate and the routes: it knows the owner, in the scope's state.
    """
    desk = Desk(core, served, access)
    status = StatusRoutes(desk, core)
    responses = Responses(desk, history or History())
    chat, completions, messages = ChatCompletions(desk), Completions(desk), Messages(desk)
    sessions, once = SessionRoutes(desk), Idempotency().of
    slots = SlotRoutes(desk, core)
    handlers: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/chat/completions", chat),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/responses", responses.create),
        ("GET", "/v1/responses/{id}", responses.get),
        ("DELETE", "/v1/responses/{id}", responses.delete),
        ("POST", "/v1/messages", messages),
        ("POST", "/v1/messages/count_tokens", CountTokens(desk)),
        ("GET", "/v1/models", status.models),
        ("GET", "/v1/models/{id:path}", status.model),
        ("GET", "/v1/sessions", sessions.list),
        ("POST", "/v1/sessions", once(sessions.create)),
        ("GET", "/v1/sessions/{id}", sessions.get),
        ("DELETE", "/v1/sessions/{id}", sessions.delete),
        ("GET", "/v1/sessions/{id}/tree", sessions.tree),
        ("GET", "/v1/sessions/{id}/nodes/{node}", sessions.node),
        ("POST", "/v1/sessions/{id}/snapshot", once(sessions.snapshot)),
        ("POST", "/v1/sessions/{id}/fork", once(sessions.fork)),
        ("POST", "/v1/sessions/{id}/rollback", once(sessions.rollback)),
        ("POST", "/v1/sessions/{id}/restore", once(sessions.restore)),
        ("GET", "/v1/status", status.overview),
        ("GET", "/v1/arena.svg", status.arena),
        ("POST", "/tokenize", Tokenize(desk)),
        ("POST", "/detokenize", Detokenize(desk)),
        ("POST", "/apply-template", ApplyTemplate(desk)),
        ("GET", "/health", status.health),
        ("GET", "/v1/health", status.health),
        ("GET", "/props", status.props),
        ("GET", "/slots", slots.list),
        ("POST", "/slots/{id}", slots.act),
        ("GET", "/metrics", status.metrics),
        ("GET", "/openapi.json", OpenApi()),
        ("GET", "/", page),
        ("GET", "/page/{name}", page),
    ]
    routes = [
        Route(path, endpoint(handler, access), methods=[method])
        for method, path, handler in handlers
    ]

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "it was registered for these"
        path = request.url.path[:200]
        words = {
            404: f"there is nothing at {path}",
            405: f"{request.method} is not what {path} takes",
        }.get(error.status_code, error.detail)
        response = refuse(Refusal(error.status_code, words), shape_of(request.scope))
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return refuse(hidden(error, access), shape_of(request.scope))

    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, Exception: failed})
    return Gate(inner(app), access, is_draining)
