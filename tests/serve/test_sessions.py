"""Promise: every turn starts warm from the deepest known boundary, also after a restart or a kill;
sessions fork and roll back to the states that they were in, and nobody else's changes them.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt.serve.ask import NoSession, SessionBusy, SessionConflict
from flashrt.serve.core import Core
from flashrt.serve.prefix import Kept
from flashrt.serve.work import Limits
from flashrt.store import upkeep
from flashrt.store.history import History
from flashrt.store.store import Store
from tests.serve.conftest import load
from tests.serve.listening import Heard, alone, ask

Serving = Callable[..., Core]
SYSTEM = [i * 7 % 190 + 1 for i in range(300)]
THINK, ANSWER = 7, 5


class Agent:
    """An agent whose template drops the thinking of all turns before the last user's message."""

    def __init__(self) -> None:
        self.settled = list(SYSTEM)  # up to the last user's message; no thinking
        self.recent: list[tuple[list[int], list[int]]] = []  # said to the model, its reply
        self.n = 0

    def turn(self, core: Core, is_user: bool) -> tuple[Heard, list[int], int]:
        """What was heard, the prompt, and how many of its tokens an earlier turn has computed."""
        self.n += 1
        said = [200 + self.n % 40, 3, 4, self.n]
        known = len(self.settled) + sum(len(s) + len(r) for s, r in self.recent)
        if is_user:
            known = len(self.settled) if self.n > 1 else 0
            for told, reply in self.recent:
                self.settled += [*told, *reply[THINK:]]
            self.recent = []
        prompt = list(self.settled)
        for told, reply in self.recent:
            prompt += [*told, *reply]
        prompt += said
        start = (len(self.settled),)
        heard = ask(core, prompt, THINK + ANSWER, turn_starts=start).wait()
        assert heard.error is None
        self.recent.append((said, heard.tokens[0]))
        return heard, prompt, known


def test_every_turn_is_warm_after_a_restart_too(
    serving: Serving, other: flashrt.Engine, tmp_path: Path
) -> None:
    """Fault: a turn computes tokens again that an earlier one did, here or before the restart."""
    agent, core = Agent(), serving(load(limit=2048), store=Store(tmp_path / "store"))
    for n in range(1, 21):
        if n in (7, 14, 16):
            core.close()
            core.engine.close()
            core = serving(load(limit=2048, lanes=2), store=Store(tmp_path / "store"))
        is_user = n % 3 == 1
        heard, prompt, known = agent.turn(core, is_user)
        assert heard.prompt_tokens == len(prompt)
        # a waypoint of the lane may be in the midst of the message that was rendered anew
        assert known <= heard.cached_tokens <= known + 4 * is_user, f"turn {n}"
        if n % 5 == 0:
            assert heard.tokens[0] == alone(other, prompt, THINK + ANSWER)
    assert upkeep.verify(Store(tmp_path / "store")).problems == []


