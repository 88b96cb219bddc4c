"""C and CUDA sources as a compiler sees them: tokens, without comments and layout.

IS: what fingerprints hash instead of files, so that a corrected comment or another indentation does
not make every stored capsule foreign. IS NOT: a preprocessor or a parser; two texts of equal tokens
compile to the same kernel, texts of different tokens may too.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from flashrt.core.header import c_header
from flashrt.core.op import Op

_TOKEN = re.compile(
    r"""
    (?P<blank> [^\S\n]+ | //(?:\\\n|[^\n])* | /\*.*?\*/ | \\\n )
  | (?P<newline> \n )
  | (?P<token> [^\W\d]\w*+(?!["'])  # most tokens are words
        | (?:u8|[uUL])?R"(?P<delimiter>[^()\\\s]{0,16})\(.*?\)(?P=delimiter)"
        | (?:u8|[uUL])?"(?:\\.|[^"\\\n])*" | (?:u8|[uUL])?'(?:\\.|[^'\\\n])+'
        | \.?[0-9](?:[eEpP][+-]|'(?=[0-9A-Za-z])|[\w.])*
        | [^\W\d]\w*
        | \.\.\. | ->\*? | <<=? | >>=? | \+\+ | -- | && | \|\| | :: | \#\#
        | [-+*/%&|^=!<>]= | . )
    """,
    re.VERBOSE | re.DOTALL,
)


def tokens(text: str) -> Iterator[str]:
    """The tokens of a source. The end of a directive's line is one: there, lines count."""
    line: list[str] = []  # tokens of the line so far
    is_after_blank = False
    for _, newline, found, _ in _TOKEN.findall(text.replace("\r\n", "\n") + "\n"):
        if found:
            # `#define f(x)` takes an argument, `#define f (x)` does not.
            is_of_macro = found == "(" and line[:-1] == ["#", "define"] and not is_after_blank
            token = "(of a macro" if is_of_macro else found
            line.append(token)
            is_after_blank = False
            yield token
        elif newline:
            if line[:1] == ["#"]:
                yield newline
            line = []
        else:
            is_after_blank = True


def digest_of(ops: Sequence[Op], sources: Iterable[tuple[str, str]]) -> str:
    """Hash of what decides the bits of kernels but their compiler: (name, text) of each source,
    signatures of ops and the generated header.
    """
    signatures = tuple(f"{op.signature}\0" for op in ops)
    return _digest_of(signatures, (("", c_header(ops)), *sources))


@functools.lru_cache(4)  # asked for several times while an engine is loaded
def _digest_of(signatures: tuple[str, ...], sources: tuple[tuple[str, str], ...]) -> str:
    digest = hashlib.sha256("".join(signatures).encode())
    encoded = _Encoded()
    for name, text in sources:
        digest.update(b"".join([encoded[token] for token in (name, *tokens(text))]) + b"\0")
    return digest.hexdigest()


class _Encoded(dict[str, bytes]):
    """Bytes of a token, its size before them; sources have few tokens that are unlike."""

    def __missing__(self, token: str) -> bytes:
        data = token.encode()
        self[token] = found = len(data).to_bytes(4, "little") + data
        return found
