"""What the server is and does: /health, /v1/models, /v1/status, /props, /metrics.

IS: routes that only read. IS NOT: the counters (meters).
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from flashrt.models.model import tapes_of
from flashrt.serve.core import Core, Status
from flashrt.serve.desk import Desk
from flashrt.serve.http import Call, Json
from flashrt.serve.metrics import metrics_text
from flashrt.serve.prefix import owner_key
from flashrt.view.arena_map import arena_map, widest

_SVG_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_PATIENCE_S = 30.0  # the scheduler answers between two steps


async def status_of(core: Core) -> Status:
    """How things are, between two steps."""
    return await asyncio.wait_for(asyncio.wrap_future(core.status()), _PATIENCE_S)


class StatusRoutes:
    """The routes."""

    def __init__(self, desk: Desk, core: Core) -> None:
        self._desk, self._core = desk, core
        self._arena: str | None = None  # it never changes

    async def health(self, call: Call) -> Response:
        """GET /health: 200 while requests are served."""
        return Json({"status": "ok"})

    async def models(self, call: Call) -> Response:
        """GET /v1/models."""
        model = self._model()
        ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}  # Anthropic's
        return Json({"object": "list", "data": [model], **ends})

    async def model(self, call: Call) -> Response:
        """GET /v1/models/{id}."""
        self._desk.served.check_name(call.request.path_params["id"])
        return Json(self._model())

    async def _status(self) -> Status:
        return await status_of(self._core)

    def _model(self) -> dict[str, Any]:
        served = self._desk.served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "flashrt",
            "type": "model",  # as Anthropic lists them
            "display_name": served.name,
            "meta": {
                "n_ctx": served.engine.max_positions,
                "n_vocab": served.engine.vocab_size,
                "fingerprint": served.fingerprint,
            },
        }

    async def props(self, call: Call) -> Response:
        """GET /props, as llama.cpp's."""
        served, engine = self._desk.served, self._desk.served.engine
        template = engine.text.template
        return Json({
            "model_path": served.name,
            "model_alias": served.name,
            "total_slots": len(engine.lanes),
            "default_generation_settings": {
                "n_ctx": engine.max_positions, "params": served.sampling,
            },
            "chat_template": "" if template is None else template.source,
            "bos_token": _spelled(served, engine.text.first_token),
            "eos_token": _spelled(served, next(iter(sorted(served.stop_tokens)), None)),
            "modalities": {"vision": served.sees, "audio": False},
            "device": engine.device,
            "fingerprint": engine.fingerprint,
        })  # fmt: skip

    async def overview(self, call: Call) -> Response:
        """GET /v1/status: lanes, queue, memory, and the caller's own last turns. Of other keys'
        work it says only that there is some.
        """
        status, served = await self._status(), self._desk.served
        me, meters = owner_key(call.owner), status.meters
        lanes = []
        for lane in status.lanes:
            is_mine = lane.owner == me and lane.state != "idle"
            lanes.append(
                {
                    "index": lane.index,
                    "state": lane.state,
                    "position": lane.position,
                    "is_yours": is_mine,
                    "session": lane.session if is_mine else None,
                    "generated_tokens": lane.generated_tokens,
                }
            )
        turns = [
            {
                "ended_at": turn.ended_at,
                "session": turn.session,
                "action": turn.action,
                "reason": turn.reason,
                "prompt_tokens": turn.prompt_tokens,
                "cached_tokens": turn.cached_tokens,
                "generated_tokens": turn.generated_tokens,
                "wait_s": turn.wait_s,
                "first_token_s": turn.first_token_s,
                "total_s": turn.total_s,
            }
            for turn in meters.turns
            if turn.owner == me
        ]
        tiers = {tier: {"n": n, "nbytes": size} for tier, (n, size) in status.capsules.items()}
        body = {
            "object": "status",
            "model": served.name,
            "device": served.engine.device,
            "fingerprint": served.fingerprint,
            "max_positions": served.engine.max_positions,
            "sees": served.sees,
            "lanes": lanes,
            "queue": {"all": sum(status.queued.values()), "yours": status.queued.get(me, 0)},
            "turns": turns,
            "capsules": tiers,
            "pool": {"nbytes": status.pool_nbytes, "used_nbytes": status.pool_used_nbytes},
        }
        return Json(body, headers={"cache-control": "no-store"})

    async def arena(self, call: Call) -> Response:
        """GET /v1/arena.svg: the one allocation of the engine, to scale."""
        if self._arena is None:
            served, engine = self._desk.served, self._desk.served.engine
            lanes = len(engine.lanes)
            title = (
                f"The arena of {served.name}: {lanes} lanes of {engine.max_positions:,} positions"
            )
            tapes = tapes_of(engine.model, lanes)
            plan = engine.arena.plan
            self._arena = await asyncio.to_thread(arena_map, plan, widest(tapes), title)
        return Response(self._arena, media_type="image/svg+xml", headers=_SVG_HEADERS)

    async def metrics(self, call: Call) -> Response:
        """GET /metrics for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(metrics_text(await self._status()), media_type=kind)


def _spelled(served: Any, token: int | None) -> str:
    return "" if token is None else str(served.spelling(token)[0])
