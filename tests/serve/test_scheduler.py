"""Promise: a request's tokens are those of a session alone, whoever else is served; none starves,
and what goes wrong in one stays there.
"""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import flashrt
from flashrt.base.errors import BackendError, FlashrtError
from flashrt.capsule.lineage import Lane
from flashrt.core.runs import table_of
from flashrt.serve.ask import Ask, Closing, QueueFull, TimedOut
from flashrt.serve.core import Core
from flashrt.serve.prefix import Kept
from flashrt.serve.work import Limits
from tests.serve.conftest import LANES, LIMIT, load
from tests.serve.listening import Heard, alone, ask

Serving = Callable[..., Core]
SAMPLED = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2, "seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "seed": 9, "logit_bias": {7: 4.0}},
]


def test_tokens_are_those_of_a_session_alone(serving: Serving, other: flashrt.Engine) -> None:
    """Fault: a piece of a prompt, a sampler or a restored state gets into another's lane."""
    core = serving()
    rng = np.random.default_rng(3)
    trunk = rng.integers(0, other.vocab_size, 150).tolist()
    asks = []
    for i in range(40):
        shared = trunk[: int(rng.integers(0, 150))] if i % 2 else []
        prompt = shared + rng.integers(0, other.vocab_size, int(rng.integers(1, 200))).tolist()
        n, options = int(rng.integers(1, 30)), SAMPLED[i % 4]
        starts = (len(shared),) if i % 3 else ()
        heard = ask(core, prompt, n, sampling=options, turn_starts=starts, owner=f"o{i % 3}")
        asks.append((prompt, n, options, heard))
    for prompt, n, options, heard in asks:
        heard.wait()
        assert heard.error is None
        assert heard.tokens.get(0, []) == alone(other, prompt, n, **options)
        assert heard.reasons == {0: "length"}
    assert core.scheduler.meters.cached_tokens > 500
    core.engine.capsules.check_integrity()


def test_choices_are_the_seeds_in_turn(serving: Serving, other: flashrt.Engine) -> None:
    """Fault: a choice goes on from another's state; or six choices on four lanes lose two."""
    core = serving()
    prompt = list(range(40, 140))
    options = {"temperature": 1.0, "seed": 3}
    heard = ask(core, prompt, 12, n=6, sampling=options, turn_starts=(60,)).wait()
    assert heard.reasons == dict.fromkeys(range(6), "length")
    for index in range(6):
        assert heard.tokens[index] == alone(other, prompt, 12, temperature=1.0, seed=3 + index)
    assert (heard.prompt_tokens, heard.cached_tokens) == (100, 0)
    again = ask(core, prompt, 5, sampling={"temperature": 1.0, "seed": 4}).wait()
    assert again.cached_tokens == 100 and again.tokens[0] == heard.tokens[1][:5]


def test_stops_logprobs_and_the_end_of_the_context(serving: Serving, other: flashrt.Engine) -> None:
    core = serving()
    prompt = list(range(30))
    following = alone(other, prompt, 20)
    stop = next(t for t in following if t != following[0])
    n = following.index(stop)
    heard = ask(core, prompt, 20, stop_tokens=frozenset([stop])).wait()
    assert (heard.tokens[0], heard.reasons[0]) == (following[:n], "stop")
    heard = ask(core, prompt, 20, heard=Heard(stop_after=3), logprobs=2).wait()
    assert (heard.tokens[0], heard.reasons[0]) == (following[:3], "stop")
    with other.session() as session:
        session.prefill(prompt)
        for token, said in zip(session.generate(3), heard.logprobs[0], strict=True):
            assert said is not None
            assert (said.logprob, list(said.top)) == session.logprobs(2)
            assert token == said.top[0][0]
    full = [i % 200 for i in range(LIMIT - 4)]
    assert ask(core, full, 50).wait().reasons == {0: "context"}
    assert ask(core, full, 4).wait().reasons == {0: "length"}
    assert ask(core, prompt, 0).wait().reasons == {0: "length"}


def test_what_cannot_be_carried_out_is_refused_at_once(serving: Serving) -> None:
    core = serving()
    for tokens, options, message in (
        ([], {}, "empty"), ([1] * LIMIT, {}, "lane holds"), ([9999], {}, "9999"),
        ([1], {"n": 0}, "n=0"), ([1], {"sampling": {"temperature": -1.0}}, "temperature"),
        ([1], {"sampling": {"heat": 1}}, "heat"), ([1], {"turn_starts": (2,)}, "turn_starts"),
        ([1], {"sampling": {"logit_bias": {-3: 1.0}}}, "-3"), ([1], {"session": "x"}, "'x'"),
        ([1], {"logprobs": -1}, "logprobs"),
    ):  # fmt: skip
        with pytest.raises(flashrt.SessionError, match=message):
            ask(core, tokens, 5, **options)
    assert ask(core, [1], 1).wait().error is None


