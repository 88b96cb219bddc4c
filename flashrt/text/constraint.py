"""Constraints: which tokens a grammar allows next, for one tokenizer, by llguidance.

IS: grammars compiled for a tokenizer and kept; the place that a text has reached in one, and the
mask that the sampler reads there. IS NOT: what a grammar is (grammar), or sampling.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import GrammarError
from flashrt.base.locks import reentrant_lock
from flashrt.base.messages import shown
from flashrt.text.grammar import Grammar
from flashrt.text.tokenizer import Tokenizer, is_of_library

MOST_KEPT = 128  # compiled grammars
_END = "<|flashrt: the grammar may end|>"  # a token that no text has, in place of the model's own
_WORD_BITS = 32  # of a mask: token t is bit t % 32 of word t / 32, as the sampler has it too
T = TypeVar("T")


class Constraint:
    """A text that comes token by token, held against a grammar. Made by `Grammars.begin`."""

    def __init__(self, matcher: Any, kept: NDArray[np.uint32], stops: NDArray[np.uint32]) -> None:
        """`kept`: a bit for each token that may be text; `stops`: those that may end it."""
        self._matcher, self._kept, self._stops = matcher, kept, stops
        self._allowed: NDArray[np.uint32] | None = None  # until a token comes

    @property
    def is_stopped(self) -> bool:
        """Whether it is known without a mask that the text is complete and nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def is_over(self) -> bool:
        """Whether the text is complete and no token can follow it, a stop token neither.

        Raises GrammarError where it is not complete and yet nothing can follow, and when the
        grammar grew beyond llguidance's limits.
        """
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed further: {self._error()}")
        if self._matcher.is_stopped():
            return True
        if self._mask().any():
            return False
        if not self._matcher.is_accepting():
            raise GrammarError(
                "the grammar wants more text, and no token of the tokenizer can be the next"
            )
        return True

    def allowed(self) -> bytes:
        """The mask for the next token, a bit for each. Stop tokens are allowed where the text may
        end, and nowhere else.
        """
        return self._mask().tobytes()

    def take(self, token: int) -> None:
        """The next token. One that was not allowed is noticed by `is_over`."""
        self._allowed = None
        self._matcher.consume_token(token)

    def _mask(self) -> NDArray[np.uint32]:
        if self._allowed is None:
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            mask = found[: len(self._kept)] & self._kept
            if self._matcher.is_accepting():
                mask |= self._stops
            self._allowed = mask
        return self._allowed

    def _error(self) -> str:
        return _first_lines(self._matcher.get_error())


class Grammars:
    """Grammars of one tokenizer, compiled once each; the last 128 are kept. Any thread may ask."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """`vocab_size`: the model's, which may be larger. Nothing is compiled before it is used."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = reentrant_lock()
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()  # matchers that took no token
        self._library: tuple[Any, NDArray[np.uint32]] | None = None

    def compile(self, grammar: Grammar) -> None:
        """Do now what the first use would: seconds for a large vocabulary, and for a large schema.

        Raises GrammarError for a grammar that is refused, for a tokenizer that cannot be used or is
        not there, and without llguidance.
        """
        self._compiled(grammar)

    def begin(self, grammar: Grammar, stop: Iterable[int] = ()) -> Constraint:
        """A text of its own, at its beginning or after `grammar.begun`; `stop`: tokens that end it.

        Raises GrammarError as `compile`, and where the grammar does not allow a token of `begun`.
        """
        matcher, words = self._compiled(grammar)
        known = itertools.takewhile(lambda token: token < self._vocab_size, grammar.begun)
        taken = matcher.try_consume_tokens(list(known))
        if taken < len(grammar.begun):
            raise GrammarError(
                f"the grammar does not allow token {taken} of the {len(grammar.begun)} that the "
                f"text began with, {grammar.begun[taken]}"
            )
        stops = _bits(self._vocab_size, np.fromiter(stop, np.int64))
        return Constraint(matcher, words & ~stops, stops)

    def _compiled(self, grammar: Grammar) -> tuple[Any, NDArray[np.uint32]]:
        """A matcher of its own, before any token, and a bit for each token that may be text."""
        if not isinstance(grammar, Grammar):
            raise GrammarError(f"grammar is {shown(grammar)}, expected a flashrt.Grammar")
        whole = Grammar(grammar.kind, grammar.text, grammar.is_compact)
        with self._lock:
            if self._library is None:
                self._library = _library_tokenizer(self._tokenizer, self._vocab_size)
            tokenizer, words = self._library
            matcher = self._kept.get(whole)
        if matcher is None:  # others need not wait; two that compile the same lose time alone
            what = f"the {whole.kind.replace('_', ' ')} is refused"
            matcher = _of_library(lambda: _matcher(tokenizer, whole), what)
            if matcher.is_error():
                raise GrammarError(f"{what}: {_first_lines(matcher.get_error())}")
        with self._lock:
            self._kept[whole] = matcher
            self._kept.move_to_end(whole)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return matcher.deep_copy(), words


def _bits(vocab_size: int, tokens: NDArray[np.int64]) -> NDArray[np.uint32]:
    """A mask of tokens that lie in the vocabulary."""
    bits = np.zeros(-(-vocab_size // _WORD_BITS) * _WORD_BITS, bool)
    bits[tokens[tokens < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _library_tokenizer(
    tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[Any, NDArray[np.uint32]]:
    """llguidance's tokenizer, and a bit for each token but the end: one that is added, so that stop
    tokens are ours to allow.
    """
    if tokenizer is None:
        raise GrammarError("a grammar needs a tokenizer, and the checkpoint has none")
    try:
        import llguidance  # an extra, and slow to import
    except ImportError as error:
        raise GrammarError("a grammar needs llguidance: pip install 'flashrt[grammar]'") from error
    text, end = tokenizer.with_special(_END)
    made = _of_library(
        lambda: llguidance.LLTokenizer(text, n_vocab=max(vocab_size, end + 1), eos_token=end),
        f"{tokenizer.path}: llguidance cannot use this tokenizer",
    )
    others = np.arange(vocab_size)
    return made, _bits(vocab_size, others[others != end])


def _matcher(tokenizer: Any, grammar: Grammar) -> Any:
    import llguidance

    of, text = llguidance.LLMatcher, grammar.text
    if grammar.kind == "json_schema":
        source = of.grammar_from_json_schema(
            text, defaults={"whitespace_flexible": not grammar.is_compact}
        )
    elif grammar.kind == "regex":
        source = of.grammar_from_regex(text)
    else:
        source = of.grammar_from_lark(text)
    limits = llguidance.LLParserLimits(verbose_errors=False)  # no state of the parser in errors
    return of(tokenizer, source, log_level=0, limits=limits)


def _of_library(function: Callable[[], T], what: str) -> T:
    """A call of llguidance, whose errors become ours."""
    try:
        return function()
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise GrammarError(f"{what}: {error}") from error


def _first_lines(text: str) -> str:
    """What of an error is about the grammar, not about llguidance's state."""
    return text.partition("\n<state>")[0].strip()
