"""Pickles as data: a reader of their opcodes that imports nothing and calls nothing of theirs.

IS: the opcodes that plain values, arrays and dataclasses are written with, an allow-list of globals
that stand for functions of ours, and limits. IS NOT: Python's unpickler, which runs what a stream
names. Without this, whoever reaches a policy server's port runs programs on its machine.

Work and memory are bounded by the length of the stream: bytes are views of it, there is a limit on
opcodes, keys of dicts are text, and nothing can contain itself or be deep.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from flashrt.base.errors import PayloadError
from flashrt.base.messages import printable

MOST_OPCODES = 1 << 16
MOST_DEPTH = 16
MOST_TEXT_NBYTES = 1 << 16  # of one piece of text
MOST_NAME_NBYTES = 256  # of a module or a class
MOST_INTEGER_NBYTES = 16
_HIGHEST_PROTOCOL = 5
_MARK: Final = object()
_NOTHING: Final = object()


@dataclass(frozen=True, slots=True)
class Global:
    """What a name in a stream stands for. `call` is given a stream's arguments, and checks them."""

    name: str
    call: Callable[[tuple[Any, ...]], object] | None = None
    new: Callable[[], object] | None = None  # an object without arguments, whose state follows


@runtime_checkable
class Built(Protocol):
    """What takes a state after it was made, once."""

    def build(self, state: object) -> None:
        """Raises PayloadError."""
        ...


# By module and name; None for what is not let in.
Find = Callable[[str, str], Global | None]


def read_pickle(
    data: memoryview,
    find: Find,
    *,
    start: int = 0,
    stored: Callable[[object], object] | None = None,
    most_opcodes: int = MOST_OPCODES,
) -> tuple[object, int]:
    """The value of the pickle that begins at `start`, and where it ends.

    Bytes are read-only views of `data`. `stored`: what a persistent id stands for, where the stream
    may have such. Raises PayloadError for whatever else than plain values and globals that `find`
    knows; no effect remains then.
    """
    return _Reader(data.toreadonly(), find, start, stored).read(most_opcodes)


class _Reader:
    def __init__(
        self,
        data: memoryview,
        find: Find,
        start: int,
        stored: Callable[[object], object] | None,
    ) -> None:
        self._data, self._at, self._find, self._stored = data, start, find, stored
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # Of containers, by id; the objects live in `_kept`, so that no id is used twice.
        self._depths: dict[int, int] = {}
        self._inside: set[int] = set()  # of those that are in another one, and change no more
        self._kept: list[object] = []

    def read(self, most_opcodes: int) -> tuple[object, int]:
        for _ in range(most_opcodes):
            here = self._at
            opcode = self._take(1)[0]
            if opcode == _STOP:
                value = self._pop()
                if self._stack:
                    raise self._error(here, f"{len(self._stack)} values are left over")
                return value, self._at
            verb = _VERBS.get(opcode)
            if verb is None:
                raise self._error(here, f"opcode {bytes([opcode])!r} is not let in")
            try:
                verb(self)
            except PayloadError as error:
                if str(error).startswith("pickle"):
                    raise
                raise self._error(here, str(error)) from error
        raise self._error(self._at, f"more than {most_opcodes:,} opcodes")

    # -- bytes and the stack -----------------------------------------------------------------------

    @staticmethod
    def _error(at: int, what: str) -> PayloadError:
        return PayloadError(f"pickle, byte {at:,}: {what}")

    def _take(self, size: int) -> memoryview:
        at = self._at
        if size > len(self._data) - at:
            raise self._error(at, f"{size:,} bytes are announced, {len(self._data) - at:,} follow")
        self._at = at + size
        return self._data[at : at + size]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _text(self, size: int) -> str:
        if size > MOST_TEXT_NBYTES:
            raise PayloadError(f"text of {size:,} bytes, at most {MOST_TEXT_NBYTES:,} are let in")
        try:
            return bytes(self._take(size)).decode()
        except UnicodeDecodeError as error:
            raise PayloadError(f"text is no UTF-8: {error.reason}") from None

    def _line(self) -> str:
        """Of GLOBAL: text up to a newline."""
        rest = bytes(self._data[self._at : self._at + MOST_NAME_NBYTES])
        size = rest.find(b"\n")
        if size < 0:
            raise PayloadError(f"a name without an end in {MOST_NAME_NBYTES} bytes")
        text = self._text(size)
        self._at += 1
        return text

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._error(self._at, "a value is missing")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._error(self._at, "a value is missing")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                items = stack[at + 1 :]
                del stack[at:]
                return items
        raise self._error(self._at, "a mark is missing")

    # -- containers --------------------------------------------------------------------------------

    def _made(self, container: object, items: list[Any]) -> None:
        """A new container; what is in it."""
        self._kept.append(container)
        self._depths[id(container)] = 0
        self._put(container, items)
        self._push(container)

    def _put(self, container: object, items: list[Any]) -> None:
        """Items go in: from here on they change no more, so that depths stay true."""
        depth = self._depths[id(container)]
        for item in items:
            inner = self._depths.get(id(item), -1)
            if item is container:
                raise PayloadError("something that contains itself")
            if inner >= 0:
                self._inside.add(id(item))
            depth = max(depth, inner + 1)
        if depth > MOST_DEPTH:
            raise PayloadError(f"more than {MOST_DEPTH} levels of lists, dicts and tuples")
        self._depths[id(container)] = depth

    def _open(self, kind: type) -> Any:
        """The container on top, to be added to."""
        container = self._top()
        if type(container) is not kind or id(container) in self._inside:
            raise PayloadError(f"adds to what is no new {kind.__name__}")
        return container

    def _append(self, items: list[Any]) -> None:
        into = self._open(list)
        self._put(into, items)
        into.extend(items)

    def _set(self, items: list[Any]) -> None:
        into = self._open(dict)
        if len(items) % 2:
            raise PayloadError("a key without a value")
        for key in items[::2]:
            if type(key) is not str:
                raise PayloadError(f"a key of {type(key).__name__}; only text is let in")
        self._put(into, items[1::2])
        into.update(zip(items[::2], items[1::2], strict=True))

    def _tuple(self, items: list[Any]) -> None:
        self._made(tuple(items) if items else (), items)

    # -- globals -----------------------------------------------------------------------------------

    def _global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise PayloadError("a global whose name is no text")
        found = self._find(module, name)
        if found is None:
            raise PayloadError(f"the global {printable(f'{module}.{name}')} is not let in")
        self._push(found)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _called(self) -> tuple[Any, tuple[Any, ...]]:
        arguments, what = self._pop(), self._pop()
        if not isinstance(what, Global) or type(arguments) is not tuple:
            raise PayloadError(f"calls a {type(what).__name__} with a {type(arguments).__name__}")
        return what, arguments

    def _reduce(self) -> None:
        what, arguments = self._called()
        if what.call is None:
            raise PayloadError(f"calls {what.name}, which is only made by its state")
        self._object(what.call(arguments))

    def _new(self) -> None:
        what, arguments = self._called()
        if what.new is None or arguments:
            raise PayloadError(f"makes {what.name} with {len(arguments)} arguments")
        self._object(what.new())

    def _object(self, made: object) -> None:
        """A value of our own making; its state is in it like an item."""
        if isinstance(made, Built):
            self._kept.append(made)
            self._depths[id(made)] = 0
        self._push(made)

    def _build(self) -> None:
        state, made = self._pop(), self._top()
        if not isinstance(made, Built) or id(made) in self._inside:
            raise PayloadError(f"gives a {type(made).__name__} a state")
        self._put(made, [state])
        made.build(state)

    def _persistent(self) -> None:
        if self._stored is None:
            raise PayloadError("a persistent id, which stands for something outside")
        self._push(self._stored(self._pop()))

    # -- the memo ----------------------------------------------------------------------------------

    def _memoize(self, key: int | None = None) -> None:
        self._memo[len(self._memo) if key is None else key] = self._top()

    def _get(self, key: int) -> None:
        value = self._memo.get(key, _NOTHING)
        if value is _NOTHING:
            raise PayloadError(f"value {key} was not kept before")
        self._push(value)

    def _protocol(self) -> None:
        if (protocol := self._number(1)) > _HIGHEST_PROTOCOL:
            raise PayloadError(f"protocol {protocol}, at most {_HIGHEST_PROTOCOL} is known")


