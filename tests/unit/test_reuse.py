"""Prefix reuse: the decision as a table, and where boundaries are placed."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.store.reuse import (
    Action,
    Boundary,
    Live,
    Rates,
    boundaries_due,
    common_prefix,
    decide,
)

PROMPT = list(range(1000))
ELSEWHERE = [*PROMPT[:600], *[7] * 100]
SLOW_DISK = Rates(500.0, {"device": 1e-4, "host": 2e-4, "disk": 1.0})


def at(position: int, tier: str = "device", nbytes: int = 1000) -> Boundary:
    return Boundary(position, nbytes, tier)


def live(tokens: list[int], *boundaries: int) -> Live:
    return Live(np.array(tokens, np.int32), boundaries)


@pytest.mark.parametrize(
    ("known", "lane", "rates", "action", "position", "reason"),
    [
        ([], None, None, Action.COLD, 0, "nothing known"),
        ([], live([]), None, Action.COLD, 0, "nothing known"),
        ([], live(PROMPT[:400]), None, Action.CONTINUE, 400, "live 400 tokens are a prefix"),
        ([], live(PROMPT), None, Action.CONTINUE, 1000, "live 1,000"),
        ([], live([*PROMPT, 5], 512, 1000), None, Action.ROLLBACK, 1000, "a boundary is at 1,000"),
        ([], live(ELSEWHERE, 64, 512, 640), None, Action.ROLLBACK, 512, "up to 600 of 700"),
        ([], live(ELSEWHERE, 640), None, Action.COLD, 0, "nothing known"),
        ([at(300), at(800)], None, None, Action.RESTORE, 800, "device tier covers 800"),
        ([at(1000)], None, None, Action.RESTORE, 1000, "1,000 of 1,000"),
        ([at(1001), at(0)], None, None, Action.COLD, 0, "nothing known"),
        ([at(800)], live(ELSEWHERE, 512), None, Action.RESTORE, 800, "covers 800"),
        ([at(500)], live(ELSEWHERE, 512), None, Action.ROLLBACK, 512, "agree up to 600"),
        ([at(400)], live(PROMPT[:400]), None, Action.CONTINUE, 400, "live 400"),
        ([at(401)], live(PROMPT[:400]), None, Action.RESTORE, 401, "covers 401"),
        ([at(700, "disk"), at(700, "host")], None, None, Action.RESTORE, 700, "host tier"),
        ([at(700, "disk", 10**6)], None, SLOW_DISK, Action.COLD, 0, "nothing known"),
        ([at(700, "disk", 10**6), at(9)], None, SLOW_DISK, Action.RESTORE, 9, "device tier"),
    ],
)  # fmt: skip
def test_table(
    known: list[Boundary],
    lane: Live | None,
    rates: Rates | None,
    action: Action,
    position: int,
    reason: str,
) -> None:
    decision = decide(np.array(PROMPT, np.int32), known, lane, 100, rates)
    assert (decision.action, decision.position) == (action, position)
    assert decision.n_prefill == len(PROMPT) - position
    assert reason in decision.reason
    assert str(decision).startswith(f"{action}: {position:,} tokens kept")
    moved = {Action.CONTINUE: 0, Action.ROLLBACK: 100, Action.COLD: 0}
    assert decision.nbytes == moved.get(action, 1000)


def test_no_option_is_quicker_than_the_one_chosen() -> None:
    rng = np.random.default_rng(5)
    wanted = np.array(PROMPT, np.int32)
    for _ in range(200):
        known = [
            at(int(rng.integers(1, 1100)), str(rng.choice(["device", "host", "disk"])), int(n))
            for n in rng.integers(0, 10**9, 4)
        ]
        n = int(rng.integers(0, 1000))
        lane = live([*PROMPT[:n], *[3] * int(rng.integers(0, 5))], *range(50, n, 97))
        chosen = decide(wanted, known, lane)
        for i in range(len(known)):
            assert chosen.estimate_us <= decide(wanted, known[i : i + 1]).estimate_us
        assert chosen.estimate_us <= decide(wanted, [], lane).estimate_us
        assert chosen.position <= 1000


def test_common_prefix() -> None:
    for a, b, n in (([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1)):
        assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == n


def test_boundaries_due() -> None:
    assert boundaries_due(0, 10) == []
    assert boundaries_due(3, 10, [2, 3, 4, 10, 11]) == [4, 10]
    assert boundaries_due(0, 300, every=128) == [128, 256]
    assert boundaries_due(128, 256, [200], every=128) == [200, 256]
