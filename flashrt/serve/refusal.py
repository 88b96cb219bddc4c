"""Refusals: errors as each API words them.

IS: a status, a kind and the parameter at fault; the shapes of OpenAI's and Anthropic's error
bodies; which status an error of flashrt is. IS NOT: a check of anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from flashrt.base.errors import FlashrtError, ImageError, LaneBusy, PoolFull, SessionError
from flashrt.serve.ask import (
    BadSlotFile,
    Closing,
    ForeignSession,
    NoSession,
    NoSlot,
    NoSlotFile,
    QueueFull,
    SessionBusy,
    SessionConflict,
    TimedOut,
)
from flashrt.text.template import ChatError

Shape = Literal["openai", "anthropic"]
_OPENAI_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    412: "etag_mismatch",
    413: "request_too_large",
    422: "idempotency_key_reused",
    429: "queue_full",
    501: "not_implemented",
    503: "unavailable",
    504: "timeout",
}


@dataclass
class Refusal(Exception):
    """An answer with a status above 399. `param`: the parameter at fault, as a path."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    def body(self, shape: Shape) -> dict[str, Any]:
        """The JSON body in an API's own shape."""
        if shape == "anthropic":
            kind = _ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
            named = f"{self.param}: {self.message}" if self.param else self.message
            return {"type": "error", "error": {"type": kind, "message": named}}
        kind = _OPENAI_KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code or _CODES.get(self.status),
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status == 408:
            return {"connection": "close"}
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def bad(param: str | None, message: str, code: str | None = None) -> Refusal:
    """A request that is wrong at a parameter."""
    return Refusal(400, message, param, code)


def refusal_of(error: FlashrtError) -> Refusal:
    """What an error of flashrt is as an answer; its words are made for users."""
    if isinstance(error, QueueFull):
        return Refusal(429, str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, Closing):
        return Refusal(503, str(error), retry_after_s=5.0)
    if isinstance(error, TimedOut):
        return Refusal(504, str(error))
    if isinstance(error, NoSession):
        return Refusal(404, str(error), "session")
    if isinstance(error, SessionBusy | SessionConflict):
        return Refusal(409, str(error), "session", "conflict")
    if isinstance(error, ForeignSession):
        return Refusal(409, str(error), "session", "foreign_session")
    if isinstance(error, NoSlot):
        return Refusal(400, str(error), "id", "invalid_slot")
    if isinstance(error, NoSlotFile):
        return Refusal(404, str(error), "filename")
    if isinstance(error, BadSlotFile):
        return Refusal(400, str(error), "filename", "invalid_slot_file")
    if isinstance(error, ChatError | ImageError):
        code = "invalid_image" if isinstance(error, ImageError) else None
        return Refusal(400, str(error), "messages", code)
    if isinstance(error, SessionError):
        return Refusal(400, str(error))
    if isinstance(error, LaneBusy | PoolFull):
        return Refusal(503, str(error), retry_after_s=1.0)
    return Refusal(500, str(error))
