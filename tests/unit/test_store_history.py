"""`flashrt store log | show | diff`, and the notes that logprobs come from.

Red when a line of the graph stands in the wrong column, a capsule hangs below another's parent, two
capsules part at another token than a plain comparison says, a logprob is another's, or damage to a
note costs more than the note.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import flashrt
from flashrt import cli
from flashrt.base.errors import StoreError
from flashrt.base.flags import flags
from flashrt.store import remote, upkeep
from flashrt.store.directory import Directory
from flashrt.store.history import History, sampler_of
from flashrt.store.manifest import ObjectRef, Place
from flashrt.store.notes import Notes, TokenNote
from flashrt.store.objects import object_name, put
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint
from tests.unit.far_filesystem import Far, FarFilesystem, Killed

SECRET = "The amulet is below the stairs ."
CHECKPOINT = str(bundled_checkpoint())
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    with flashrt.load(CHECKPOINT, device="cpu", max_positions=160, pool_bytes=8 << 20) as engine:
        yield engine


def generated(session: flashrt.Session, n: int, **options: Any) -> list[TokenNote]:
    """What `generate` yields, with its logprobs."""
    return [
        TokenNote(session.position - 1, token, *session.logprobs(400))
        for token in session.generate(n, **options)
    ]


@pytest.fixture(scope="module")
def made(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """root -> (hot -> hotter, cold), and another root `alone`; saved in that order, a minute each.
    Notes: hot and cold have some, as `generate` gave them.
    """
    folder = tmp_path_factory.mktemp("capsules")
    store, facts = Store(folder), dict[str, Any]()

    def save(session: flashrt.Session, name: str, notes: Notes | None = None) -> flashrt.Capsule:
        capsule = session.snapshot(name)
        saved = store.save(capsule, notes=notes)
        at = 1e9 + 60 * len(facts)
        os.utime(folder / saved.place.name, (at, at))
        facts[name] = saved.place.id, capsule.tokens, capsule.digest, notes
        return capsule

    with engine.session() as session:
        session.prefill(engine.tokenizer.encode(SECRET))
        root = save(session, "root")
        notes = generated(session, 6, temperature=1.5, top_k=20, seed=11, logit_bias={5: 0.5})
        save(session, "hot", Notes(notes, CHECKPOINT))
        list(session.generate(3))
        save(session, "hotter")
        session.restore(root)
        save(session, "cold", Notes(generated(session, 6)))
        session.rollback(0)
        session.prefill([7, 8, 9])
        save(session, "alone")
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    return folder, facts


@pytest.fixture
def folder(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy", symlinks=True))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command line of `flashrt store`; its JSON, its text, or its error where it was refused."""

    def run(action: str, where: object, *words: str, as_text: bool = False) -> Any:
        status = cli.main(["store", action, str(where), *words, *([] if as_text else ["--json"])])
        out, err = capsys.readouterr()
        if status == cli.REFUSED:
            return err
        assert status == cli.OK, err
        return out if as_text else json.loads(out)

    return run


def words_of(engine: Any, tokens: Any) -> str:
    return engine.tokenizer.decode(tokens, skip_special=False)


# -- log ------------------------------------------------------------------------------------------


def test_the_log_is_a_graph(run: Command, made: Any) -> None:
    """Red when children come after parents, the youngest is not first, or columns are off."""
    text = run("log", made[0], as_text=True)
    lines = [line for line in text.splitlines() if "position" in line or line in ("", "|/")]
    graph = [line.split("position")[0].rstrip() for line in lines]
    short = {name: made[1][name][0][:8] for name in made[1]}
    assert graph == [
        f"* {short['alone']} (alone)",
        "",
        f"* {short['cold']} (cold)",
        f"| * {short['hotter']} (hotter)",
        f"| * {short['hot']} (hot)",
        "|/",
        f"* {short['root']} (root)",
    ]
    assert SECRET in text.splitlines()[-1]


