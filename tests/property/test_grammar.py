"""Promise: what a grammar constrains is of the grammar, at any temperature, on any lane; and the
grammar changes nothing else.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashrt
from flashrt import Grammar
from flashrt.session.recording import SessionRecorder, replay
from flashrt.weights.bundled import bundled_checkpoint
from tests.property.guessing import guessing, truth

PROMPT = "the red key is in the hall . where is the red key ?"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
HOT = {"temperature": 1.4, "seed": 3}


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    with flashrt.load(bundled_checkpoint(), device="cpu", max_positions=512, lanes=5) as made:
        yield made


@pytest.fixture
def session(engine: flashrt.Engine) -> Iterator[flashrt.Session]:
    with prompted(engine) as made:
        yield made
    for capsule in list(engine.capsules.capsules):
        capsule.drop()


def prompted(engine: flashrt.Engine) -> flashrt.Session:
    assert engine.tokenizer is not None
    session = engine.session()
    session.prefill(engine.tokenizer.encode(PROMPT))
    return session


def text_of(engine: flashrt.Engine, tokens: list[int]) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(tokens, skip_special=False)


# ---- what comes is of the grammar


NUMBERS = st.integers(-9, 9) | st.integers(-999, 999).map(lambda n: n / 100)
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
        st.integers(-1000, 1000), st.integers(0, 5000),
    ),
    st.builds(
        lambda v: {"enum": v},
        st.lists(
            NUMBERS | st.text(max_size=5), min_size=1, max_size=4,
        ),
    ),
    st.builds(lambda v: {"const": v}, st.text(max_size=6)),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-c]{2,5}$", "^x?[0-9]{3}$")]),
)  # fmt: skip


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def made(properties: dict[str, Any], wanted: int) -> dict[str, Any]:
        names = list(properties)
        return {
            "type": "object", "properties": properties, "additionalProperties": False,
            "required": [n for i, n in enumerate(names) if wanted >> i & 1],
        }  # fmt: skip

    names = st.text("abcdeXÄ_", min_size=1, max_size=5)
    return st.builds(made, st.dictionaries(names, values, max_size=3), st.integers(0, 7))


def branches(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda v, low, n: {"type": "array", "items": v, "minItems": low, "maxItems": low + n},
        values, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    either = st.builds(lambda v: {"anyOf": v}, st.lists(values, min_size=1, max_size=3))
    return st.one_of(arrays, objects(values), either)


SCHEMAS = st.recursive(LEAVES, branches, max_leaves=6)


@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30), temperature=st.sampled_from([0.0, 0.8, 2.0]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_schemas(
    engine: flashrt.Engine, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    """Red when a mask is one token late, belongs to another lane, or a token is used that was
    sampled without it.
    """
    grammar = Grammar.json_schema(schema, compact=True)
    with prompted(engine) as session:
        session.logits()  # so that a token is known ahead, sampled without a mask
        stream = session.generate(
            400, temperature, seed=seed, stop=engine.text.stop_tokens, grammar=grammar
        )
        text = text_of(engine, list(stream))
    assert stream.reason == "stop", text
    jsonschema.validate(json.loads(text), schema)


def test_without_a_grammar_nothing_of_it_comes(engine: flashrt.Engine) -> None:
    """The negative control: else the test above would show nothing."""
    for seed in range(5):
        with prompted(engine) as session:
            tokens = list(session.generate(60, 2.0, seed=seed, stop=engine.text.stop_tokens))
        with pytest.raises((json.JSONDecodeError, jsonschema.ValidationError)):
            jsonschema.validate(json.loads(text_of(engine, tokens)), PERSON)


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar.regex("(yes|no|perhaps)[!?]{1,2}"), "(yes|no|perhaps)[!?]{1,2}"),
        (Grammar.regex("[a-zé€\U0001f600]{5}"), "[a-zé€\U0001f600]{5}"),
        (Grammar.lark('start: "(" start ")" | /[0-9]{2}/'), r"\(*[0-9]{2}\)*"),
    ],
)
def test_texts(session: flashrt.Session, grammar: Grammar, fits: str) -> None:
    for seed in range(4):
        with session.fork() as fork:
            stream = fork.generate(120, 1.6, seed=seed, grammar=grammar)
            text = text_of(session.engine, list(stream))  # type: ignore[arg-type]
        assert stream.reason == "stop" and re.fullmatch(fits, text), text
        assert text.count("(") == text.count(")")


def test_a_stop_token_comes_where_the_text_may_end(session: flashrt.Session) -> None:
    """However likely it is. Red when the tokenizer's own end is let through instead."""
    (stop,) = session.engine.text.stop_tokens  # type: ignore[attr-defined]
    digit = session.engine.tokenizer.encode("7")[0]  # type: ignore[attr-defined]
    grammar = Grammar.regex("[0-9]{2,4}")
    lengths = {}
    for name, ends, bias in (
        ("wanted", [stop], {stop: 90.0}), ("unwanted", [stop], {stop: -90.0}), ("none", [], {}),
        ("a digit", [digit], {digit: 90.0}),
    ):  # fmt: skip
        with session.fork() as fork:
            stream = fork.generate(9, 1.0, stop=ends, logit_bias=bias, grammar=grammar)
            tokens = list(stream)
            lengths[name] = len(text_of(session.engine, tokens))  # type: ignore[arg-type]
        assert stream.reason == "stop" and stop not in tokens
    assert lengths == {"wanted": 2, "unwanted": 4, "none": 4, "a digit": 2}


# ---- and nothing else is changed


