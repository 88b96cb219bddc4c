"""C and CUDA sources as a compiler sees them: tokens, without comments and layout.

IS: what fingerprints hash instead of files, so that a corrected comment or another indentation does
not make every stored capsule foreign. IS NOT: a preprocessor or a parser; two texts of equal tokens
compile to the same kernel, texts of different tokens may too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from flashrt.core.header import c_header
from flashrt.core.op import Op

_TOKEN = re.compile(
    r"""
    (?P<blank> //(?:\\\n|[^\n])* | /\*.*?\*/ | \\\n | [^\S\n]+ )
  | (?P<newline> \n )
  | (?P<string> (?:u8|[uUL])?R"(?P<delimiter>[^()\\\s]{0,16})\(.*?\)(?P=delimiter)"
        | (?:u8|[uUL])?"(?:\\.|[^"\\\n])*" | (?:u8|[uUL])?'(?:\\.|[^'\\\n])+' )
  | (?P<number> \.?[0-9](?:[eEpP][+-]|'(?=[0-9A-Za-z])|[\w.])* )
  | (?P<word> [^\W\d]\w* )
  | (?P<sign> \.\.\. | ->\*? | <<=? | >>=? | \+\+ | -- | && | \|\| | :: | \#\#
        | [-+*/%&|^=!<>]= | . )
    """,
    re.VERBOSE | re.DOTALL,
)


def tokens(text: str) -> Iterator[str]:
    """The tokens of a source. The end of a directive's line is one: there, lines count."""
    line: list[str] = []  # tokens of the line so far
    end = 0  # of the token before
    for match in _TOKEN.finditer(text.replace("\r\n", "\n") + "\n"):
        kind, token = match.lastgroup, match[0]
        if kind == "newline":
            if line[:1] == ["#"]:
                yield token
            line.clear()
        elif kind != "blank":
            # `#define f(x)` takes an argument, `#define f (x)` does not.
            if token == "(" and line[:-1] == ["#", "define"] and match.start() == end:
                token = "(of a macro"
            line.append(token)
            end = match.end()
            yield token


def digest_of(ops: Sequence[Op], sources: Iterable[tuple[str, str]]) -> str:
    """Hash of what decides the bits of kernels but their compiler: (name, text) of each source,
    signatures of ops and the generated header.
    """
    digest = hashlib.sha256()
    for op in ops:
        digest.update(f"{op.signature}\0".encode())
    for name, text in (("", c_header(ops)), *sources):
        for token in (name, *tokens(text)):
            data = token.encode()
            digest.update(len(data).to_bytes(4, "little") + data)
        digest.update(b"\0")
    return digest.hexdigest()
