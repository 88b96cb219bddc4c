"""`flashrt chat`: a conversation in the terminal, with branches, undo and files.

IS: lines in, replies out, and the commands that begin with a slash; each branch is a lane of its
own. IS NOT: the conversation itself (session.chat). Lines may come from a pipe: then an error ends
it, as no person is there to try again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.base.files import PRIVATE, read_file, replace_file
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.commands.run import Sampling, image_part, with_images
from flashrt.session.chat import Chat, ChatPoint, Reply, open_chat, recommended_sampling
from flashrt.session.engine import SessionEngine
from flashrt.session.pictures import picture_of
from flashrt.text.messages import checked_messages, content_of
from flashrt.text.reply import TextDelta, ThoughtDelta
from flashrt.text.template import Message

HELP = """\
/fork          a new branch from here, and go on in it
/branches      all branches
/switch N      go on in branch N
/back [N]      undo the last N turns (default: 1)
/tree          what was said in all branches, what they share once
/save PATH     the conversation and its state, as PATH and PATH.json
/load PATH     go on from what was saved
/image PATH    the next message has this image; several, several
/system TEXT   another system message; without TEXT, none
/help          this
/quit          leave, as Ctrl-D does; Ctrl-C ends a reply and keeps what was said"""
_MOST_NBYTES = 64 << 20  # of a file of messages
_WIDTH = 60  # characters of a message in the tree


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the command line says about the conversation. `temperature` None: as the checkpoint
    recommends.
    """

    sampling: Sampling
    temperature: float | None = None
    system: str | None = None
    thinking: bool | None = None
    load: Path | None = None
    images: tuple[Path, ...] = ()  # of the first message


def chat(checkpoint: Path, engine_options: EngineOptions, options: ChatOptions) -> int:
    """The command."""
    engine = open_engine(checkpoint, engine_options)
    sampling = _sampling(engine, options)
    most = options.sampling.max_tokens
    talk = _Talk(engine, most, open_chat(engine, sampling=sampling, thinking=options.thinking))
    if options.load is not None:
        talk.load(str(options.load))
    if options.system is not None:
        talk.system(options.system)
    for path in options.images:
        talk.image(str(path))
    if talk.is_terminal:
        console.screen(is_error=True).print("/help tells the commands; Ctrl-D leaves", style="dim")
    for line in _lines(talk.is_terminal):
        try:
            if not talk.take(line):
                break
        except FlashrtError as error:
            if not talk.is_terminal:
                raise
            console.complain(str(error))
    return 0


def _sampling(engine: SessionEngine, options: ChatOptions) -> dict[str, Any]:
    """What was asked for; without a temperature, on top of what the checkpoint recommends."""
    given, usual = dataclasses.asdict(options.sampling), dataclasses.asdict(Sampling())
    asked = {name: value for name, value in given.items() if value != usual[name]}
    asked.pop("max_tokens", None)
    if options.temperature is not None:
        return {**asked, "temperature": options.temperature}
    return {**recommended_sampling(engine.checkpoint), **asked}


def _lines(is_terminal: bool) -> Iterator[str]:
    """What a person types, or what stdin holds. Raises FlashrtError if that is no text."""
    if not is_terminal:
        yield from console.read_stdin().splitlines()
        return
    with contextlib.suppress(ImportError):  # not on every system: then lines cannot be edited
        __import__("readline")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            console.write("\n")
        except EOFError:
            console.write("\n")
            return


