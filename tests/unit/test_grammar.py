"""Grammars and what they allow, without a model: what is refused, masks, tokenizers of both kinds.

Red when an error of llguidance comes out as it is, or a grammar changes a session that refuses it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

import flashrt
from flashrt import Grammar, GrammarError
from flashrt.ops.sample import SamplerParams, mask_words
from flashrt.text.constraint import Constraint, Grammars
from flashrt.text.grammar import grammar_of
from flashrt.text.tokenizer import Tokenizer, tokenizer_of
from flashrt.weights.bundled import bundled_checkpoint

NUMBER = Grammar.regex("[0-9]{1,3}")


def bundled() -> Tokenizer:
    found = tokenizer_of(bundled_checkpoint())
    assert found is not None
    return found


def with_bytes() -> Tokenizer:
    """In the manner of SentencePiece: spaces are marks, what has no token is spelled in bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    pieces = [*words, "ab", "▁ab", "▁a"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a")]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    library = tokenizers.Tokenizer(model)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    return Tokenizer(Path("with_bytes"), library.to_str())


def tokens_in(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def walked(constraint: Constraint, choose: Callable[[list[int]], int], n: int = 200) -> list[int]:
    """Tokens that were allowed, each chosen among those of its mask."""
    taken = []
    while not constraint.is_over() and len(taken) < n:
        taken.append(choose(tokens_in(constraint.allowed())))
        constraint.take(taken[-1])
    return taken


REFUSED: list[tuple[Callable[[], Grammar], str]] = [
    (lambda: Grammar.json_schema({"type": "foo"}), "json schema is refused: .*foo"),
    (lambda: Grammar.json_schema({"uniqueItems": True}), "refused: .*uniqueItems"),
    (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "refused: .*nowhere"),
    (lambda: Grammar.json_schema("false"), "the schema is False; an object is expected"),
    (lambda: Grammar.json_schema({"not": {}}), "refused: .*not"),
    (lambda: Grammar.regex("(a"), "regex is refused: .*unclosed group"),
    (lambda: Grammar.lark("start: nothing"), "lark is refused: .*unknown name"),
    (lambda: Grammar.json_schema("{"), "the schema is no JSON"),
    (lambda: Grammar.json_schema("[1]"), "an object is expected"),
    (lambda: Grammar.json_schema({"enum": [float("nan")]}), "the schema is no JSON"),
    (lambda: Grammar.json_schema({"enum": [{1}]}), "the schema is no JSON"),  # type: ignore[list-item]
    (lambda: Grammar.regex(5), "regex: 5 is no text"),  # type: ignore[arg-type]
    (lambda: NUMBER.after([1.5]), "1.5 is no token id"),  # type: ignore[list-item]
    (lambda: NUMBER.after([-1]), "-1 is no token id"),
    (lambda: NUMBER.after([3, 1 << 40]), "does not allow token 0 of the 2"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_what_is_refused(make: Callable[[], Grammar], said: str) -> None:
    grammars = Grammars(bundled(), 700)
    with pytest.raises(GrammarError, match=f"(?s){said}") as caught:
        grammars.begin(make())
    assert len(str(caught.value)) < 600  # and not the state of a parser


def test_a_session_that_refuses_stays_as_it_was(session: flashrt.Session) -> None:
    """The tiny model has no tokenizer."""
    session.prefill([1, 2, 3])
    digest = session.digest()
    with pytest.raises(GrammarError, match="the checkpoint has none"):
        session.generate(3, grammar=NUMBER)
    with pytest.raises(flashrt.SessionError, match="allowed has 3 bytes"):
        session.engine.set_sampler(session.lane, SamplerParams(allowed=b"abc"))
    with pytest.raises(flashrt.SessionError, match="allowed=5 is neither"):
        SamplerParams(allowed=5)  # type: ignore[arg-type]
    assert session.digest() == digest and len(list(session.generate(3))) == 3


def test_no_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'flashrt\[grammar\]'"):
        Grammars(bundled(), 700).begin(NUMBER)


def test_what_is_no_grammar() -> None:
    with pytest.raises(GrammarError, match=r"expected a flashrt\.Grammar"):
        Grammars(bundled(), 700).begin({"type": "object"})  # type: ignore[arg-type]


def test_a_tokenizer_that_cannot_be_used() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    with pytest.raises(GrammarError, match="llguidance cannot use this tokenizer"):
        Grammars(Tokenizer(Path("words"), library.to_str()), 3).begin(NUMBER)


@pytest.mark.parametrize("vocab_size", [640, 647, 648, 704, 1000])
def test_ids_without_text_are_never_allowed(vocab_size: int) -> None:
    """A model's vocabulary is padded, or lacks what the tokenizer added: masks are of its size, and
    the token that stands for the end is not of it. Red when a bit beyond lets one through.
    """
    constraint = Grammars(bundled(), vocab_size).begin(Grammar.regex("(?s:.*)"), [1])
    assert len(constraint.allowed()) == 4 * mask_words(vocab_size)
    allowed = tokens_in(constraint.allowed())
    assert 1 in allowed and 0 not in allowed  # it may end here, by our token and not by another
    assert max(allowed) < min(vocab_size, 647) and len(allowed) > 400


@pytest.mark.parametrize("make", [bundled, with_bytes])
@pytest.mark.parametrize("text", ["a b", "é", "ab ab€\n", "\U0001f600 x"])
def test_every_text_can_be_spelled(make: Callable[[], Tokenizer], text: str) -> None:
    """By the longest tokens, and by the shortest."""
    tokenizer = make()
    grammars = Grammars(tokenizer, 1000)
    literal = Grammar.lark(f"start: {json.dumps(text, ensure_ascii=False)}")
    for choose in (min, max):
        taken = walked(grammars.begin(literal), choose)
        assert tokenizer.decode(taken) == text


def test_after() -> None:
    grammars, tokenizer = Grammars(bundled(), 700), bundled()
    grammar = Grammar.json_schema(
        {
            "type": "object",
            "properties": {"a": {"enum": ["xyz", "xyw"]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    )
    rng = np.random.default_rng(1)
    whole = walked(grammars.begin(grammar), lambda allowed: int(rng.choice(allowed)))
    for n in range(len(whole)):
        rest = grammars.begin(grammar.after(whole[:n]))
        assert whole[n] in tokens_in(rest.allowed())
        assert not rest.is_over()
    assert grammars.begin(grammar.after(whole[:2]).after(whole[2:])).is_over()
    wrong = tokenizer.encode("q")
    with pytest.raises(GrammarError, match=f"does not allow token 1 of the 2 .*, {wrong[0]}"):
        grammars.begin(grammar.after([whole[0], *wrong]))


def test_a_dead_end_says_so() -> None:
    """The only token that could follow ends the text, which is not complete."""
    tokenizer = bundled()
    (seven,) = tokenizer.encode("7")
    constraint = Grammars(tokenizer, 700).begin(Grammar.regex("7{3}"), [seven])
    assert tokens_in(constraint.allowed()) == []
    with pytest.raises(GrammarError, match="no token of the tokenizer can be the next"):
        constraint.is_over()


def test_a_token_that_was_not_allowed_is_noticed() -> None:
    constraint = Grammars(bundled(), 700).begin(NUMBER)
    constraint.take(1)
    with pytest.raises(GrammarError, match="cannot be followed further") as caught:
        constraint.is_over()
    assert len(str(caught.value)) < 600
    assert not constraint.is_stopped


def test_grammars_are_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashrt.text.constraint.MOST_KEPT", 2)
    grammars = Grammars(bundled(), 700)
    made = [Grammar.regex(f"{i}+") for i in range(3)]
    for grammar in (made[0], made[1], made[0], made[2], made[0].after([]), made[2]):
        grammars.compile(grammar)
    assert list(grammars._kept) == [made[0], made[2]]
    first, second = grammars.begin(made[0]), grammars.begin(made[0])
    (zero,) = tokens_in(first.allowed())[:1]
    first.take(zero)
    assert first.allowed() != second.allowed() or not second._matcher.is_accepting()
    assert not second._matcher.is_accepting()  # one text's tokens are not another's


def test_through_json() -> None:
    grammar = Grammar.json_schema({"type": "null"}, compact=True).after([4, 5])
    assert grammar_of(json.loads(json.dumps(asdict(grammar)))) == grammar
    for wrong in (None, [], {"kind": "regex"}, asdict(grammar) | {"kind": "poem"},
                  asdict(grammar) | {"begun": 4}, asdict(grammar) | {"begun": ["a"]}):  # fmt: skip
        with pytest.raises(GrammarError):
            grammar_of(wrong)