def test_nan_in_one_request_ends_that_one_alone(serving: Serving, other: flashrt.Engine) -> None:
    """Fault: a poisoned lane is gone on from, or the requests beside it end too."""
    core = serving()
    prompts = [list(range(i, i + 60)) for i in range(4)]
    heard = [ask(core, prompt, 150, turn_starts=(30,)) for prompt in prompts]
    for one in heard:
        assert one.has_token.wait(30)

    def poison() -> None:
        choices = {w.choice.asked.ask.sink: w for w in core.scheduler.workers if w.choice}
        lane = choices[heard[1]].session.lane
        for region in ("state", "keys"):
            bits = core.engine.lane_array(lane, region)
            bits.view(np.uint8)[:] = 0xFF
            core.engine.set_lane_array(lane, region, bits)

    core.call(poison).result(30)
    for i, one in enumerate(heard):
        one.wait()
        if i == 1:
            assert isinstance(one.error, flashrt.SessionError) and "NaN" in str(one.error)
        else:
            assert one.tokens[0] == alone(other, prompts[i], 150)
    so_far = prompts[1] + heard[1].tokens[0]
    again = ask(core, so_far, 10).wait()
    assert again.tokens[0] == alone(other, so_far, 10) and again.cached_tokens == 0
    for prompt in prompts:  # one of them on the lane that was poisoned
        again = ask(core, prompt, 10, owner="bob")
        assert again.wait().tokens[0] == alone(other, prompt, 10)


def test_cancelled_and_late_requests(serving: Serving, other: flashrt.Engine) -> None:
    """Fault: a lane stays taken; tokens that were yielded are not what the next turn starts from;
    a request that waits is forgotten.
    """

    class Slow(Heard):
        def token(self, index: int, *more: Any) -> bool:
            time.sleep(0.004)  # 900 tokens take longer than it may, on any machine
            return super().token(index, *more)

    core = serving(load(lanes=2))
    prompt = list(range(50))
    heard, late = Heard(), Slow()
    ticket = core.submit(Ask("ann", tuple(prompt), heard, 900))
    core.submit(Ask("ann", tuple(prompt[:9]), late, 900, timeout_s=1.5))
    assert heard.has_token.wait(30)
    waiting, cancelled = Heard(), Heard()
    core.submit(Ask("ann", (1, 2), waiting, 5, timeout_s=0.01))
    core.submit(Ask("ann", (1, 2), cancelled, 5)).cancel()
    assert isinstance(waiting.wait().error, TimedOut)
    assert cancelled.wait().reasons == {0: "cancelled"}
    assert late.wait().reasons == {0: "timeout"} and late.tokens[0]
    ticket.cancel()
    ticket.cancel()
    assert heard.wait().reasons == {0: "cancelled"}
    got = heard.tokens[0]
    assert got == alone(other, prompt, len(got))
    again = ask(core, [*prompt, *got, 7], 3).wait()
    assert again.cached_tokens == len(prompt) + len(got), "the state after the last token"
    assert all(lane.state == "idle" for lane in core.scheduler.lanes())


def test_a_full_queue_says_when_to_come_again(serving: Serving) -> None:
    core = serving(load(lanes=1), limits=Limits(queue=4, queue_per_owner=2))
    first = ask(core, [1], 500)
    assert first.has_token.wait(30)
    waiting = [ask(core, [1, i], 1) for i in (2, 3)]
    with pytest.raises(QueueFull, match="of your requests") as caught:
        ask(core, [1, 4], 1)
    assert caught.value.retry_after_s >= 1
    waiting += [ask(core, [1, i], 1, owner="bob") for i in (2, 3)]
    with pytest.raises(QueueFull, match="4 requests wait"):
        ask(core, [1, 4], 1, owner="cat")
    for one in (first, *waiting):
        assert one.wait().error is None