def test_alone_and_together(engine: flashrt.Engine) -> None:
    """Three lanes with grammars of their own and one without: tokens and digests of each alone."""
    options: list[dict[str, Any]] = [
        {**HOT, "grammar": Grammar.json_schema(PERSON)},
        {**HOT, "seed": 9},
        {"temperature": 0.7, "seed": 1, "grammar": Grammar.regex("[a-f ]{30}"), "draft": 4},
        {**HOT, "grammar": Grammar.json_schema(PERSON, compact=True), "repetition_penalty": 1.2},
    ]
    alone = []
    for option in options:
        with prompted(engine) as session:
            alone.append((list(session.generate(80, **option)), session.digest()))
    sessions = [prompted(engine) for _ in options]
    said: dict[int, list[int]] = defaultdict(list)
    streams = [s.generate(80, **o) for s, o in zip(sessions, options, strict=True)]
    for i, token in flashrt.together(*streams):
        said[i].append(token)
    assert [(said[i], s.digest()) for i, s in enumerate(sessions)] == alone
    assert [s.reason for s in streams] == ["stop", "length", "stop", "stop"]
    for session in sessions:
        session.close()


def test_a_token_ahead_is_used_only_under_its_own_mask(session: flashrt.Session) -> None:
    """The logits are asked for between tokens, so that one more is sampled under the old mask."""
    grammar = Grammar.regex("([0-4][5-9]){4}")  # no mask is that of the token before
    with session.fork() as fork:
        expected = list(fork.generate(8, grammar=grammar))
    with session.fork() as fork:
        plain = list(fork.generate(20))
    seen = []
    for token in session.generate(8, grammar=grammar):
        seen.append(token)
        session.logits()
    assert seen == expected != plain[:8]
    session.rollback(session.position - 8)
    session.logits()
    assert list(session.generate(20)) == plain


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_after_drafts(session: flashrt.Session, taken: int) -> None:
    """Tokens that a verify found lie ahead when the grammar begins."""
    engine, start = session.engine, session.tokens.tolist()
    following = truth(engine, start, 12)
    grammar = Grammar.regex("([0-4][5-9]){4}")
    with engine.session() as other:
        other.prefill([*start, *following[:taken]])
        expected = list(other.generate(8, grammar=grammar)), other.digest()
    with guessing(engine, start, following, 1.0):
        assert list(islice(session.generate(12, draft=6), taken)) == following[:taken]
        assert (list(session.generate(8, draft=6, grammar=grammar)), session.digest()) == expected


def test_in_the_midst(session: flashrt.Session, tmp_path: Path) -> None:
    """A capsule from the midst holds the mask; a grammar goes on after what it has seen, in a
    restored, forked or rolled back session as in one that never stopped.
    """
    engine = session.engine
    grammar = Grammar.json_schema(PERSON, compact=True)
    start = session.position
    with session.fork() as fork:
        whole, digest = list(fork.generate(90, grammar=grammar, **HOT)), fork.digest()
    stream = session.generate(90, grammar=grammar, **HOT)
    begun = [next(stream) for _ in range(7)]
    assert begun == whole[:7]
    stream.close()
    assert session.tokens[start:].tolist() == begun
    capsule = session.snapshot()
    mask = engine.lane_array(session.lane, "mask")
    assert 0 < sum(int(word).bit_count() for word in mask) < engine.vocab_size
    capsule.save(tmp_path / "midst.capsule")
    rest = grammar.after(begun)
    for how in ("as it is", "fork", "restore", "file", "rollback"):
        other = session.fork(capsule) if how == "fork" else session
        if how in ("restore", "file"):
            list(session.generate(9, temperature=2.0))
            engine.poison_lane(session.lane)
            is_read = how == "file"
            found = engine.load_capsule(tmp_path / "midst.capsule") if is_read else capsule
            session.restore(found)
            assert np.array_equal(engine.lane_array(session.lane, "mask"), mask)
        if how == "rollback":
            session.rollback(start + 7)
        assert list(other.generate(83, grammar=rest, **HOT)) == whole[7:], how
        assert other.digest() == digest
        if how == "fork":
            other.close()


def test_a_recording_has_the_grammar(session: flashrt.Session, tmp_path: Path) -> None:
    engine = session.engine
    assert isinstance(engine, flashrt.Engine)
    capsule = session.snapshot()
    path = tmp_path / "said.jsonl"
    with SessionRecorder(engine, session, path) as recorder:
        list(recorder.generate(60, grammar=Grammar.json_schema(PERSON, compact=True), **HOT))
    report = replay(engine, capsule, path)
    assert report.mismatch is None and report.steps == 1
    path.write_text(path.read_text().replace('\\"age\\"', '\\"ago\\"'))
    assert replay(engine, capsule, path).mismatch is not None


# ---- probabilities


def logs_of(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def test_log_probabilities_of_lanes_together(engine: flashrt.Engine) -> None:
    """Of the logits as they are, mask or none, from the first token on: of each lane its own."""
    options: list[dict[str, Any]] = [
        {**HOT}, {**HOT, "grammar": Grammar.regex("[0-9a-f]{9}")}, {"draft": 4}, {},
    ]  # fmt: skip
    sessions = [prompted(engine) for _ in options]
    seen: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    streams = [s.generate(9, **o) for s, o in zip(sessions, options, strict=True)]
    for i, token in flashrt.together(*streams):
        seen[i].append((token, sessions[i].logprobs(4)))
    for session in sessions:
        session.close()
    for i in range(len(options)):
        with prompted(engine) as oracle:
            assert len(seen[i]) >= 5
            for token, (logprob, top) in seen[i]:
                logs = logs_of(oracle.logits())
                assert logprob == pytest.approx(logs[token], abs=1e-9)
                assert [t for t, _ in top] == np.argsort(-logs, kind="stable")[:4].tolist()
                assert [p for _, p in top] == pytest.approx([logs[t] for t, _ in top], abs=1e-9)
                oracle.prefill([token])
