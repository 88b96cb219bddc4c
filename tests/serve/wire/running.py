"""A server in a thread, on a port of its own, and what the tests ask it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

import flashrt
from flashrt.serve.access import Access
from flashrt.serve.run import Server
from flashrt.serve.work import Limits
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint

NAME = "tiny-agent"
SEARCH = (
    "the red box may be in the tower or the stable . the silver coin may be in the school or the "
    "forest . the red flute may be in the workshop or the study ."
)
WALK = "start in column six row six . west east south south where am i ?"
LOOK = {
    "type": "object",
    "properties": {"place": {"type": "string", "enum": ["tower", "stable"]}},
    "required": ["place"],
    "additionalProperties": False,
}


class Running:
    """A server that runs until `end`."""

    def __init__(
        self, access: Access | None = None, *, lanes: int = 4, queue: int = 256,
        store: Store | None = None, checkpoint: Path | None = None, images: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        self.engine = flashrt.load(
            checkpoint or bundled_checkpoint(), device="cpu", max_positions=1024, lanes=lanes,
            pool_bytes=64 << 20, images=images,
        )  # fmt: skip
        self.server = Server(
            self.engine, NAME, access or Access(), port=0, store=store,
            limits=Limits(queue=queue, queue_per_owner=queue, drain_s=2.0), **options,
        )  # fmt: skip
        self.url, self.port = self.server.url, self.server.listener.port
        is_up = threading.Event()
        self._thread = threading.Thread(
            target=self.server.run, args=[lambda url: is_up.set()], daemon=True
        )
        self._thread.start()
        assert is_up.wait(20)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def anthropic(self, key: str = "none") -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def end(self) -> None:
        self.server.end()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the listener did not end"
        self.server.close()
        self.engine.close()