def test_none_starves(serving: Serving) -> None:
    """Fault: an owner who always has the next request ready, or one of a higher priority, keeps
    another's from ever having a lane.
    """
    core = serving(load(lanes=1), limits=Limits(queue=1000, queue_per_owner=1000))
    ended: list[tuple[str, int]] = []

    class Flood(Heard):
        def ended(self, index: int, reason: str, node: str | None) -> None:
            ended.append(("flood", 0))
            if len(ended) < 400 and not victims[1].done.is_set():
                core.submit(Ask("mallory", (1, 2, 3), Flood(), 2, priority=9))
            super().ended(index, reason, node)

    class Victim(Heard):
        def ended(self, index: int, reason: str, node: str | None) -> None:
            ended.append(("victim", 0))
            super().ended(index, reason, node)

    victims: list[Heard] = [Victim(), Victim()]
    for _ in range(20):
        core.submit(Ask("mallory", (1, 2, 3), Flood(), 2, priority=9))
    core.submit(Ask("ann", (5, 6), victims[0], 2))
    core.submit(Ask("mallory", (5, 6), victims[1], 2, priority=-5))
    for victim in victims:
        victim.wait()
    first, second = (i for i, (who, _) in enumerate(ended) if who == "victim")
    assert first <= 4, "another owner is next but for what runs"
    assert second <= 120, "one in four is the oldest"


def test_short_prompts_go_before_long_ones_and_none_starves(serving: Serving) -> None:
    """Fault: rows are shared equally, so that a short prompt is as late as a long one; or short
    ones, that come again and again, keep all rows from a long one.
    """
    core = serving(load(lanes=6), limits=Limits(itl_s=1e-6))  # as few rows a step as can be
    firsts: list[int] = []

    class Timed(Heard):
        prompt: list[int]

        def token(self, index: int, *more: Any) -> bool:
            if index not in self.tokens:
                firsts.append(len(self.prompt))
            return super().token(index, *more)

        def ended(self, index: int, reason: str, node: str | None) -> None:
            if len(self.prompt) == 40 and len(firsts) < 200 and not long.done.is_set():
                submit(40, len(firsts))
            super().ended(index, reason, node)

    def submit(n: int, first: int) -> Timed:
        heard = Timed()
        heard.prompt = [(first * 7 + i) % 200 for i in range(n)]
        core.submit(Ask("ann", tuple(heard.prompt), heard, 1))
        return heard

    beside = ask(core, [1], 1000)  # somebody decodes all the time
    assert beside.has_token.wait(30)
    long = submit(480, 0)
    for i in range(4):
        submit(40, 100 + i)
    long.wait()
    assert not beside.done.is_set(), "prompts were fed beside it"
    # It has one step in four at least: the shorts' rows are three times its own, at most.
    before = firsts.index(480)
    assert 480 / 40 < before < 3.5 * 480 / 40
    core.scheduler.close(drain=False)