def test_the_log_as_json(run: Command, made: Any, engine: Any) -> None:
    folder, facts = made
    found = run("log", folder)
    assert found["problems"] == []
    rows = {row["names"][0]: row for row in found["capsules"]}
    assert list(rows) == ["alone", "cold", "hotter", "hot", "root"]
    parents = {"hot": "root", "hotter": "hot", "cold": "root"}
    for name, row in rows.items():
        id, tokens, digest, notes = facts[name]
        parent = parents.get(name)
        start = len(facts[parent][1]) if parent else 0
        assert (row["id"], row["digest"], row["position"]) == (id, digest, len(tokens))
        assert row["parent"] == (facts[parent][0] if parent else None)
        assert (row["own_start"], row["own_tokens"]) == (start, len(tokens) - start)
        assert row["text"] == " ".join(words_of(engine, tokens[start:]).split())
        assert row["has_notes"] == (notes is not None)
    ages = [row["age_s"] for row in rows.values()]
    assert np.diff(ages).tolist() == pytest.approx([60, 60, 60, 60], abs=0.01)
    own = {e.names[0]: e.own_nbytes for e in History(Store(folder)).entries.values()}
    assert sum(own.values()) >= upkeep.totals(Store(folder)).stored_nbytes
    assert own["hotter"] < rows["hotter"]["bytes"]

    path = run("log", folder, "hotter")["capsules"]
    assert [row["names"] for row in path] == [["hotter"], ["hot"], ["root"]]


def test_text_needs_a_tokenizer(run: Command, folder: Path, tmp_path: Path) -> None:
    """Of notes or given; never a guess. Red when words come from nowhere."""
    shutil.rmtree(folder / "notes")
    assert {row["text"] for row in run("log", folder)["capsules"]} == {None}
    assert run("show", folder, "root")["text"] is None
    given = run("log", folder, "root", "--checkpoint", CHECKPOINT)["capsules"]
    assert [row["text"] for row in given] == [SECRET]
    assert "has no tokenizer" in run("log", folder, "--checkpoint", str(tmp_path))
    Store(folder).annotate("alone", Notes(checkpoint=str(tmp_path / "gone")))
    found = run("log", folder)
    assert {row["text"] for row in found["capsules"]} == {None}
    assert len(found["problems"]) == 1 and "no text" in found["problems"][0]


# -- show -----------------------------------------------------------------------------------------


def test_show(run: Command, made: Any, engine: Any) -> None:
    folder, facts = made
    id, tokens, digest, notes = facts["hot"]
    start = len(facts["root"][1])
    for which in ("hot", id, id[:6], digest, digest[:9]):
        found = run("show", folder, which)
        assert (found["id"], found["digest"]) == (id, digest)
    assert found["tokens"] == tokens[start:].tolist()
    assert found["text"] == words_of(engine, tokens[start:])
    assert found["recorded_parent"] == found["parent"] == facts["root"][0]
    sampler = found["sampler"]
    assert (sampler["temperature"], sampler["top_k"], sampler["seed"]) == (1.5, 20, 11)
    assert sampler["logit_bias"] == [[5, 0.5]]
    assert run("show", folder, "root")["sampler"] is None, "nothing was sampled yet"
    assert run("show", folder, "cold")["sampler"]["temperature"] == 0
    assert [n["logprob"] for n in found["notes"]] == [n.logprob for n in notes.tokens]
    assert found["checkpoint"] == CHECKPOINT
    assert found["bands"]["rows"]["objects"] == 2
    assert sum(band["bytes"] for band in found["bands"].values()) == found["bytes"]

    text = run("show", folder, "hot", as_text=True)
    assert "temperature 1.5, seed 11, top_k 20, a bias on 1 tokens" in text
    assert f"rows {start} to {len(tokens)}" in text and "of 6 tokens, mean -" in text


