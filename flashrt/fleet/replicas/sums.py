"""Answers that tell of all replicas at once: sessions, slots, status, metrics.

IS: how several answers are one, and how lanes of replicas are numbered as slots of one server:
those of rank 0 first. IS NOT: asking for them (front).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message

from flashrt.fleet.replicas.keys import Kind, Wish
from flashrt.fleet.replicas.ring import Member

KINDS: frozenset[Kind] = frozenset({"sessions", "slots", "status", "metrics"})


@dataclass(slots=True)
class Whole:
    """An answer, taken together from its messages."""

    home: str
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def take(self, message: Message) -> None:
        """The next message."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        else:
            self.body += message.get("body", b"")

    def messages(self) -> list[Message]:
        """As it is sent."""
        headers = [(k, v) for k, v in self.headers if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(self.body)).encode()))
        return [
            {"type": "http.response.start", "status": self.status, "headers": headers},
            {"type": "http.response.body", "body": self.body, "more_body": False},
        ]


def summed(kind: Kind, answers: Sequence[Whole], lanes: Sequence[int]) -> Whole:
    """One answer; the first refusal where there is one."""
    refused = [a for a in answers if a.status != 200]
    if refused:
        return refused[0]
    first = answers[0]
    if kind == "metrics":
        body = _metrics({a.home: a.body.decode() for a in answers})
        return Whole("", 200, first.headers, body.encode())
    bodies = [json.loads(a.body) for a in answers]
    starts = [sum(lanes[:i]) for i in range(len(answers))]
    if kind == "sessions":
        data = {s["id"]: s for body in bodies for s in body["data"]}
        made: Any = {
            **bodies[0],
            "data": sorted(data.values(), key=lambda s: (s["created"], s["id"])),
        }
    elif kind == "slots":
        made = [
            {**slot, "id": start + slot["id"]}
            for start, slots in zip(starts, bodies, strict=True)
            for slot in slots
        ]
    else:
        made = _status(bodies, starts)
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    return Whole("", 200, first.headers, text.encode())


def with_session(listed: Whole, session: Whole) -> Whole:
    """A list of sessions with one more."""
    told = json.loads(listed.body)
    told["data"].append(json.loads(session.body))
    told["data"].sort(key=lambda s: (s["created"], s["id"]))
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    return Whole("", listed.status, listed.headers, text.encode())


def _status(bodies: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> dict[str, Any]:
    """Lanes side by side, the turns of all, and sums of what can be added."""
    lanes = [
        {**lane, "index": start + lane["index"]}
        for start, body in zip(starts, bodies, strict=True)
        for lane in body["lanes"]
    ]
    turns = [turn for body in bodies for turn in body["turns"]]
    return {
        **bodies[0],
        "lanes": lanes,
        "turns": sorted(turns, key=lambda turn: float(turn["ended_at"])),
        "queue": _added([body["queue"] for body in bodies]),
        "capsules": {
            tier: _added([body["capsules"][tier] for body in bodies])
            for tier in bodies[0]["capsules"]
        },
        "pool": _added([body["pool"] for body in bodies]),
    }


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _metrics(texts: Mapping[str, str]) -> str:
    """Prometheus' text, each sample with the label `replica`; those of one name stay together."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for home, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, f'replica="{home}"'))
    lines = [line for f in samples for line in (*heads.get(f, ()), *samples[f])]
    return "\n".join(lines) + "\n"


def _labelled(sample: str, label: str) -> str:
    name, _, rest = sample.partition("{")
    if rest:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


def slot_scope(
    wish: Wish, head: Mapping[str, Any], member: Member
) -> tuple[Mapping[str, Any], int]:
    """The request as its replica understands it, and what to add to the slot in its answer."""
    if wish.kind != "slot":
        return head, 0
    lane = wish.slot % member.lanes
    path = f"/slots/{lane}"
    return {**head, "path": path, "raw_path": path.encode()}, wish.slot - lane


def shifted(message: Message, shift: int) -> Message:
    """A message of an answer about a slot, with the slot's number among all."""
    body: bytes = message.get("body", b"")
    if not shift or not body:
        if shift and message["type"] == "http.response.start":
            kept = [(k, v) for k, v in message["headers"] if k.lower() != b"content-length"]
            return {**message, "headers": kept}
        return message
    try:
        told = json.loads(body)
    except ValueError:
        return message
    if isinstance(told, dict) and "id_slot" in told:
        told["id_slot"] += shift
        return {**message, "body": json.dumps(told).encode()}
    return message