def test_launches_are_large_where_nobody_waits_for_them(
    other: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: another's first token waits for a launch of a long prompt; or a prompt alone goes in
    small launches.
    """
    engine = load(prefill_rows=1024)
    rows: list[int] = []
    prefill = engine.prefill

    def counted(lane: Lane, tokens: NDArray[np.int32], bucket: int | None = None) -> None:
        rows.append(len(tokens))
        prefill(lane, tokens, bucket)

    monkeypatch.setattr(engine, "prefill", counted)
    prompts = [tokens_of(other, 700, seed) for seed in range(3)]
    core = Core(engine)
    both = [ask(core, prompt, 4) for prompt in prompts[:2]]
    core.start()
    for prompt, heard in zip(prompts, both, strict=False):
        assert heard.wait().tokens[0] == alone(other, prompt, 4)
    assert sum(rows[:3]) == 700 and max(rows[:3]) <= 256, "while both wait"
    rows.clear()
    assert ask(core, prompts[2], 4).wait().tokens[0] == alone(other, prompts[2], 4)
    assert max(rows) > 256
    core.close(drain=False)
    engine.close()


def tokens_of(engine: flashrt.Engine, n: int, seed: int) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(0, engine.vocab_size, n)))


def test_one_owners_states_are_not_anothers(serving: Serving) -> None:
    """Fault: a prompt of one owner is cached for another, in a lane, the index or the store."""
    core = serving(load(lanes=1))
    prompt = list(range(80))
    assert ask(core, prompt, 0).wait().cached_tokens == 0
    heard = ask(core, [*prompt, 5], 4).wait()
    assert heard.cached_tokens == 80
    for known in (prompt, [*prompt, 5], [*prompt, 5, *heard.tokens[0]]):
        strange = ask(core, [*known, 6], 0, owner=f"bob{len(known)}").wait()
        assert strange.cached_tokens == 0
    assert ask(core, [*prompt, 5, *heard.tokens[0]], 1).wait().cached_tokens == 85


def test_a_sink_that_raises_is_told_nothing_more(serving: Serving) -> None:
    core = serving()

    class Broken(Heard):
        def token(self, *_: object) -> bool:
            self.n += 1
            raise ValueError("planted")

    broken = ask(core, [1, 2], 500, heard=Broken())
    assert ask(core, [3], 5).wait().error is None
    while any(lane.state != "idle" for lane in core.scheduler.lanes()):
        time.sleep(0.01)
    assert broken.n == 2 and not broken.done.is_set()


def test_close_lets_run_what_runs_and_fails_what_waits(serving: Serving) -> None:
    core = serving(load(lanes=1))
    running = ask(core, [1], 100)
    assert running.has_token.wait(30)
    waiting = ask(core, [2], 5)
    core.close()
    assert running.reasons == {0: "length"} and len(running.tokens[0]) == 100
    assert isinstance(waiting.error, Closing)
    with pytest.raises(Closing):
        ask(core, [3], 1)
    with pytest.raises(Closing):
        core.status().result(5)


def test_close_at_once_ends_what_runs_at_the_next_token(serving: Serving) -> None:
    core = serving(load(lanes=1), limits=Limits(drain_s=0.2))
    for drain in (False, True):
        running = ask(core, [1], 1000)
        assert running.has_token.wait(30)
        core.close(drain=drain)
        assert running.reasons == {0: "cancelled"}
        if not drain:
            core = serving(core.engine, limits=Limits(drain_s=0.2))


def test_a_step_that_fails_ends_its_requests_and_no_others(
    serving: Serving, other: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the thread dies of an exception, and who waits is never told."""
    core, has_died = serving(), False
    running = [ask(core, [i, 2], 300) for i in range(3)]
    assert running[2].has_token.wait(30)

    def planted(*_: object) -> None:
        if not has_died:
            monkeypatch.undo()
        raise MemoryError("planted")

    monkeypatch.setattr("flashrt.serve.scheduler.step", planted)
    for one in running:
        assert isinstance(one.wait().error, BackendError) and "planted" in str(one.error)
    assert ask(core, [0, 2], 9).wait().tokens[0] == alone(other, [0, 2], 9)
    has_died = True
    running = [ask(core, [i, 2], 300) for i in range(6)]
    assert running[0].has_token.wait(30)
    monkeypatch.setattr("flashrt.serve.scheduler.step", planted)
    monkeypatch.setattr(core.engine, "poison_lane", planted)  # and there is no way on from there
    for one in running:
        assert isinstance(one.wait().error, FlashrtError)
    with pytest.raises(Closing):
        ask(core, [1], 1)


def test_status_and_timings(serving: Serving) -> None:
    core = serving()
    prompt = list(range(100))
    heard = ask(core, prompt, 20, turn_starts=(50,)).wait()
    ask(core, prompt + heard.tokens[0], 10).wait()
    status = core.status().result(10)
    meters = status.meters
    assert (meters.asks, meters.prompt_tokens, meters.cached_tokens) == (2, 220, 120)
    assert meters.generated_tokens == 30 and sum(meters.next_token.counts) == 28
    assert sum(meters.first_token.counts) == sum(meters.wait.counts) == 2
    first, second = meters.turns
    assert (first.action, first.cached_tokens) == ("cold", 0)
    assert second.action in ("continue", "restore") and second.cached_tokens == 120
    assert status.capsules["device"][0] == 3 and status.pool_used_nbytes > 0
    assert [lane.state for lane in status.lanes] == ["idle"] * LANES


def test_memory_is_flat(serving: Serving) -> None:
    """Fault: something is kept of each request, or a capsule is never given back."""
    core = serving(load(limit=256, pool_bytes=4 << 20), kept=Kept(in_memory=32))
    rng = np.random.default_rng(1)

    def burst(n: int) -> None:
        heard = []
        for i in range(n):
            prompt = rng.integers(0, 200, int(rng.integers(3, 12))).tolist()
            heard.append(ask(core, prompt, 1, owner=f"o{i % 5}", turn_starts=(2,)))
            if len(heard) >= 40:
                for one in heard:
                    one.wait()
                heard = []
        for one in heard:
            one.wait()

    def measured() -> tuple[int, int]:
        table_of.cache_clear()  # it is bounded, and not full yet
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return len(gc.get_objects()), resident * mmap.PAGESIZE

    burst(500)
    grown = []
    for _ in range(3):  # what a heap of other tests takes, it takes once; a leak comes every time
        objects, nbytes = measured()
        burst(1500)
        more_objects, more_nbytes = measured()
        assert more_objects - objects < 300, f"{more_objects - objects} objects for 1,500 requests"
        grown.append(more_nbytes - nbytes)
        if grown[-1] < 4 << 20:
            break
    assert min(grown) < 4 << 20, f"{grown} bytes for 1,500 requests each"
    assert len(list(core.index.entries())) <= 32
    core.call(core.engine.capsules.check_integrity).result(30)
