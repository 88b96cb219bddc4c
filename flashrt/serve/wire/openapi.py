"""GET /openapi.json: every route of the server, as OpenAPI 3.1 describes it.

IS: the table of routes with what they take and give. IS NOT: the routes (app), or a reference of
OpenAI's and Anthropic's APIs: of theirs the fields are named, and what they mean is theirs to say.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.responses import Response

from flashrt.serve.http import Call, Json
from flashrt.serve.wire.slots import ACTIONS

_JSON, _SSE = "application/json", "text/event-stream"
_PLAIN = {"string", "integer", "number", "boolean", "object"}

# Fields: "name: type"; "!" after the name for those that are always there. Types: those of JSON,
# names of schemas, [T] for lists, T | null, any.
_SAMPLING = (
    "temperature: number", "top_p: number", "top_k: integer", "min_p: number", "seed: integer",
    "presence_penalty: number", "frequency_penalty: number", "repetition_penalty: number",
    "logit_bias: object", "priority: integer",
)  # fmt: skip
_SCHEMAS: dict[str, tuple[str, ...]] = {
    "Error": ("error!: ErrorDetail",),
    "ErrorDetail": (
        "message!: string", "type!: string", "param!: string | null", "code!: string | null",
    ),
    "Deleted": ("id!: string", "object!: string", "deleted!: boolean"),
    "List": ("object!: string", "data!: [object]"),
    "Place": ("id!: string", "node!: string", "etag!: string | null", "nodes: [string | null]"),
    "Usage": (
        "prompt_tokens!: integer", "completion_tokens!: integer", "total_tokens!: integer",
        "prompt_tokens_details: object",
    ),
    "ChatRequest": (
        "messages!: [object]", "model: string", "stream: boolean", "stream_options: object",
        "n: integer", "stop: any", "logprobs: boolean", "top_logprobs: integer",
        "max_tokens: integer", "max_completion_tokens: integer", "tools: [object]",
        "tool_choice: any", "parallel_tool_calls: boolean", "response_format: object",
        "chat_template_kwargs: object", "reasoning_effort: string",
        "continue_final_message: boolean", "session: string", *_SAMPLING,
    ),
    "ChatCompletion": (
        "id!: string", "object!: string", "created!: integer", "model!: string",
        "choices!: [object]", "usage: Usage", "timings: object", "session: Place",
    ),
    "CompletionRequest": (
        "prompt!: any", "model: string", "stream: boolean", "stream_options: object", "n: integer",
        "stop: any", "logprobs: integer", "max_tokens: integer", "echo: boolean",
        "session: string", *_SAMPLING,
    ),
    "ResponseRequest": (
        "input!: any", "model: string", "instructions: string", "previous_response_id: string",
        "max_output_tokens: integer", "stream: boolean", "tools: [object]", "tool_choice: any",
        "text: object", "reasoning: object", "session: string", *_SAMPLING,
    ),
    "MessagesRequest": (
        "model!: string", "messages!: [object]", "max_tokens: integer", "system: any",
        "stop_sequences: [string]", "stream: boolean", "tools: [object]", "tool_choice: object",
        "thinking: object", "temperature: number", "top_p: number", "top_k: integer",
        "session: string",
    ),
    "Session": (
        "id!: string", "object!: string", "name!: string | null", "created!: number",
        "tip!: string", "root!: string", "position!: integer", "etag!: string",
        "is_busy!: boolean", "n_nodes!: integer", "forked_from!: ForkedFrom | null",
    ),
    "ForkedFrom": ("session!: string", "node!: string"),
    "SessionList": ("object!: string", "data!: [Session]"),
    "Node": (
        "id!: string", "object!: string", "parent!: string | null", "position!: integer",
        "base!: integer", "digest!: string | null", "nbytes!: integer", "tier!: string",
        "name!: string | null", "created!: number", "reason!: string", "n_messages!: integer",
    ),
    "Turn": ("etag!: string", "messages!: [object]", "text!: string"),  # and what a Node has
    "Tree": ("object!: string", "session!: Session", "nodes!: [Node]"),
    "CreateRequest": ("name: string",),
    "SnapshotRequest": ("name!: string",),
    "ForkRequest": ("node: string", "name: string"),
    "RollbackRequest": ("turns: integer", "node: string", "position: integer"),
    "RestoreRequest": ("node!: string",),
    "Status": (
        "object!: string", "model!: string", "device!: string", "fingerprint!: string",
        "max_positions!: integer", "sees!: boolean", "lanes!: [object]", "queue!: object",
        "turns!: [object]", "capsules!: object", "pool!: object",
    ),
    "SlotRequest": ("filename: string",),
    "SlotDone": (
        "id_slot!: integer", "filename: string", "n_saved: integer", "n_written: integer",
        "n_restored: integer", "n_read: integer", "n_erased: integer", "timings: object",
    ),
    "TokenizeRequest": (
        "content!: string", "add_special: boolean", "with_pieces: boolean", "model: string",
    ),
    "DetokenizeRequest": ("tokens!: [integer]", "model: string"),
    "Any": (),
}  # fmt: skip
_SCHEMAS["Turn"] = (*_SCHEMAS["Node"], *_SCHEMAS["Turn"])


@dataclass(frozen=True, slots=True)
class _Route:
    """takes, gives: names of schemas; gives may be a media type. notes: "stream", "match", "once",
    "action" (of the query), "open" (no key is asked for).
    """

    method: str
    path: str
    summary: str
    takes: str = ""
    gives: str = "Any"
    notes: str = ""
    status: int = 200


_ROUTES = (
    _Route("POST", "/v1/chat/completions", "A reply to a conversation, as OpenAI has it; with "
           "`session`, to that session's conversation and the new messages", "ChatRequest",
           "ChatCompletion", "stream match"),
    _Route("POST", "/chat/completions", "The same", "ChatRequest", "ChatCompletion",
           "stream match"),
    _Route("POST", "/v1/completions", "Text after a prompt, as OpenAI has it",
           "CompletionRequest", "Any", "stream"),
    _Route("POST", "/v1/responses", "A response, as OpenAI has it", "ResponseRequest", "Any",
           "stream match"),
    _Route("GET", "/v1/responses/{id}", "A response that was kept"),
    _Route("DELETE", "/v1/responses/{id}", "Forget a response", "", "Deleted"),
    _Route("POST", "/v1/messages", "A reply, as Anthropic has it", "MessagesRequest", "Any",
           "stream match"),
    _Route("POST", "/v1/messages/count_tokens", "The tokens of a request", "MessagesRequest"),
    _Route("GET", "/v1/models", "The model that is served", "", "List"),
    _Route("GET", "/v1/models/{id}", "One model"),
    _Route("GET", "/v1/sessions", "The key's sessions, oldest first", "", "SessionList"),
    _Route("POST", "/v1/sessions", "A new session", "CreateRequest", "Session", "once", 201),
    _Route("GET", "/v1/sessions/{id}", "A session", "", "Session"),
    _Route("DELETE", "/v1/sessions/{id}", "Forget a session", "", "Deleted", "match"),
    _Route("GET", "/v1/sessions/{id}/tree", "A session with all its nodes, parents first", "",
           "Tree"),
    _Route("GET", "/v1/sessions/{id}/nodes/{node}", "A node, by id or name, with its messages and "
           "its text", "", "Turn"),
    _Route("POST", "/v1/sessions/{id}/snapshot", "Give the tip a name", "SnapshotRequest",
           "Session", "match once"),
    _Route("POST", "/v1/sessions/{id}/fork", "Another session, at a node of this one (default: the "
           "tip)", "ForkRequest", "Session", "match once", 201),
    _Route("POST", "/v1/sessions/{id}/rollback", "The tip is so many turns earlier (default: one), "
           "a node before it, or its state at an earlier position", "RollbackRequest", "Session",
           "match once"),
    _Route("POST", "/v1/sessions/{id}/restore", "The tip is any node, by id or name",
           "RestoreRequest", "Session", "match once"),
    _Route("GET", "/v1/status", "Lanes, queue, memory, and the key's own last turns", "",
           "Status"),
    _Route("GET", "/v1/arena.svg", "The engine's memory, to scale", "", "image/svg+xml"),
    _Route("POST", "/tokenize", "Tokens of a text, as llama.cpp has it", "TokenizeRequest"),
    _Route("POST", "/detokenize", "Text of tokens, as llama.cpp has it", "DetokenizeRequest"),
    _Route("POST", "/apply-template", "The prompt of a conversation, as llama.cpp has it",
           "ChatRequest"),
    _Route("GET", "/health", "200 while requests are served", "", "Any", "open"),
    _Route("GET", "/v1/health", "The same", "", "Any", "open"),
    _Route("GET", "/props", "The model, as llama.cpp has it"),
    _Route("GET", "/slots", "The lanes, as llama.cpp lists slots", "", "[object]"),
    _Route("POST", "/slots/{id}", "Save a lane's state to the store, restore or erase it, as "
           "llama.cpp has it", "SlotRequest", "SlotDone", "action"),
    _Route("GET", "/metrics", "For Prometheus", "", "text/plain"),
    _Route("GET", "/openapi.json", "This document", "", "Any", "open"),
    _Route("GET", "/", "The page", "", "text/html", "open"),
    _Route("GET", "/page/{name}", "A file of the page", "", "text/html", "open"),
)  # fmt: skip
_ERRORS = {
    "4XX": "refused; Anthropic's routes, and requests with anthropic-version, have its error shape",
    "5XX": "a fault of the server, or it is shutting down",
}
_HEADERS = {
    "match": ("If-Match", "the ETag of the state that is meant; another one is 412"),
    "once": ("Idempotency-Key", "a request that is sent again with it has its first answer"),
}


class OpenApi:
    """The route."""

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        return Json(document())


@functools.cache
def document() -> dict[str, Any]:
    """The document. Paths are of the server that it comes from: there is no `servers`."""
    paths: dict[str, Any] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flashrt serve",
            "version": version("flashrt"),
            "summary": "Language models whose sessions fork and roll back",
        },
        "security": [{"bearer": []}, {"x-api-key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": {name: _schema(fields) for name, fields in _SCHEMAS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: _Route) -> dict[str, Any]:
    notes = route.notes.split()
    content = {route.gives: {}} if "/" in route.gives else {_JSON: {"schema": _type(route.gives)}}
    if "stream" in notes:
        content[_SSE] = {}
    made: dict[str, Any] = {
        "operationId": _name(route),
        "summary": route.summary,
        "responses": {str(route.status): {"description": "done", "content": content}},
    }
    if "match" in notes or route.gives in ("Session", "Tree"):
        tag = {"schema": {"type": "string"}, "description": "digest of the tip"}
        if route.gives in ("Session", "Tree"):
            made["responses"][str(route.status)]["headers"] = {"ETag": tag}
    for status, words in _ERRORS.items():
        error = {_JSON: {"schema": _type("Error")}}
        made["responses"][status] = {"description": words, "content": error}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    for note, (name, words) in _HEADERS.items():
        if note in notes:
            schema = {"type": "string"}
            parameters.append(
                {"name": name, "in": "header", "schema": schema} | {"description": words}
            )
    if "action" in notes:
        parameters.append(
            {"name": "action", "in": "query", "required": True, "schema": {"enum": [*ACTIONS]}}
        )
    if parameters:
        made["parameters"] = parameters
    if route.takes:
        is_needed = any("!" in field for field in _SCHEMAS[route.takes])
        made["requestBody"] = {
            "required": is_needed,
            "content": {_JSON: {"schema": _type(route.takes)}},
        }
    if "open" in notes:
        made["security"] = []
    return made


def _name(route: _Route) -> str:
    words = re.sub(r"\W+", "_", route.path).strip("_") or "page"
    return f"{route.method.lower()}_{words}"


def _schema(fields: tuple[str, ...]) -> dict[str, Any]:
    pairs = [field.split(": ") for field in fields]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name.rstrip("!"): _type(kind) for name, kind in pairs},
    }
    needed = [name[:-1] for name, _ in pairs if name.endswith("!")]
    if needed:
        made["required"] = needed
    return made


def _type(kind: str) -> dict[str, Any]:
    if kind.startswith("["):
        return {"type": "array", "items": _type(kind[1:-1])}
    if kind.endswith(" | null"):
        return {"anyOf": [_type(kind.removesuffix(" | null")), {"type": "null"}]}
    if kind == "any":
        return {}
    if kind in _PLAIN:
        return {"type": kind}
    assert kind in _SCHEMAS, kind
    return {"$ref": f"#/components/schemas/{kind}"}