def test_a_turn_that_was_told_survives_a_kill(serving: Serving, tmp_path: Path) -> None:
    """Fault: the reply is sent before what it left is in the store."""
    script = """
import sys, time
from flashrt.store.store import Store
from flashrt.serve.core import Core
from tests.serve.conftest import load
from tests.serve.listening import ask
core = Core(load(), Store(sys.argv[1])).start()
session = core.sessions.create("ann", "s").result()
heard = ask(core, list(range(200)), 6, session=session.id, messages=({"text": "\u00fc"},)).wait()
core.sessions.annotate("ann", session.id, heard.nodes[0], [{"role": "assistant"}]).result()
core.sessions.snapshot("ann", session.id, "here").result()
print(session.id, heard.nodes[0], *heard.tokens[0], flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        id_, node, *said = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGKILL)
    got = list(map(int, said))
    core = serving(store=Store(tmp_path / "store"))
    (session,) = core.sessions.list("ann").result()
    assert (session.id, session.name, session.tip, session.position) == (id_, "s", node, 206)
    assert core.sessions.list("bob").result() == ()
    assert core.sessions.tokens("ann", id_).result() == (*range(200), *got)
    assert core.sessions.messages("ann", id_, "here").result() == (
        {"text": "\u00fc"}, {"role": "assistant"},
    )  # fmt: skip
    view = core.sessions.tree("ann", id_).result().nodes[-1]
    assert (view.tier, view.name, view.n_messages) == ("store", "here", 2)
    heard = ask(core, [*range(200), *got, 9], 3, session=id_).wait()
    assert heard.cached_tokens == 206 and heard.error is None
    assert ask(core, [*range(200), *got, 9], 3, owner="bob").wait().cached_tokens == 0
    for path in (tmp_path / "store").rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, f"{path} can be read by others"
    assert not any("ann" in str(path) for path in (tmp_path / "store").rglob("*"))


def turns(core: Core, id_: str, prompts: list[list[int]], owner: str = "ann") -> list[Heard]:
    """Turns of a session, each of what it has and some tokens more."""
    heard = []
    for prompt in prompts:
        so_far = list(core.sessions.tokens(owner, id_).result())
        message = ({"role": "user", "content": str(prompt)},)
        heard.append(
            ask(core, so_far + prompt, 4, owner=owner, session=id_, messages=message).wait()
        )
        assert heard[-1].error is None
    return heard


@pytest.mark.parametrize("is_stored", [False, True])
def test_fork_rollback_and_restore(
    serving: Serving, other: flashrt.Engine, tmp_path: Path, is_stored: bool
) -> None:
    """Fault: a tip that moved is not the state that is gone on from, or a fork shares a tip."""
    store = Store(tmp_path / "store") if is_stored else None
    core = serving(store=store)
    verbs = core.sessions
    id_ = verbs.create("ann").result().id
    first, second, third = turns(core, id_, [list(range(100)), [5, 6], [7]])
    nodes = verbs.tree("ann", id_).result().nodes
    assert [n.parent for n in nodes] == [None, *(n.id for n in nodes[:-1])]
    assert [n.position for n in nodes] == [0, 104, 110, 115]
    assert nodes[-1].id == third.nodes[0] and nodes[1].id == first.nodes[0]
    tokens = verbs.tokens("ann", id_).result()
    with other.session() as session:
        session.prefill(tokens)
        assert nodes[-1].digest == session.digest()
    verbs.snapshot("ann", id_, "end").result()

    fork = verbs.fork("ann", id_, second.nodes[0], "b").result()
    assert (fork.position, fork.forked_from, fork.n_nodes) == (110, (id_, second.nodes[0]), 3)
    (branch,) = turns(core, fork.id, [[9, 9]])
    assert branch.cached_tokens == 110
    assert verbs.view("ann", id_).result().tip == third.nodes[0]
    assert len(verbs.messages("ann", fork.id).result()) == 3

    assert verbs.rollback("ann", id_, turns=2).result().tip == first.nodes[0]
    (other_way,) = turns(core, id_, [[8]])
    assert other_way.cached_tokens == 104
    assert other_way.tokens[0] == alone(other, [*tokens[:104], 8], 4)
    view = verbs.restore("ann", id_, "end").result()
    assert view.tip == third.nodes[0] and view.n_nodes == 5
    assert verbs.rollback("ann", id_, node=second.nodes[0]).result().position == 110
    with pytest.raises(NoSession, match="on the way"):
        verbs.rollback("ann", id_, node="end").result()

    assert verbs.rollback("ann", id_, position=104).result().tip == first.nodes[0]
    verbs.restore("ann", id_, "end").result()
    view = verbs.rollback("ann", id_, position=107).result()
    assert (view.position, view.n_nodes, view.is_busy) == (107, 6, False)
    assert verbs.tokens("ann", id_).result() == tokens[:107]
    made = verbs.tree("ann", id_).result().nodes[-1]
    assert (made.parent, made.tier) == (first.nodes[0], "device")
    (again,) = turns(core, id_, [[3]])
    assert again.cached_tokens == 107
    assert verbs.rollback("ann", id_, position=0).result().position == 0

    verbs.delete("ann", id_).result()
    with pytest.raises(NoSession):
        verbs.tree("ann", id_).result()
    assert turns(core, fork.id, [[4]])[0].cached_tokens == 116, "a fork outlives its origin"
    core.call(core.engine.capsules.check_integrity).result()
    if store is not None:
        core.close()
        core.engine.close()
        core = serving(store=Store(tmp_path / "store"))
        assert [s.id for s in core.sessions.list("ann").result()] == [fork.id]
        assert turns(core, fork.id, [[4]])[0].cached_tokens == 121


def test_who_is_late_or_a_stranger_changes_nothing(serving: Serving) -> None:
    core = serving(load(lanes=1))
    verbs = core.sessions
    id_ = verbs.create("ann").result().id
    turns(core, id_, [[1, 2, 3], [4]])
    old = verbs.view("ann", id_).result()
    assert verbs.rollback("ann", id_, turns=1, etag=old.etag).result().etag != old.etag
    with pytest.raises(SessionConflict) as caught:
        verbs.rollback("ann", id_, turns=1, etag=old.etag).result()
    now = verbs.view("ann", id_).result()
    assert caught.value.etag == now.etag and now.position == 7
    for stranger in (
        lambda: verbs.view("bob", id_), lambda: verbs.fork("bob", id_),
        lambda: verbs.delete("bob", id_), lambda: verbs.view("ann", id_[:-1] + "x"),
        lambda: verbs.restore("ann", id_, "nowhere"), lambda: verbs.rollback("ann", id_, turns=9),
        lambda: verbs.rollback("ann", id_, position=8), lambda: verbs.create("ann", "x" * 999),
    ):  # fmt: skip
        with pytest.raises(NoSession):
            stranger().result()
    with pytest.raises(NoSession):
        ask(core, [1], 1, owner="bob", session=id_)
    with pytest.raises(flashrt.SessionError, match="JSON"):
        ask(core, [1], 1, session=id_, messages=({"x": object()},))
    with pytest.raises(flashrt.SessionError, match="one of"):
        verbs.rollback("ann", id_)

    running = ask(core, [1, 2], 600, session=id_)
    assert running.has_token.wait(30)
    for late in (
        lambda: verbs.rollback("ann", id_, turns=1), lambda: verbs.delete("ann", id_),
        lambda: verbs.restore("ann", id_, now.tip), lambda: verbs.snapshot("ann", id_, "x"),
        lambda: verbs.rollback("ann", id_, position=1),
    ):  # fmt: skip
        with pytest.raises(SessionBusy):
            late().result()
    with pytest.raises(SessionBusy):
        ask(core, [1], 1, session=id_)
    fork = verbs.fork("ann", id_).result()
    assert fork.tip == now.tip and running.wait().error is None
    assert verbs.view("ann", id_).result().position == 602


def test_a_cancelled_turn_leaves_its_last_token(serving: Serving) -> None:
    """Fault: the session goes on from before the turn, or from beyond what was sent."""
    core = serving()
    id_ = core.sessions.create("ann").result().id
    heard = ask(core, [1, 2, 3], 500, heard=Heard(stop_after=5), session=id_).wait()
    assert core.sessions.tokens("ann", id_).result() == (1, 2, 3, *heard.tokens[0])
    (again,) = turns(core, id_, [[4]])
    assert again.cached_tokens == 8


def test_choices_of_a_turn_are_siblings(serving: Serving) -> None:
    """Fault: the second choice's node descends from the first's, or is the tip."""
    core = serving(load(lanes=2))
    id_ = core.sessions.create("ann").result().id
    heard = ask(core, [1, 2, 3], 5, n=3, session=id_, sampling={"temperature": 1.5}).wait()
    root, *nodes = core.sessions.tree("ann", id_).result().nodes
    assert {n.id for n in nodes} == set(heard.nodes.values())
    assert [n.parent for n in nodes] == [root.id] * 3
    view = core.sessions.view("ann", id_).result()
    assert (view.tip, view.is_busy) == (heard.nodes[0], False)
    for index, node in heard.nodes.items():
        tokens = core.sessions.tokens("ann", id_, node).result()
        assert tokens == (1, 2, 3, *heard.tokens[index])


def test_branches_have_each_others_logprobs(
    serving: Serving, other: flashrt.Engine, tmp_path: Path
) -> None:
    """Fault: what `store diff` shows of a server's turns is nothing, or another position's."""
    url = tmp_path / "store"
    core = serving(load(), store=Store(url), limits=Limits(noted=other.vocab_size))
    sampling = {"temperature": 1.5, "seed": 3}
    ask(core, SYSTEM, 0).wait()
    heard = ask(core, SYSTEM, 12, n=2, sampling=sampling, logprobs=1).wait()
    assert all(said is not None and len(said.top) == 1 for said in heard.logprobs[0])
    core.close()
    history = History(Store(url))
    a, b = (e for e in history.entries.values() if e.place.position == len(SYSTEM) + 12)
    parting = history.part(a, b, 2)
    assert parting.relation == "differ" and history.problems == []
    for side, beside in ((parting.a, parting.b), (parting.b, parting.a)):
        tokens = history.store.tokens(side.entry.manifest)
        with other.session() as session:
            session.prefill(tokens[: parting.position])
            (chosen,) = session.generate(1, logit_bias={int(tokens[parting.position]): 1000.0})
            _, top = session.logprobs(other.vocab_size)
        assert chosen == side.token and beside.token is not None
        assert side.logprob_of(chosen) == dict(top)[chosen]
        assert side.logprob_of(beside.token) == dict(top)[beside.token]
    notes = history.notes(a)
    assert notes is not None and notes.checkpoint == str(other.checkpoint.path)
    assert [t.position for t in notes.tokens] == list(range(len(SYSTEM), len(SYSTEM) + 12))


def test_logprobs_are_noted_where_they_were_asked_for(serving: Serving, tmp_path: Path) -> None:
    """Fault: all turns pay for what nobody wanted, or what was computed is thrown away."""
    core = serving(store=Store(tmp_path / "store"))
    ask(core, [1, 2], 3).wait()
    heard = ask(core, [3, 4], 3, logprobs=2).wait()
    core.close()
    history = History(Store(tmp_path / "store"))
    (entry,) = (e for e in history.entries.values() if e.has_notes)
    notes = history.notes(entry)
    assert notes is not None
    assert [(t.token, t.logprob, tuple(t.alternatives)) for t in notes.tokens] == [
        (token, said.logprob, said.top)
        for token, said in zip(heard.tokens[0], heard.logprobs[0], strict=True)
        if said is not None
    ]


def test_held_states_are_spilled_and_others_dropped(serving: Serving, tmp_path: Path) -> None:
    """Fault: a session's state is lost for want of room, or the newest go before the oldest."""
    for store in (None, Store(tmp_path / "store")):
        core = serving(load(pool_bytes=1 << 20), store=store, kept=Kept(in_memory=4, in_store=6))
        ids = [core.sessions.create("ann").result().id for _ in range(10)]
        for i, id_ in enumerate(ids):
            turns(core, id_, [[i + 1] * 90])
        for i in range(12):
            ask(core, [100 + i] * 90, 2).wait()
        tiers = [core.sessions.tree("ann", id_).result().nodes[-1].tier for id_ in ids]
        assert "none" not in tiers and tiers[0] == ("store" if store else "disk")
        for id_ in ids:
            assert turns(core, id_, [[50]])[0].cached_tokens == 94
        status = core.status().result()
        assert status.evictions["store" if store else "disk"] > 0
        assert ask(core, [100] * 90 + [1], 1).wait().cached_tokens == 0, "the oldest is gone"
        assert core.status().result().problems == ()
        core.call(core.engine.capsules.check_integrity).result()
    core.close()
    assert len(Store(tmp_path / "store").refs()) <= 6 + 4 + 2 * 10