@pytest.mark.parametrize("at", [0, 100, 300, 512 + 36, 512 + 63, 600, 800, 1024 + 8, 5130])
def test_a_sampler_is_not_guessed(folder: Path, at: int) -> None:
    """A fixed band that is not that of a lane of tokens: the cursor stands elsewhere, a gap or a
    guard is none, or the words are no sampler's. Red when such bytes are told as parameters.
    """
    store = Store(folder)
    hot = History(store).pick("hot")
    fixed = hot.manifest.fixed
    band = store.folder.read(object_name(fixed.digest), fixed.digest, fixed.nbytes).copy()
    assert sampler_of(store, hot) is not None
    band[at] ^= 0xFF
    forged, _ = put(store.folder, band)
    ref = ObjectRef(forged.digest, forged.nbytes)
    hot.manifest = replace(hot.manifest, fixed=ref)
    assert sampler_of(store, hot) is None


def test_what_is_whole_is_shown_beside_what_is_damaged(run: Command, folder: Path) -> None:
    """Red when one bad file ends a command that does not need it."""
    whole = run("show", folder, "hot")
    victim = folder / object_name(whole["fixed"]["object"])
    victim.write_bytes(victim.read_bytes()[:-1])
    found = run("show", folder, "hot")
    assert found["sampler"] is None and found["text"] == whole["text"]
    assert len(found["problems"]) == 1 and "is damaged" in found["problems"][0]

    manifest = next(folder.glob(f"capsules/*/*{whole['id']}.json"))
    manifest.write_bytes(b"{}")
    log = run("log", folder)
    assert {n for row in log["capsules"] for n in row["names"]} == {
        "root",
        "hotter",
        "cold",
        "alone",
    }
    parents = {row["names"][0]: row["own_start"] for row in log["capsules"]}
    assert parents["hotter"] == whole["own_start"], "hangs below root now"
    assert len(log["problems"]) == 1
    for which in ("hot", whole["id"][:8]):
        assert "is damaged" in run("show", folder, which)


# -- diff -----------------------------------------------------------------------------------------


def test_diff(run: Command, made: Any, engine: Any) -> None:
    """Red when a side's logprob is taken from the other's record, or from another position."""
    folder, facts = made
    (_, a, _, noted_a), (_, b, _, noted_b) = facts["hot"], facts["cold"]
    p = int(np.flatnonzero(a != b)[0])
    found = run("diff", folder, "hotter", "cold", "--around", "4")
    assert (found["relation"], found["position"]) == ("differ", p)
    assert found["ancestor"]["names"] == ["root"] and found["is_one_model"]
    longer = facts["hotter"][1]
    assert found["before"]["tokens"] == a[p - 4 : p].tolist()
    short = run("diff", folder, "hotter", "cold", "--around", "0")
    assert short["before"]["tokens"] == [] and short["a"]["tokens"] == [int(a[p])]
    assert found["a"]["tokens"] == longer[p : p + 4].tolist()
    assert found["b"]["tokens"] == b[p : p + 4].tolist()
    whole = words_of(engine, longer[p - 4 : p + 4])
    assert found["before"]["text"] + found["a"]["text"] == whole
    # hotter has no notes: its ancestor hot recorded the position. Both saw the same distribution.
    (note_a,) = [n for n in noted_a.tokens if n.position == p]
    (note_b,) = [n for n in noted_b.tokens if n.position == p]
    assert found["a"]["logprob"] == note_a.logprob == found["b"]["logprob_of_other"]
    assert found["b"]["logprob"] == note_b.logprob == found["a"]["logprob_of_other"]
    assert note_b.logprob >= note_a.logprob, "cold is greedy"

    text = run("diff", folder, "hotter", "cold", as_text=True)
    assert f"first difference at position {p}" in text and f"{note_a.logprob:.4f}" in text
    shutil.rmtree(found_notes := folder.parent / "x", ignore_errors=True)
    shutil.copytree(folder, found_notes)
    Store(found_notes).annotate("hot", Notes([TokenNote(p, int(a[p]), -1.25)]))
    shutil.rmtree(found_notes / "notes" / facts["cold"][0])
    found = run("diff", found_notes, "hot", "cold")
    assert [found["a"][k] for k in ("logprob", "logprob_of_other")] == [-1.25, None]
    assert [found["b"][k] for k in ("logprob", "logprob_of_other")] == [None, None]
    text = run("diff", found_notes, "hot", "cold", as_text=True)
    assert "not recorded" in text and "not among the 0 recorded" in text


