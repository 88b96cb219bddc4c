"""Text <-> token ids: a checkpoint's tokenizer.json through the `tokenizers` library.

IS: encode and decode, of whole texts; what the file says about tokens (added, special, hidden). IS
NOT: chat formatting (template, prompt), streams (stream), or of the model's size: a model may have
more ids than its tokenizer. Exists so that the library's errors, and the panics of its Rust code,
which are no `Exception`, come out as errors of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flashrt.base.errors import CheckpointError, FlashrtError, TokenError
from flashrt.base.files import read_file
from flashrt.base.messages import shown
from flashrt.text.stream import StreamDecoder

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_MOST_NBYTES = 512 << 20  # known ones have up to 35 MB
_BYTE_SPELLING = "<0x{:02X}>"  # of the tokens that a ByteFallback decoder joins to characters

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that the file adds to the model's own: its spelling in a text becomes its id, before
    any other rule. Special ones are hidden from decoded text.
    """

    id: int
    spelling: str
    is_special: bool


class Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError if the file cannot be used."""

    def __init__(
        self, path: Path, source: str | Callable[[], tokenizers.Tokenizer] | None = None
    ) -> None:
        """From a file, or from what is there in its place: its text, or what makes the library's
        object, whose errors become ours.
        """
        import tokenizers  # slow to import, and not needed for token ids

        try:
            text = read_file(path, _MOST_NBYTES).decode() if source is None else source
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        self.path = path
        self._library = _call(
            (lambda: tokenizers.Tokenizer.from_str(text)) if isinstance(text, str) else text,
            CheckpointError,
            f"{path}: not a usable tokenizer",
        )
        # What a file may ask for batches of training would cut or fill up every prompt here.
        self._library.no_truncation()
        self._library.no_padding()

    @property
    def vocab_size(self) -> int:
        """Ids that stand for text, special tokens included."""
        return int(self._library.get_vocab_size())

    @cached_property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """Those that the file adds, by id."""
        found: Mapping[int, tokenizers.AddedToken] = self._library.get_added_tokens_decoder()
        return tuple(AddedToken(i, t.content, bool(t.special)) for i, t in sorted(found.items()))

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for what the model has no token for; None if it has tokens for everything."""
        from tokenizers import models

        model = self._library.model
        if isinstance(model, models.BPE | models.WordPiece | models.WordLevel):
            return None if model.unk_token is None else self.token_id(model.unk_token)
        try:  # a Unigram model does not tell: ask it for a character that no vocabulary holds
            return next((t for t in self.encode("\U0010fffd") if t in self._special), None)
        except TokenError:
            return None

    @cached_property
    def first_of_all(self) -> int | None:
        """The token that the file's own rules would put before any text; None if they put none."""
        ids = self._library.encode("", add_special_tokens=True).ids
        return int(ids[0]) if ids else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Added tokens spelled out in it are recognised; none is put around it.

        Raises TokenError for a text that this tokenizer has no ids for.
        """
        return list(
            _call(
                lambda: self._library.encode(text, add_special_tokens=False).ids,
                TokenError,
                f"the tokenizer cannot encode {_described(text)}",
            )
        )

    def encode_whole(self, text: str, most: int) -> list[int]:
        """Ids of a text and of what the file's own rules put around it, `most` in all: the text is
        cut at its end. Raises TokenError.
        """

        def encoded() -> list[int]:
            self._library.enable_truncation(most)
            try:
                return list(self._library.encode(text, add_special_tokens=True).ids)
            finally:
                self._library.no_truncation()

        return _call(encoded, TokenError, f"the tokenizer cannot encode {_described(text)}")

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that form no character become U+FFFD, and ids that the tokenizer does
        not know nothing. Raises TokenError.
        """
        ids = [int(token) for token in tokens]
        try:
            return str(self._library.decode(ids, skip_special_tokens=skip_special))
        except OverflowError as error:
            raise TokenError(f"token ids are not in [0, 2^32): {error}") from error
        except BaseException as error:
            if not is_of_library(error):
                raise
            raise TokenError(f"the tokenizer cannot decode {shown(ids)}: {error}") from error

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling, e.g. `<|im_end|>`; None if there is none."""
        found = self._library.token_to_id(token)
        return None if found is None else int(found)

    def is_shown(self, token: int, *, skip_special: bool = True) -> bool:
        """Whether decoding takes notice of an id: known, and not special where those are skipped.

        Raises TokenError for what is no id.
        """
        if skip_special and token in self._special:
            return False
        try:
            return self._library.id_to_token(token) is not None
        except (OverflowError, TypeError) as error:
            raise TokenError(f"token ids are not in [0, 2^32): {error}") from error

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids that stand for one byte each and that decoding joins to characters; usually none."""
        spelled = [self.token_id(_BYTE_SPELLING.format(byte)) for byte in range(256)]
        letter = spelled[ord("A")]
        if letter is None or self.decode([letter]) != "A":
            return frozenset()
        return frozenset(token for token in spelled if token is not None)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(
            lambda ids: self.decode(ids, skip_special=skip_special),
            lambda token: self.is_shown(token, skip_special=skip_special),
            self.byte_tokens,
            self._letter if self.byte_tokens else None,
        )

    def to_json(self) -> str:
        """The file's text, as the library would write it."""
        return str(self._library.to_str())

    def with_special(self, spelling: str) -> tuple[str, int]:
        """The file's text with one more special token, and its id: the first that is free."""
        import tokenizers

        other = tokenizers.Tokenizer.from_str(self.to_json())
        other.add_special_tokens([tokenizers.AddedToken(spelling, special=True, normalized=False)])
        found = other.token_to_id(spelling)
        assert found is not None
        return str(other.to_str()), int(found)

    @cached_property
    def _letter(self) -> int | None:
        """Any token that is no byte and decodes to letters. Asked for only with byte tokens."""
        others = (i for i in range(self.vocab_size) if i not in self.byte_tokens)
        return next((i for i in others if self.decode([i]).isalpha()), None)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added_tokens if token.is_special)


def tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None if it has none."""
    path = checkpoint / TOKENIZER_FILE
    return Tokenizer(path) if path.is_file() else None


def _call(function: Callable[[], T], kind: type[FlashrtError], what: str) -> T:
    """A call of the library, whose errors become ours."""
    try:
        return function()
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise kind(f"{what}: {error}") from error


def is_of_library(error: BaseException) -> bool:
    """Not what ends a program, such as KeyboardInterrupt: the library raises bare `Exception`, and
    a panic of its Rust code is a class that has no name to import.
    """
    kind = type(error)
    return isinstance(error, Exception) or (
        kind.__module__ == "pyo3_runtime" and kind.__name__ == "PanicException"
    )


def _described(text: object) -> str:
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a text with half a character (a lone surrogate) at {error.start}"
    return f"{shown(text)}"