def test_a_damaged_store_costs_speed_and_says_so(serving: Serving, tmp_path: Path) -> None:
    """Fault: one bad file keeps the server from starting, or a turn from running."""
    core = serving(store=Store(tmp_path / "store"))
    good, bad = (core.sessions.create("ann").result().id for _ in range(2))
    turns(core, good, [[1] * 50, [2]])
    core.close()
    core.engine.close()
    for path in (tmp_path / "store").rglob("session.json"):
        if path.parent.name == bad:
            path.write_text("{")
    for path in (tmp_path / "store" / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    core = serving(store=Store(tmp_path / "store"))
    assert [s.id for s in core.sessions.list("ann").result()] == [good]
    assert any(bad in problem for problem in core.status().result().problems)
    (heard,) = turns(core, good, [[3]])
    assert heard.cached_tokens == 0 and heard.error is None


def test_a_store_that_cannot_be_written_is_told(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    core = serving(store=Store(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").write_text("a file")
    heard = ask(core, [1, 2, 3], 4).wait()
    assert heard.reasons == {0: "length"}
    assert any("not in the store" in p for p in core.status().result().problems)
    with pytest.raises(flashrt.CapsuleError):
        core.sessions.create("ann").result()


def test_lanes_do_not_wait_for_the_disk(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: whoever decodes stands still while another's turn is written."""
    core = serving(store=Store(tmp_path / "store"))
    ask(core, [1], 1).wait()
    write = core.store.folder.write

    def slow(name: str, data: Any) -> None:
        time.sleep(0.25)
        write(name, data)

    monkeypatch.setattr(core.store.folder, "write", slow)
    running = ask(core, [9], 400)
    assert running.has_token.wait(30)
    saved = ask(core, list(range(60)), 1)
    assert saved.has_token.wait(30)
    before = len(running.tokens[0])
    began = time.monotonic()
    saved.wait()
    assert time.monotonic() - began > 0.5, "the planted disk is slow"
    assert len(running.tokens[0]) - before > 20
    running.wait()


def test_files_of_sessions_are_plain(serving: Serving, tmp_path: Path) -> None:
    """For those who read them without flashrt; docs/serve-state.md tells their fields."""
    core = serving(store=Store(tmp_path / "store"))
    id_ = core.sessions.create("ann", "n").result().id
    (heard,) = turns(core, id_, [[1, 2, 3]])
    (path,) = (tmp_path / "store" / "serve").rglob("session.json")
    document = json.loads(path.read_text())
    assert path.parent.name == id_ and document["tip"] == heard.nodes[0]
    node = json.loads((path.parent / f"{document['tip']}.json").read_text())
    assert node["tokens"] == [1, 2, 3, *heard.tokens[0]] and len(node["messages"]) == 1