def test_diff_of_relatives_and_strangers(run: Command, made: Any) -> None:
    folder, facts = made
    n = len(facts["hot"][1])
    found = run("diff", folder, "hot", "hotter")
    assert (found["relation"], found["position"]) == ("b goes on", n)
    assert found["ancestor"]["names"] == ["hot"] and found["a"]["tokens"] == []
    found = run("diff", folder, "hotter", "hot")
    assert (found["relation"], found["b"]["token"]) == ("a goes on", None)
    found = run("diff", folder, "hot", "hot")
    assert (found["relation"], found["position"]) == ("same tokens", n)
    found = run("diff", folder, "hot", "alone")
    assert (found["relation"], found["position"], found["ancestor"]) == ("differ", 0, None)
    assert "the same" in run("diff", folder, "hot", "hot", as_text=True)
    assert "goes on where" in run("diff", folder, "hot", "hotter", as_text=True)
    assert "common ancestor: none" in run("diff", folder, "hot", "alone", as_text=True)


def test_any_two_part_where_a_comparison_says(engine: Any, tmp_path: Path) -> None:
    """Trees over two tokens, so branches agree far beyond their ancestor; segments that differ from
    capsules; some capsules removed. Red when a difference within a segment, or in one that is not
    the last, is missed, or an ancestor is no prefix of both.
    """
    chance, store = random.Random(5), Store(tmp_path)
    store.folder = Directory(tmp_path, is_durable=False)
    capsules: list[flashrt.Capsule] = []
    places: list[Place] = []
    with engine.session() as session:
        for _ in range(22):
            if capsules and chance.random() < 0.85:
                session.restore(chance.choice(capsules))
            else:
                session.rollback(0)
            for _ in range(chance.randint(1, 3)):
                session.prefill([chance.choice([3, 3, 3, 4]) for _ in range(chance.randint(1, 4))])
            if session.position < 150:
                capsules.append(session.snapshot())
                places.append(store.save(capsules[-1]).place)
    tokens = {p.id: c.tokens for p, c in zip(places, capsules, strict=True)}
    for place in chance.sample(places, 5):
        if store.folder.size(place.name) is not None:
            store.remove(place)
    for capsule in list(engine.capsules.capsules):
        capsule.drop()

    history = History(store)
    entries = list(history.entries.values())
    assert len(entries) > 10 and history.problems == []
    deepest = 0
    for a, b in itertools.product(entries, repeat=2):
        left, right = tokens[a.id].tolist(), tokens[b.id].tolist()
        pairs = zip(left, right, strict=False)
        common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        parting = history.part(a, b, 3)
        assert parting.position == common
        assert parting.before.tolist() == left[max(0, common - 3) : common]
        assert parting.a.tokens.tolist() == left[common : common + 3]
        assert parting.b.token == (right[common] if common < len(right) else None)
        if parting.ancestor is not None:
            above = tokens[parting.ancestor.id].tolist()
            assert left[: len(above)] == above == right[: len(above)]
        if parting.relation == "differ":
            at = 0 if parting.ancestor is None else parting.ancestor.place.position
            deepest = max(deepest, common - at)
    assert deepest >= 2, "no two branches agreed beyond their ancestor: the test shows nothing"


# -- names and digests ----------------------------------------------------------------------------


def test_what_is_not_clear_is_refused_with_candidates(
    run: Command, folder: Path, made: Any, engine: Any
) -> None:
    facts, store = made[1], Store(folder)
    assert "no capsule is called 'hoter'; there is hotter" in run("show", folder, "hoter")
    assert "there is alone, cold, hot" in run("diff", folder, "hot", "zzzz")
    with engine.session() as session:  # one state, made in two ways: two ids, one digest
        session.prefill([7, 8])
        between = session.snapshot()
        store.save(between)
        session.prefill([9])
        twin = session.snapshot("twin")
        assert twin.digest == facts["alone"][2]
        id = store.save(twin).place.id
        between.drop()
        twin.drop()
    error = run("show", folder, twin_digest := facts["alone"][2])
    for each in (f"{id[:8]} at 3 (twin)", f"{facts['alone'][0][:8]} at 3 (alone)", "2 capsules"):
        assert each in error
    assert run("show", folder, "twin")["digest"] == twin_digest
    for text in (error, run("log", folder, "nobody")):
        assert "amulet" not in text and CHECKPOINT not in text