class _Talk:
    """The branches, and the commands on them."""

    def __init__(self, engine: SessionEngine, max_tokens: int, first: Chat) -> None:
        self._engine, self._max_tokens = engine, max_tokens
        self._branches, self._at = [first], 0
        self._images: list[dict[str, object]] = []  # of the next message
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()

    @property
    def _chat(self) -> Chat:
        return self._branches[self._at]

    def take(self, line: str) -> bool:
        """One line; whether to go on. Raises FlashrtError."""
        text = line.strip()
        if not text:
            return True
        if not text.startswith("/"):
            self._ask(text)
            return True
        name, _, rest = text[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "fork": self.fork, "branches": self.branches, "switch": self.switch, "back": self.back,
            "tree": self.tree, "save": self.save, "load": self.load, "system": self.system,
            "image": self.image,
            "help": lambda _: console.screen().print(HELP),
        }  # fmt: skip
        if name not in commands:
            raise FlashrtError(f"/{console.one_line(name)} is no command; /help tells them all")
        commands[name](rest.strip())
        return True

    # -- commands -------------------------------------------------------------------------------

    def fork(self, _: str) -> None:
        """A new branch, which becomes the present one."""
        self._branches.append(self._chat.fork())
        self._at = len(self._branches) - 1
        self._note(f"branch {self._at + 1}, of {len(self._engine.lanes)} that --lanes allows")

    def branches(self, _: str) -> None:
        """All of them."""
        rows = [
            (
                f"{'*' if i == self._at else ' '} {i + 1}",
                f"{len(branch.messages)}",
                f"{branch.session.position:,}",
                _short(branch.messages[-1]) if branch.messages else "",
            )
            for i, branch in enumerate(self._branches)
        ]
        console.screen().print(
            console.table("", ("branch", ">messages", ">position", "~last"), rows)
        )

    def switch(self, which: str) -> None:
        """To a branch by its number."""
        self._at = _number(which, "/switch", 1, len(self._branches)) - 1
        last = self._chat.messages[-1:] or [{"role": "empty", "content": ""}]
        self._note(f"branch {self._at + 1}; {_short(last[0])}")

    def back(self, count: str) -> None:
        """Undo turns of the user, and what followed them."""
        messages = self._chat.messages
        asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
        n = _number(count or "1", "/back", 1, len(asked))
        self._chat.messages = messages[: asked[-n]]
        self._note(f"{n} turns undone, {len(self._chat.messages)} messages are left")

    def tree(self, _: str) -> None:
        """Messages as a tree."""
        root = console.Tree(f"{len(self._branches)} branches")
        told = {i: branch.messages for i, branch in enumerate(self._branches)}
        _grow(root, told, 0, self._at)
        console.screen().print(root)

    def save(self, path: str) -> None:
        """State and messages."""
        _need_path(path, "/save")
        point = self._chat.snapshot()
        try:
            point.capsule.save(path)
            text = json.dumps(point.messages, ensure_ascii=False, indent=1)
            try:
                replace_file(Path(f"{path}.json"), text + "\n", is_durable=False, mode=PRIVATE)
            except OSError as error:
                raise FlashrtError(f"{path}.json: cannot be written: {error.strerror}") from error
        finally:
            point.capsule.drop()
        self._note(f"{len(point.messages)} messages, {self._chat.session.position:,} tokens")

    def load(self, path: str) -> None:
        """Into the present branch."""
        _need_path(path, "/load")
        try:
            found = json.loads(read_file(Path(f"{path}.json"), _MOST_NBYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise FlashrtError(f"{path}.json: cannot be read as messages: {error}") from error
        if not isinstance(found, list):
            raise FlashrtError(f"{path}.json: holds a {type(found).__name__}, expected a list")
        messages = checked_messages(found)
        capsule = self._engine.load_capsule(path)
        try:
            self._chat.restore(ChatPoint(capsule, messages))
        finally:
            capsule.drop()
        self._note(f"{len(messages)} messages, {self._chat.session.position:,} tokens")

    def image(self, path: str) -> None:
        """For the next message."""
        _need_path(path, "/image")
        part = image_part(Path(path).expanduser())
        tokens = len(self._engine.glance(picture_of(part)).tokens)
        self._images.append(part)
        self._note(f"the next message has {path}, {tokens:,} tokens")

    def system(self, text: str) -> None:
        """Another system message, at the front."""
        messages = self._chat.messages
        rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
        first: tuple[Message, ...] = ({"role": "system", "content": text},) if text else ()
        self._chat.messages = (*first, *rest)

    # -- replies --------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        """A user's message and the reply. If it fails, neither was said."""
        chat, before = self._chat, self._chat.messages
        fed = chat.fed_tokens
        chat.add("user", with_images(text, self._images))
        reply = chat.stream(self._max_tokens)
        try:
            with _interrupts() as stopped:
                self._show(reply, stopped)
        except FlashrtError:
            chat.messages = before
            raise
        self._images.clear()
        console.write("\n")
        ended = f"ended by {reply.reason}" if reply.reason else "interrupted"
        self._note(
            f"{chat.fed_tokens - fed:,} tokens in, {reply.token_count:,} out, {ended}; position "
            f"{chat.session.position:,} of {self._engine.max_positions:,}"
        )

    def _show(self, reply: Reply, stopped: Sequence[int]) -> None:
        """Thoughts are dim; where nobody watches, they are left out."""
        was_thought = False
        for event in reply.events():
            if isinstance(event, ThoughtDelta) and sys.stdout.isatty():
                console.write(event.text, is_dim=True)
                was_thought = True
            elif isinstance(event, TextDelta):
                console.write("\n\n" * was_thought + event.text)
                was_thought = False
            if stopped:
                break

    def _note(self, text: str) -> None:
        console.screen(is_error=True).print(text, style="dim")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list, so that a reply ends between two pieces; a second one, while
    something takes its time, raises KeyboardInterrupt.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _grow(
    tree: console.Tree, told: dict[int, tuple[Message, ...]], depth: int, present: int
) -> None:
    """Messages from `depth` on, those that branches share once; a branch's name where it ends."""
    for i, messages in told.items():
        if len(messages) == depth:
            mark = " (here)" if i == present else ""
            tree.add(console.styled(f"branch {i + 1}{mark}", "bold"))
    groups: list[tuple[Message, dict[int, tuple[Message, ...]]]] = []
    for i, messages in told.items():
        if len(messages) <= depth:
            continue
        group = next((g for m, g in groups if m == messages[depth]), None)
        if group is None:
            groups.append((messages[depth], {i: messages}))
        else:
            group[i] = messages
    for message, group in groups:
        # A tree as deep as a conversation is long could not be read: only forks go deeper.
        _grow(tree.add(_short(message)) if len(groups) > 1 else _beside(tree, message), group,
              depth + 1, present)  # fmt: skip


def _beside(tree: console.Tree, message: Message) -> console.Tree:
    tree.add(_short(message))
    return tree


def _short(message: Message) -> str:
    parts = message.get("content")
    n = sum(p.get("type") != "text" for p in parts) if isinstance(parts, list) else 0
    text = " ".join(["[image]"] * n + content_of(message).split())
    cut = f"{text[:_WIDTH]}…" if len(text) > _WIDTH else text
    return console.one_line(f"{message['role']}: {cut}")


def _number(text: str, command: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        what = f"a number from {least} to {most}" if most >= least else "nothing yet"
        raise FlashrtError(f"{command} takes {what}, got {console.one_line(text)!r}")
    return int(text)


def _need_path(path: str, command: str) -> None:
    if not path:
        raise FlashrtError(f"{command} needs a PATH")
