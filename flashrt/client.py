"""A client for the sessions of `flashrt serve`: say, fork, roll back.

IS: a thin cover of /v1/sessions and of chat requests in a session. IS NOT: a client for the rest:
those of OpenAI and Anthropic do that.

    session = Client("http://127.0.0.1:8080").session()
    session.say("Plan the work.")
    other = session.fork()
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashrt.base.errors import FlashrtError

try:
    import httpx
except ImportError as missing:
    raise ImportError("flashrt.client needs httpx: pip install 'flashrt[client]'") from missing

Said = str | Sequence[Mapping[str, Any]]


class ServerError(FlashrtError):
    """The server refused, or was not reached (status 0). status: of HTTP; code: the API's own."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Reply:
    """What a turn gave. `cached_tokens` of the prompt were not fed to the model; message: as the
    chat API has it, with tool calls; node: the turn's place in the tree.
    """

    text: str
    finish_reason: str
    node: str | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    message: Mapping[str, Any] = field(repr=False)


class Client:
    """A server, as the owner of one API key. Close it, or use it in a with statement."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s)

    def session(self, name: str | None = None) -> Session:
        """A new session. Raises ServerError, as all that follows."""
        body = {} if name is None else {"name": name}
        return Session(self, self.change("/v1/sessions", body))

    def open(self, id_: str) -> Session:
        """A session that is there."""
        return Session(self, self.ask("GET", f"/v1/sessions/{id_}"))

    def sessions(self) -> list[Session]:
        """All of this key's, oldest first."""
        return [Session(self, found) for found in self.ask("GET", "/v1/sessions")["data"]]

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- for Session ----------------------------------------------------------------------------

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """One request; its JSON."""
        try:
            response = self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise _unreached(error) from error
        return _checked(response)

    def change(self, path: str, body: Any, etag: str | None = None) -> dict[str, Any]:
        """A change of sessions, tried again once if the line broke: it happens once."""
        headers = {"idempotency-key": uuid.uuid4().hex, **_match(etag)}
        try:
            return self.ask("POST", path, body, headers)
        except ServerError as error:
            if error.status:
                raise
            return self.ask("POST", path, body, headers)

    def chat(self, body: Mapping[str, Any], etag: str | None) -> dict[str, Any]:
        """A turn, whole."""
        return self.ask("POST", "/v1/chat/completions", body, _match(etag))

    def chat_chunks(self, body: Mapping[str, Any], etag: str | None) -> Iterator[dict[str, Any]]:
        """A turn, as it comes. The server ends it when the iterator is closed."""
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=_match(etag)
            ) as response:
                if response.is_error:
                    response.read()
                    _checked(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data in (line, "[DONE]"):
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise _refused(response.status_code, chunk)
                    yield chunk
        except httpx.HTTPError as error:
            raise _unreached(error) from error


class Session:
    """A named session of a server: a conversation with a tree of states behind it.

    Changes are made to the state that this object has seen last; where somebody else has changed
    the session meanwhile, they raise ServerError (412), and `refresh` sees what is there now.
    """

    def __init__(self, client: Client, found: Mapping[str, Any]) -> None:
        self._client = client
        self.id: str = found["id"]
        self.name: str | None = found["name"]
        self.tip: str = found["tip"]
        self.etag: str | None = found["etag"]
        self.reply: Reply | None = None  # the last one

    def __repr__(self) -> str:
        return f"<Session {self.name or self.id} at {self.tip}>"

    def say(self, text: Said, **options: Any) -> Reply:
        """A turn: a text of the user, or messages; `options` are fields of a chat request, as
        max_tokens, tools, temperature or seed. Raises ServerError.
        """
        body = self._body(text, options)
        found = self._client.chat(body, self.etag)
        choice = found["choices"][0]
        return self._took(choice["message"], choice["finish_reason"], found)

    def stream(self, text: Said, **options: Any) -> Iterator[str]:
        """A turn, its text as it comes; `reply` has the whole of it in the end. Who stops early
        ends the turn: the session is as after the last token. Raises ServerError.
        """
        body = {**self._body(text, options), "stream": True}
        body["stream_options"] = {"include_usage": True}
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        finish, last = "stop", dict[str, Any]()
        chunks = self._client.chat_chunks(body, self.etag)
        try:
            for chunk in chunks:
                last = chunk
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
                    piece = _join(message, choice["delta"])
                    if piece:
                        yield piece
            self._took(message, finish, last)
        except GeneratorExit:
            chunks.close()  # type: ignore[attr-defined]
            self._settle()
            raise

    def snapshot(self, name: str) -> str:
        """Give the tip a name; its id."""
        self._see(self._change("snapshot", {"name": name}))
        return self.tip

    def fork(self, node: str | None = None, name: str | None = None) -> Session:
        """Another session, at a node of this one by id or name (default: the tip)."""
        given = {"node": node, "name": name}
        body = {key: value for key, value in given.items() if value is not None}
        return Session(self._client, self._change("fork", body))

    def rollback(self, turns: int = 1) -> Session:
        """The tip is so many turns earlier. What was after it stays in the tree. Returns self."""
        self._see(self._change("rollback", {"turns": turns}))
        return self

    def restore(self, node: str) -> Session:
        """The tip is any node, by id or name. Returns self."""
        self._see(self._change("restore", {"node": node}))
        return self

    def tree(self) -> dict[str, Any]:
        """{"session", "nodes"}: all nodes, parents before children."""
        return self._client.ask("GET", f"/v1/sessions/{self.id}/tree")

    def messages(self, node: str | None = None) -> list[dict[str, Any]]:
        """The conversation up to a node, by id (default: the tip)."""
        nodes = {found["id"]: found for found in self.tree()["nodes"]}
        found: list[dict[str, Any]] = []
        at: str | None = node or self.tip
        while at is not None:
            own = self._client.ask("GET", f"/v1/sessions/{self.id}/nodes/{at}")
            found = [*own["messages"], *found]
            at = nodes[own["id"]]["parent"]
        return found

    def refresh(self) -> Session:
        """See the session as it is now. Returns self."""
        self._see(self._client.ask("GET", f"/v1/sessions/{self.id}"))
        return self

    def delete(self) -> None:
        """Forget it."""
        self._client.ask("DELETE", f"/v1/sessions/{self.id}", headers=_match(self.etag))

    def _change(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._client.change(f"/v1/sessions/{self.id}/{verb}", body, self.etag)

    def _see(self, found: Mapping[str, Any]) -> None:
        self.name, self.tip, self.etag = found["name"], found["tip"], found["etag"]

    def _settle(self, patience_s: float = 10.0) -> None:
        """A turn was left: wait until the server has ended it."""
        until = time.monotonic() + patience_s
        while True:
            found = self._client.ask("GET", f"/v1/sessions/{self.id}")
            self._see(found)
            if not found["is_busy"] or time.monotonic() > until:
                return
            time.sleep(0.02)

    def _body(self, text: Said, options: Mapping[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        return {**options, "messages": messages, "session": self.id}

    def _took(self, message: Mapping[str, Any], finish: str, found: Mapping[str, Any]) -> Reply:
        usage, place = found["usage"], found.get("session")
        if place is not None:
            self.tip, self.etag = place["node"], place["etag"]
        self.reply = Reply(
            message["content"] or "", finish, self.tip if place else None,
            usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens"], message,
        )  # fmt: skip
        return self.reply


def _join(message: dict[str, Any], delta: Mapping[str, Any]) -> str:
    """Add a piece to a message; its text."""
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({**call, "function": dict(call["function"])})
        else:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return delta.get("content") or ""


def _match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"if-match": f'"{etag}"'}


def _unreached(error: httpx.HTTPError) -> ServerError:
    return ServerError(0, None, f"the server was not reached: {error or type(error).__name__}")


def _checked(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if response.is_error or not isinstance(found, dict):
        raise _refused(response.status_code, found)
    return found


def _refused(status: int, found: Any) -> ServerError:
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return ServerError(status, None, f"the answer has status {status} and is not flashrt's")
    return ServerError(status, error.get("code"), str(error.get("message")))