# -- notes ----------------------------------------------------------------------------------------


def test_notes_leave_capsules_as_they_are(made: Any, engine: Any, folder: Path) -> None:
    """So versions without notes read the store. Red when a manifest or an object tells of them."""
    assert list(folder.glob("notes/*/*"))
    shutil.rmtree(folder / "notes")
    for name in ("root", "hot", "hotter", "cold"):
        capsule = Store(folder).load(engine, name)
        assert capsule.digest == made[1][name][2]
        capsule.drop()
    assert upkeep.verify(Store(folder)).problems == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "flashrt-notes-9"}, "this version reads"),
        ({"capsule": "0" * 32}, "another capsule"),
        ({"tokens": 5}, "TypeError"),
        ({"tokens": [[1, 2]]}, "ValueError"),
        ({"tokens": [[0, 1, float("nan"), []]]}, "is not a logprob"),
        ({"tokens": [[0, 1, 0.5, []]]}, "is not a logprob"),
        ({"tokens": [[0, True, None, []]]}, "is not a token id"),
        ({"tokens": [[-1, 1, None, []]]}, "is not a position"),
        ({"tokens": [[1, 1, None, []], [1, 1, None, []]]}, "position 1 follows 1"),
        ({"tokens": [[0, 1, None, [[4, -1], [4, -2]]]]}, "each once"),
        ({"tokens": [[0, 1, None, [[4, "x"]]]]}, "is not a logprob"),
        ({"tokens": [[159, 1, None, []]]}, "beyond position"),
        ({"tokens": [[0, 1, None, []]]}, "another token at 0"),
        ({"checkpoint": 7}, "not the path"),
        ({"checkpoint": None, "tokens": None}, "TypeError"),
    ],
)
def test_forged_notes(run: Command, folder: Path, change: dict[str, Any], complaint: str) -> None:
    """Their digest is right. Red when one ends a command, or is believed."""
    found = run("show", folder, "cold")
    (path,) = folder.glob(f"notes/{found['id']}/*")
    data = json.dumps(json.loads(path.read_text()) | change).encode()
    path.unlink()
    (path.parent / f"{xxhash.xxh3_128_hexdigest(data)}.json").write_bytes(data)
    again = run("show", folder, "cold")
    assert again["notes"] is None and again["text"] == found["text"]
    (problem,) = again["problems"]
    assert complaint in problem
    assert run("diff", folder, "hot", "cold")["b"]["logprob"] is None
    assert any(complaint in p for p in upkeep.verify(Store(folder)).problems)