_STOP = ord(".")
_VERBS: Mapping[int, Callable[[_Reader], object]] = {
    0x80: _Reader._protocol,
    0x95: lambda r: r._take(8),  # a frame: what follows is read the same
    ord("("): lambda r: r._push(_MARK),
    ord("N"): lambda r: r._push(None),
    0x88: lambda r: r._push(True),
    0x89: lambda r: r._push(False),
    ord("K"): lambda r: r._push(r._number(1)),
    ord("M"): lambda r: r._push(r._number(2)),
    ord("J"): lambda r: r._push(r._number(4, signed=True)),
    0x8A: lambda r: r._push(_integer(r, r._number(1))),
    ord("G"): lambda r: r._push(struct.unpack(">d", r._take(8))[0]),
    0x8C: lambda r: r._push(r._text(r._number(1))),
    ord("X"): lambda r: r._push(r._text(r._number(4))),
    0x8D: lambda r: r._push(r._text(r._number(8))),
    ord("C"): lambda r: r._push(r._take(r._number(1))),
    ord("B"): lambda r: r._push(r._take(r._number(4))),
    0x8E: lambda r: r._push(r._take(r._number(8))),
    0x96: lambda r: r._push(r._take(r._number(8))),  # a bytearray, which nobody changes here
    ord(")"): lambda r: r._tuple([]),
    0x85: lambda r: r._tuple([r._pop()]),
    0x86: lambda r: r._tuple([r._pop() for _ in range(2)][::-1]),
    0x87: lambda r: r._tuple([r._pop() for _ in range(3)][::-1]),
    ord("t"): lambda r: r._tuple(r._since_mark()),
    ord("]"): lambda r: r._made([], []),
    ord("a"): lambda r: r._append([r._pop()]),
    ord("e"): lambda r: r._append(r._since_mark()),
    ord("}"): lambda r: r._made({}, []),
    ord("s"): lambda r: r._set([r._pop() for _ in range(2)][::-1]),
    ord("u"): lambda r: r._set(r._since_mark()),
    ord("c"): lambda r: r._global(r._line(), r._line()),
    0x93: _Reader._stack_global,
    ord("R"): _Reader._reduce,
    0x81: _Reader._new,
    ord("b"): _Reader._build,
    0x94: _Reader._memoize,
    ord("q"): lambda r: r._memoize(r._number(1)),
    ord("r"): lambda r: r._memoize(r._number(4)),
    ord("h"): lambda r: r._get(r._number(1)),
    ord("j"): lambda r: r._get(r._number(4)),
    ord("Q"): _Reader._persistent,
}


def _integer(reader: _Reader, size: int) -> int:
    if size > MOST_INTEGER_NBYTES:
        raise PayloadError(f"an integer of {size} bytes, at most {MOST_INTEGER_NBYTES} are let in")
    return reader._number(size, signed=True)