def test_damaged_notes_cost_the_notes_alone(run: Command, folder: Path, engine: Any) -> None:
    for path in folder.glob("notes/*/*"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    for action, words in (("log", []), ("show", ["hot"]), ("diff", ["hot", "cold"])):
        found = run(action, folder, *words)
        assert found["problems"] and all("is damaged" in p for p in found["problems"])
    assert "is damaged" in run("log", folder, as_text=True)
    assert len(upkeep.verify(Store(folder)).problems) == 2
    Store(folder).load(engine, "hot").drop()
    assert Store(folder).annotate("hot", Notes(checkpoint=CHECKPOINT))
    Store(folder).annotate("cold", Notes())
    assert upkeep.verify(Store(folder)).problems == [], "annotating again heals"


def test_notes_about_other_tokens_are_refused(engine: Any, tmp_path: Path) -> None:
    """Before anything is written."""
    store = Store(tmp_path / "s")
    with engine.session() as session:
        session.prefill([1, 2, 3])
        capsule = session.snapshot("c")
        for notes in (Notes([TokenNote(0, 2)]), Notes([TokenNote(3, 1)])):
            with pytest.raises(StoreError, match="notes: "):
                store.save(capsule, notes=notes)
        assert not store.is_there
        place = store.save(capsule, notes=Notes([TokenNote(1, 2, -0.5)])).place
        capsule.drop()
    with pytest.raises(StoreError, match="another token at 1"):
        store.annotate("c", Notes([TokenNote(1, 1)]))
    notes, problems = store.notes("c")
    assert notes == Notes([TokenNote(1, 2, -0.5)]) and problems == []

    store.annotate(place, Notes([TokenNote(2, 3, -1.0, [(3, -1.0)])]))
    assert store.notes("c")[0] == Notes([TokenNote(2, 3, -1.0, [(3, -1.0)])]), "replaced"
    store.annotate(place, Notes([TokenNote(2, 3, -1.0, [(3, -1.0)])]))
    assert store.notes("c")[0] is not None, "the same again"
    for other in ([TokenNote(1, 2, -0.5), TokenNote(2, 3, -1.0)], []):  # of others, at that time
        name, _, data = Notes(other, "somewhere").encode(place.id)
        store.folder.write(name, data)
    merged = [TokenNote(1, 2, -0.5), TokenNote(2, 3, -1.0, [(3, -1.0)])]
    assert store.notes("c")[0] == Notes(merged, "somewhere")


def test_notes_go_with_their_capsule(folder: Path) -> None:
    """Red when a sweep takes a living capsule's notes, or leaves a dead one's."""
    store = Store(folder)
    (folder / "notes" / "README").write_text("not the store's")
    assert upkeep.sweep(store) == upkeep.Swept(0, 0, 0, strays=1)
    cold = store.remove("cold")
    assert list(folder.glob(f"notes/{cold.id}/*")) and upkeep.verify(store).unused_nbytes
    swept = upkeep.sweep(store)
    assert (swept.notes, swept.objects, swept.strays) == (1, 3, 1)
    assert not list(folder.glob(f"notes/{cold.id}/*"))
    assert store.notes("hot")[0] is not None
    assert upkeep.verify(store).problems == [] and upkeep.verify(store).notes == 1


# -- elsewhere ------------------------------------------------------------------------------------


@pytest.fixture(params=["farther", "far"], ids=["atomic put", "in place"])
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Far:
    monkeypatch.setattr(remote, "flags", lambda: replace(flags(), cache_dir=tmp_path / "cache"))
    far = Far(is_atomic=request.param == "farther")
    monkeypatch.setattr(FarFilesystem, "far", far)
    return far


def test_the_same_on_a_remote_store(run: Command, made: Any, far: Far) -> None:
    folder, _ = made
    url = f"{'farther' if far.is_atomic else 'far'}://store"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        far.now_s = path.stat().st_mtime
        far.put(f"store/{path.relative_to(folder)}", path.read_bytes())

    def timeless(found: Any) -> Any:
        if isinstance(found, dict):
            return {k: timeless(v) for k, v in found.items() if k != "age_s"}
        return [timeless(v) for v in found] if isinstance(found, list) else found

    for action, words in (("log", []), ("show", ["hot"]), ("diff", ["hotter", "cold"])):
        there = run(action, url, *words)
        assert timeless(there) == timeless(run(action, folder, *words))

    def annotate() -> None:
        Store(url).annotate("cold", Notes(checkpoint=CHECKPOINT))

    before, files = far.operations, dict(far.files)
    annotate()
    total = far.operations - before
    for n in range(1, total + 1, 1 if total < 60 else 2):  # killed at any operation
        far.files = dict(files)
        left = [n]

        def step(op: str, path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed

        far.before = step
        with pytest.raises(Killed):
            annotate()
        far.before = lambda op, path: None
        notes, problems = Store(url).notes("cold")
        assert notes is not None and problems == []
        for name in [f for f in far.files if "/writers/" in f]:
            del far.files[name]
    Store(url).remove("cold")
    swept = upkeep.sweep(Store(url), grace_s=0)
    assert swept.notes >= 1 and len([f for f in far.files if "/notes/" in f]) == 1
