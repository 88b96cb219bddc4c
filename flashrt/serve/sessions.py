"""Named sessions: trees of turns that fork and roll back, and outlive the process with a store.

IS: nodes and tips, the rules of who may change them, what is kept of each and where. IS NOT: turns
themselves (scheduler), or HTTP. The scheduler's thread calls everything but `begin`.

A node is the state after a turn: its tokens, and a capsule where there was room for one; without it
the state is made again from the tokens, to the same bits. Its tokens are the first `base` ones of
its parent and its own: a template may render earlier turns anew.

Files, in the store: serve/OWNER/SESSION/session.json and NODE.json; names of capsules are
serve/OWNER/ENTRY. docs/serve-state.md tells what is in them.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, SessionError, StoreError
from flashrt.base.tracing import PLAN, trace
from flashrt.serve.ask import ForeignSession, NoSession, SessionBusy, SessionConflict
from flashrt.serve.prefix import PREFIX, Entry, PrefixIndex, owner_key
from flashrt.serve.saver import Saver
from flashrt.serve.sharing import Sharing, Stamp, stamp_of
from flashrt.serve.work import Asked, Ends, Left
from flashrt.store.folder import REFS
from flashrt.store.manifest import Place, tokens_digest
from flashrt.store.notes import Notes, TokenNote
from flashrt.store.reuse import common_prefix
from flashrt.store.store import Saving, Store, ref_file

FORMAT = "flashrt-session-1"
MOST_FILE_NBYTES = 256 << 20
MOST_NAME = 200  # characters
MOST_SESSIONS = 10_000  # of an owner
MOST_NOTED = 100_000  # log probabilities of a turn: some megabytes of JSON
_ID_NBYTES = 16  # nobody guesses 128 bits, nor the 96 that forks do not have in common
FAMILY_DIGITS = 8  # of an id: a session and its forks have them in common
_NODE_NBYTES = 8
_FILE = re.compile(rf"{PREFIX}/([0-9a-f]+)/([0-9a-f]+)/session\.json")
_REF = re.compile(rf"{PREFIX}/([0-9a-f]+)/([0-9a-f]+)")
_NO_TOKENS = np.empty(0, np.int32)

Messages = list[Mapping[str, Any]]
Files = dict[str, bytes | None]  # names, and what is to be there; None: nothing


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, as it was."""

    id: str
    parent: str | None
    position: int  # tokens in all
    base: int  # how many of them are its parent's first ones
    digest: str | None  # of the state; None where there was no room for a capsule
    nbytes: int  # of the capsule's own
    tier: str  # device, host, disk, store, or none: it will be made again from its tokens
    name: str | None
    created: float  # seconds since the epoch
    reason: str  # why the turn ended
    n_messages: int


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session, as it was."""

    id: str
    name: str | None
    created: float
    tip: str
    position: int
    etag: str
    is_busy: bool
    forked_from: tuple[str, str] | None  # session, node
    n_nodes: int
    root: str  # the node without a parent; forks share it


@dataclass(frozen=True, slots=True)
class TreeView:
    """A session with all its nodes, parents before children."""

    session: SessionView
    nodes: tuple[NodeView, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A node with what is its own: the tokens after its parent's first `base`, and messages."""

    node: NodeView
    etag: str  # of a session whose tip it is
    tokens: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]


@dataclass(slots=True, eq=False)
class _Node:
    id: str
    parent: str | None
    base: int
    position: int
    digest: str | None
    nbytes: int
    created: float
    reason: str
    name: str | None = None
    end: Entry | None = None
    start: Entry | None = None
    n_messages: int = 0
    tokens: NDArray[np.int32] | None = None  # its own; None: to be read
    messages: Messages | None = None


@dataclass(slots=True, eq=False)
class _Session:
    id: str
    owner: str  # its key
    name: str | None
    created: float
    nodes: dict[str, _Node]
    tip: str
    forked_from: tuple[str, str] | None = None
    is_busy: bool = False
    is_deleted: bool = False
    turn_parent: str = ""  # the tip when the present turn began
    stamp: Stamp | None = None  # in the store's file when it was taken over from another server
    version: int = 0  # of the newest file


@dataclass(slots=True)
class _Parts:
    """Entries to publish, with what was taken of their capsules."""

    savings: list[tuple[Entry, Saving]] = field(default_factory=list)


class SessionBook(Ends):
    """All sessions of a server."""

    def __init__(
        self, index: PrefixIndex, store: Store | None, sharing: Sharing | None = None
    ) -> None:
        """See `connect`. sharing: other servers use the store too, see `adopt`."""
        self._index, self._store, self._sharing = index, store, sharing
        self._saver: Saver | None = None
        self._post: Callable[[Callable[[], object]], bool] | None = None
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._gate = threading.Lock()  # of `is_busy`: held for a few instructions
        self.n_foreign = 0  # capsules of sessions that were taken over, made by another model
        self.problems: list[str] = []  # what could not be read or saved, the last ones

    def connect(self, saver: Saver, post: Callable[[Callable[[], object]], bool]) -> None:
        """Who writes files, if there is a store; `post` has something done in the scheduler's
        thread.
        """
        self._saver, self._post = saver, post

    # -- turns (Ends) ---------------------------------------------------------------------------

    def begin(self, asked: Asked) -> None:
        """See Ends. Raises NoSession, SessionBusy, SessionError."""
        if asked.ask.session is None:
            return
        session = self._find(asked.owner, asked.ask.session)
        check_messages(asked.ask.messages or ())
        with self._gate:
            if session.is_deleted:
                raise NoSession(f"there is no session {session.id!r}")
            if session.is_busy:
                raise SessionBusy(
                    f"session {session.id}: a turn is running; wait for its end, or fork"
                )
            if asked.ask.tip not in (None, session.tip):
                now = self._etag(session)
                raise SessionConflict(f"session {session.id} has moved on to {now}", now)
            session.is_busy = True
            session.turn_parent = session.tip

    def leave(self, asked: Asked, left: Left, tell: Callable[[str | None], None]) -> None:
        """See Ends: a node, and everything in the store before anybody is told."""
        files: Files = {}
        node: _Node | None = None
        if asked.ask.session is not None:
            session = self._find(asked.owner, asked.ask.session)
            said = asked.ask.replied(left.index) if asked.ask.replied else ()
            node = self._grown(session, left, [*(asked.ask.messages or ()), *said])
            files = {**self._node_file(session, node), **self._session_file(session)}
        id_ = node.id if node is not None else None
        store, post = self._store, self._post
        if store is None or self._saver is None or post is None:
            tell(id_)
            return
        parts = self._taken(store, left)

        def write() -> None:
            for _, saving in parts.savings:
                saving.publish()
            self.write(files)

        def told(error: BaseException | None) -> None:
            self._saved(parts, error)
            tell(None if isinstance(error, SessionConflict) else id_)

        self._saver.do(write, lambda error: post(lambda: told(error)))

    def over(self, asked: Asked) -> None:
        """See Ends."""
        if asked.ask.session is not None:
            session = self._sessions.get((asked.owner, asked.ask.session))
            if session is not None:
                session.is_busy = False

    # -- verbs: each returns its answer, and the files that make it last --------------------------

    def create(self, owner: str, name: str | None = None) -> tuple[SessionView, Files]:
        """An empty session."""
        key = owner_key(owner)
        if sum(o == key for o, _ in self._sessions) >= MOST_SESSIONS:
            raise SessionError(f"you have {MOST_SESSIONS:,} sessions; delete some")
        root = _Node(_fresh(_NODE_NBYTES), None, 0, 0, None, 0, time.time(), "root")
        root.tokens, root.messages = _NO_TOKENS, []
        session = _Session(
            _fresh(_ID_NBYTES), key, checked_name(name), time.time(),
            {root.id: root}, root.id,
        )  # fmt: skip
        self._sessions[session.owner, session.id] = session
        files = {**self._node_file(session, root), **self._session_file(session)}
        return self._view(session), files

    def list(self, owner: str) -> tuple[SessionView, ...]:
        """An owner's sessions, oldest first."""
        key = owner_key(owner)
        found = [s for (o, _), s in self._sessions.items() if o == key]
        return tuple(self._view(s) for s in sorted(found, key=lambda s: (s.created, s.id)))

    def view(self, owner: str, id_: str) -> SessionView:
        """One of them. Raises NoSession."""
        return self._view(self._find(owner_key(owner), id_))

    def tree(self, owner: str, id_: str) -> TreeView:
        """With its nodes. Raises NoSession."""
        session = self._find(owner_key(owner), id_)
        return TreeView(self._view(session), tuple(map(_node_view, session.nodes.values())))

    def tokens(self, owner: str, id_: str, node: str | None = None) -> tuple[int, ...]:
        """All tokens of a node, by id or name (default: the tip). Raises NoSession, StoreError."""
        session = self._find(owner_key(owner), id_)
        return tuple(self._tokens(session, self._node(session, node)).tolist())

    def messages(self, owner: str, id_: str, node: str | None = None) -> tuple[Any, ...]:
        """Messages on the way to a node, oldest first. Raises NoSession, StoreError."""
        session = self._find(owner_key(owner), id_)
        path = self._path(session, self._node(session, node))
        return tuple(message for at in path for message in self._loaded(session, at)[1])

    def turn(self, owner: str, id_: str, node: str | None = None) -> Turn:
        """A node with its own tokens and messages, by id or name (default: the tip). Raises
        NoSession, StoreError.
        """
        session = self._find(owner_key(owner), id_)
        found = self._node(session, node)
        tokens, messages = self._loaded(session, found)
        etag = self._etag(session, found)
        return Turn(_node_view(found), etag, tuple(tokens.tolist()), tuple(messages))

    def annotate(
        self, owner: str, id_: str, node: str, messages: Iterable[Mapping[str, Any]]
    ) -> tuple[NodeView, Files]:
        """More messages of a node, as the reply that its turn gave. Raises NoSession."""
        session = self._find(owner_key(owner), id_)
        found = self._node(session, node)
        _, known = self._loaded(session, found)
        added = list(messages)
        check_messages(added)
        known.extend(added)
        found.n_messages = len(known)
        files = {**self._node_file(session, found), **self._session_file(session)}
        return _node_view(found), files

    def snapshot(
        self, owner: str, id_: str, name: str, *, etag: str | None = None
    ) -> tuple[NodeView, Files]:
        """Give the tip a name; a node that had it has it no more. Raises NoSession, SessionBusy,
        SessionConflict.
        """
        session = self._free(owner, id_, etag)
        name = checked_name(name) or ""
        tip = session.nodes[session.tip]
        for node in session.nodes.values():
            node.name = None if node.name == name else node.name
        tip.name = name
        return _node_view(tip), self._session_file(session)

    def fork(
        self, owner: str, id_: str, node: str | None = None, name: str | None = None
    ) -> tuple[SessionView, Files]:
        """Another session, with the nodes on the way to a node (default: the tip). A turn may be
        running meanwhile. Raises NoSession, StoreError.
        """
        source = self._find(owner_key(owner), id_)
        at = self._node(source, node)
        name = checked_name(name)
        made = _Session(
            _fresh(_ID_NBYTES), source.owner, name, time.time(), {}, at.id, (source.id, at.id)
        )
        made.id = source.id[:FAMILY_DIGITS] + made.id[FAMILY_DIGITS:]
        files: Files = {}
        for old in self._path(source, at):
            tokens, messages = self._loaded(source, old)
            new = _Node(
                old.id, old.parent, old.base, old.position, old.digest, old.nbytes, old.created,
                old.reason, old.name, old.end, old.start, old.n_messages, tokens, list(messages),
            )  # fmt: skip
            made.nodes[new.id] = new
            self._hold(made, new)
            files |= self._node_file(made, new)
        self._sessions[made.owner, made.id] = made
        return self._view(made), {**files, **self._session_file(made)}

    def restore(
        self, owner: str, id_: str, node: str, *, etag: str | None = None
    ) -> tuple[SessionView, Files]:
        """The tip is any node of the tree, by id or name. Raises NoSession, SessionBusy,
        SessionConflict.
        """
        session = self._free(owner, id_, etag)
        session.tip = self._node(session, node).id
        return self._view(session), self._session_file(session)

    def back(
        self, owner: str, id_: str, turns: int, *, etag: str | None = None
    ) -> tuple[SessionView, Files]:
        """The tip is so many turns earlier. Raises NoSession, SessionBusy, SessionConflict."""
        session = self._free(owner, id_, etag)
        path = self._path(session, session.nodes[session.tip])
        if not 0 <= turns < len(path):
            raise NoSession(f"session {id_}: its tip has {len(path) - 1} turns, {turns} were asked")
        session.tip = path[-1 - turns].id
        return self._view(session), self._session_file(session)

    def up(
        self, owner: str, id_: str, node: str, *, etag: str | None = None
    ) -> tuple[SessionView, Files]:
        """The tip is a node on the way to it. Raises NoSession, SessionBusy, SessionConflict."""
        session = self._free(owner, id_, etag)
        found = self._node(session, node)
        if found not in self._path(session, session.nodes[session.tip]):
            raise NoSession(
                f"session {id_}: node {node!r} is not on the way to its tip; restore it"
            )
        session.tip = found.id
        return self._view(session), self._session_file(session)

    def below(
        self, owner: str, id_: str, position: int, *, etag: str | None = None
    ) -> tuple[str, NDArray[np.int32]]:
        """For a rollback to a position: the deepest node on the way to the tip at or below it whose
        tokens the tip has, and the tip's tokens below the position. Raises NoSession, SessionBusy,
        SessionConflict.
        """
        session = self._free(owner, id_, etag)
        tip = session.nodes[session.tip]
        if not 0 <= position <= tip.position:
            raise NoSession(f"session {id_}: position {position} is not in [0, {tip.position}]")
        tokens = self._tokens(session, tip)[:position]
        for node in reversed(self._path(session, tip)):
            if node.position <= position:
                own = self._tokens(session, node)
                if np.array_equal(own, tokens[: node.position]):
                    return node.id, tokens
        raise AssertionError("the root has no tokens")

    def move_tip(self, owner: str, id_: str, node: str) -> str:
        """For a rollback to a position: the tip is another node for now; the one that it was."""
        session = self._find(owner_key(owner), id_)
        before, session.tip = session.tip, node
        return before

    def delete(self, owner: str, id_: str, *, etag: str | None = None) -> tuple[None, Files]:
        """Forget it: capsules that no other session needs go, in the store too. Raises NoSession,
        SessionBusy, SessionConflict.
        """
        session = self._free(owner, id_, etag)
        with self._gate:
            if session.is_busy:
                raise SessionBusy(f"session {id_}: a turn is running; wait for its end")
            session.is_deleted = True
        del self._sessions[session.owner, session.id]
        for node in session.nodes.values():
            for entry in (node.end, node.start):
                if entry is not None:
                    self._index.release(entry, _holder(session, node))
                    if not entry.holders and entry.queue is not None:
                        self._index.forget(entry)
        files: Files = {_file(session, "session"): None}
        files |= {_file(session, node): None for node in session.nodes}
        self._tidy()
        return None, files

    # -- the store ------------------------------------------------------------------------------

    def load(self) -> None:
        """What another process left in the store, unless others still serve from it. What cannot
        be read is among `problems`.
        """
        store = self._store
        if store is None or self._sharing is not None or not store.is_there:
            return
        documents: list[tuple[str, str, dict[str, Any]]] = []
        holders: dict[tuple[str, str], set[str]] = {}
        for name in store.folder.names(PREFIX):
            match = _FILE.fullmatch(name)
            if match is None:
                continue
            owner, id_ = match.groups()
            try:
                document = json.loads(store.folder.read_text(name, MOST_FILE_NBYTES))
                if document["format"] != FORMAT:
                    raise ValueError(f"format {document['format']!r}, this version reads {FORMAT}")
                for node in document["nodes"]:
                    for entry in (node["end"], node["start"]):
                        if entry is not None:
                            holders.setdefault((owner, entry), set()).add(f"{id_}/{node['id']}")
            except (StoreError, ValueError, KeyError, TypeError) as error:
                self._problem(f"{name}: {error!r}")
                continue
            documents.append((owner, id_, document))
        entries: dict[tuple[str, str], Entry] = {}
        ages = {e.name: e.age_s or 0.0 for e in store.folder.list(REFS)}
        for name, place in sorted(store.refs().items(), key=lambda r: -ages.get(ref_file(r[0]), 0)):
            ref = _REF.fullmatch(name)
            if ref is None or place.fingerprint != self._index.fingerprint:
                continue
            owner, entry_id = ref.groups()
            held = holders.get((owner, entry_id), set())
            entries[owner, entry_id] = self._index.add_stored(owner, entry_id, place, held)
        for owner, id_, document in documents:
            try:
                session = _session(owner, id_, document, entries)
            except (ValueError, KeyError, TypeError) as error:
                self._problem(f"session {id_}: {error!r}")
                continue
            self._sessions[owner, id_] = session

    def knows(self, owner: str, id_: str, stamp: Stamp | None) -> bool:
        """Whether a session, whose file in the store has this stamp (None: it has no file), is here
        as it is there, or newer. One that another server deleted is forgotten.
        """
        session = self._sessions.get((owner, id_))
        if session is None:
            return False
        if stamp is None:
            self._let_go(session)
            return False
        return self._is_ours(session, stamp)

    def adopt(
        self, owner: str, id_: str, document: Mapping[str, Any], places: Mapping[str, Place]
    ) -> None:
        """Take a session over from the server that wrote its file; `places`: where its entries are
        stored. Those that another model made do not fit: such a node is computed again from its
        tokens, and counted in `n_foreign`.

        Raises ForeignSession for tokens of another tokenizer, SessionBusy, and ValueError, KeyError
        or TypeError for a file that is damaged; the book is as it was then.
        """
        sharing = self._sharing
        assert sharing is not None, "whoever is alone loads everything at the start"
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, this version reads {FORMAT}")
        if document.get("tokenizer") not in (None, sharing.tokenizer):
            raise ForeignSession(
                f"session {id_} was made by a model with another tokenizer, in which its tokens "
                "mean other text; begin a new session with its messages"
            )
        old = self._sessions.get((owner, id_))
        if old is not None and old.is_busy:
            raise SessionBusy(f"session {id_}: a turn is running; wait for its end")
        known = {entry.id: entry for entry in self._index.entries() if entry.owner == owner}
        fitting = {e: p for e, p in places.items() if p.fingerprint == self._index.fingerprint}
        entries: dict[tuple[str, str], Entry] = {}
        for entry_id, place in sorted(fitting.items(), key=lambda found: found[1].position):
            entry = known.get(entry_id)
            if entry is None:
                entry = self._index.add_stored(owner, entry_id, place, set())
            entry.is_lent = False
            entries[owner, entry_id] = entry
        session = _session(owner, id_, document, entries)
        session.stamp = stamp_of(document)
        session.version = session.stamp[1]
        self.n_foreign += len(places) - len(fitting)
        if old is not None:
            self._let_go(old)
        self._sessions[owner, id_] = session
        for node in session.nodes.values():
            self._hold(session, node)

    def let_go(self) -> int:
        """Forget all sessions that are not busy; what is in the store stays there, for whoever
        serves them next. How many they were.
        """
        idle = [s for s in self._sessions.values() if not s.is_busy]
        for session in idle:
            self._let_go(session)
        return len(idle)

    def lend(self, owner: str, found: Mapping[str, Place]) -> int:
        """Entries of other servers, found in the store, that prompts may begin with: by id. How
        many of them are new here and fit.
        """
        known = {entry.id for entry in self._index.entries() if entry.owner == owner}
        n = 0
        for entry_id, place in found.items():
            if entry_id not in known and place.fingerprint == self._index.fingerprint:
                self._index.add_stored(owner, entry_id, place, set(), is_lent=True)
                n += 1
        return n

    def ids(self) -> tuple[str, ...]:
        """Of all sessions that are here."""
        return tuple(id_ for _, id_ in self._sessions)

    def known_entries(self, owner: str) -> set[str]:
        """Ids of an owner's entries."""
        return {entry.id for entry in self._index.entries() if entry.owner == owner}

    def write(self, files: Files) -> None:
        """Write or remove files, in order; in the saver's thread. Where others serve from the store
        too: nothing of a session that went on elsewhere. Raises SessionConflict, StoreError.
        """
        assert self._store is not None, "asked where there is one"
        if self._sharing is not None:
            for name in files:
                if (match := _FILE.fullmatch(name)) is not None:
                    self._check_ours(name, *match.groups())
        write_files(self._store, files)

    def tidy(self) -> bool:
        """One name that the store should forget, in the saver's thread; whether there may be
        more.
        """
        assert self._store is not None
        removals = self._index.removals
        if not removals:
            return False
        name = removals.pop()
        try:
            self._store.remove(name)
        except StoreError as error:
            trace(PLAN, f"{name} stays in the store: {error}")
        return bool(removals)

    # -- inside ---------------------------------------------------------------------------------

    def _find(self, owner: str, id_: str) -> _Session:
        session = self._sessions.get((owner, id_))
        if session is None:
            raise NoSession(f"there is no session {id_!r}")
        return session

    def _is_ours(self, session: _Session, stamp: Stamp) -> bool:
        """Whether a file with this stamp is not newer than what is known here."""
        assert self._sharing is not None, "only then files have stamps"
        return stamp[0] == self._sharing.writer or stamp == session.stamp

    def _check_ours(self, name: str, owner: str, id_: str) -> None:
        session, store = self._sessions.get((owner, id_)), self._store
        if session is None or store is None:  # it was deleted here just now
            return
        if store.folder.size(name) is None:
            is_ours = session.stamp is None  # else it was there, and another deleted it
            stamp: Stamp = ("nobody", 0)
        else:
            try:
                stamp = stamp_of(json.loads(store.folder.read_text(name, MOST_FILE_NBYTES)))
            except (ValueError, TypeError, AttributeError) as error:
                raise StoreError(f"{name} is damaged: {error!r}") from error
            is_ours = self._is_ours(session, stamp)
        if not is_ours:
            raise SessionConflict(
                f"session {id_} went on at another server, {stamp[0] or 'one without a name'}; "
                "this was not kept: look at the session, and send it again",
                "",
            )

    def _let_go(self, session: _Session) -> None:
        del self._sessions[session.owner, session.id]
        for node in session.nodes.values():
            for entry in (node.end, node.start):
                if entry is not None and entry.queue is not None:
                    self._index.release(entry, _holder(session, node))
                    entry.is_lent = entry.is_lent or entry.place is not None

    def _free(self, owner: str, id_: str, etag: str | None) -> _Session:
        """A session that may be changed, in the state that the caller expects."""
        session = self._find(owner_key(owner), id_)
        if session.is_busy:
            raise SessionBusy(f"session {id_}: a turn is running; wait for its end, or fork")
        now = self._etag(session)
        if etag is not None and etag != now:
            raise SessionConflict(f"session {id_} is at {now}, not at {etag}; look again", now)
        return session

    def _node(self, session: _Session, which: str | None) -> _Node:
        """By id or name; None is the tip."""
        if which is None:
            return session.nodes[session.tip]
        found = session.nodes.get(which)
        named = [node for node in session.nodes.values() if node.name == which]
        if found is None and not named:
            raise NoSession(f"session {session.id} has no node {which!r}")
        return found or named[0]

    def _path(self, session: _Session, node: _Node) -> Sequence[_Node]:
        """From the root to the node."""
        path = [node]
        while (parent := path[-1].parent) is not None:
            path.append(session.nodes[parent])
        return path[::-1]

    def _tokens(self, session: _Session, node: _Node) -> NDArray[np.int32]:
        tokens = _NO_TOKENS
        for at in self._path(session, node):
            tokens = np.concatenate([tokens[: at.base], self._loaded(session, at)[0]])
        return tokens

    def _grown(self, session: _Session, left: Left, messages: Messages) -> _Node:
        """The node of a turn that ended; the first choice's is the tip."""
        parent = session.nodes[session.turn_parent]
        base = common_prefix(self._tokens(session, parent), left.tokens)
        capsule = left.end.capsule if left.end is not None else None
        node = _Node(
            _fresh(_NODE_NBYTES), parent.id, base, len(left.tokens),
            capsule.digest if capsule is not None else None,
            capsule.nbytes if capsule is not None else 0,
            time.time(), left.reason, None, left.end, left.start, len(messages),
            left.tokens[base:].copy(), messages,
        )  # fmt: skip
        session.nodes[node.id] = node
        self._hold(session, node)
        if left.index == 0:
            session.tip = node.id
        return node

    def _hold(self, session: _Session, node: _Node) -> None:
        for entry in (node.end, node.start):
            if entry is not None and entry.queue is not None:
                self._index.hold(entry, _holder(session, node))

    def _taken(self, store: Store, left: Left) -> _Parts:
        """Of those that are not in the store: what it takes to put them there."""
        parts = _Parts()
        for entry in dict.fromkeys((left.start, left.end)):
            if entry is None or entry.capsule is None or entry.place is not None:
                continue
            notes = self._notes(left) if entry is left.end and left.logprobs else None
            try:
                saving = store.begin(entry.capsule, entry.name, notes)
            except CapsuleError as error:
                self._problem(f"a capsule at {entry.position} is not in the store: {error}")
                continue
            self._index.hold(entry, _SAVING)
            parts.savings.append((entry, saving))
        return parts

    def _notes(self, left: Left) -> Notes:
        """Its log probabilities, for `flashrt store diff`. What is ruled out has none to note."""
        noted, n_pairs = [], 0
        for position, told in left.logprobs:
            top = [(token, x) for token, x in told.top if math.isfinite(x)]
            n_pairs += 1 + len(top)
            if n_pairs > MOST_NOTED:
                break
            logprob = told.logprob if math.isfinite(told.logprob) else None
            noted.append(TokenNote(position, int(left.tokens[position]), logprob, top))
        return Notes(noted, str(self._index.checkpoint))

    def _saved(self, parts: _Parts, error: BaseException | None) -> None:
        if error is not None:
            self._problem(f"a turn is not in the store: {error}")
        for entry, saving in parts.savings:
            if error is None:
                saving.finish()
                assert saving.place is not None
                self._index.saved(entry, saving.place)
            self._index.release(entry, _SAVING)
        self._tidy()

    def _tidy(self) -> None:
        if self._saver is not None and self._index.removals:
            self._saver.tidy_soon()

    def _problem(self, what: str) -> None:
        trace(PLAN, f"sessions: {what}")
        self.problems = [*self.problems[-99:], what]

    def _etag(self, session: _Session, node: _Node | None = None) -> str:
        """Of the session with that tip (default: the one it has)."""
        tip = node or session.nodes[session.tip]
        digest = tip.digest or tokens_digest(self._tokens(session, tip))
        return f"{digest}-{tip.id}"

    def _view(self, session: _Session) -> SessionView:
        tip = session.nodes[session.tip]
        return SessionView(
            session.id, session.name, session.created, tip.id, tip.position, self._etag(session),
            session.is_busy, session.forked_from, len(session.nodes), next(iter(session.nodes)),
        )  # fmt: skip

    def _loaded(self, session: _Session, node: _Node) -> tuple[NDArray[np.int32], Messages]:
        """A node's own tokens and messages; read once. Raises StoreError."""
        if node.tokens is None or node.messages is None:
            assert self._store is not None, "only what was stored is to be read"
            name = _file(session, node.id)
            text = self._store.folder.read_text(name, MOST_FILE_NBYTES)
            try:
                document = json.loads(text)
                tokens = np.array(document["tokens"], np.int32)
                messages = list(document["messages"])
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise StoreError(f"{name} is damaged: {error!r}") from error
            if len(tokens) != node.position - node.base or tokens.ndim != 1:
                raise StoreError(f"{name} is damaged: {len(tokens)} tokens of its own")
            node.tokens, node.messages = tokens, messages
        return node.tokens, node.messages

    def _node_file(self, session: _Session, node: _Node) -> Files:
        if self._store is None:
            return {}
        tokens, messages = self._loaded(session, node)
        return {_file(session, node.id): _text({"tokens": tokens.tolist(), "messages": messages})}

    def _session_file(self, session: _Session) -> Files:
        if self._store is None:
            return {}
        nodes = [
            {
                "id": n.id, "parent": n.parent, "base": n.base, "position": n.position,
                "digest": n.digest, "nbytes": n.nbytes, "created": n.created, "reason": n.reason,
                "name": n.name, "n_messages": n.n_messages,
                "end": n.end.id if n.end is not None else None,
                "start": n.start.id if n.start is not None else None,
            }
            for n in session.nodes.values()
        ]  # fmt: skip
        document: dict[str, Any] = {
            "format": FORMAT, "name": session.name, "created": session.created, "tip": session.tip,
            "forked_from": session.forked_from, "nodes": nodes,
        }  # fmt: skip
        if self._sharing is not None:
            session.version += 1
            document |= {
                "writer": self._sharing.writer, "version": session.version,
                "tokenizer": self._sharing.tokenizer,
            }  # fmt: skip
        return {_file(session, "session"): _text(document)}


_SAVING = "saving"


def write_files(store: Store, files: Files) -> None:
    """Write or remove them, in order. Raises StoreError."""
    if not files:
        return
    with store.folder.publishing():
        for name, text in files.items():
            if text is None:
                store.folder.delete(name)
            else:
                store.folder.write(name, np.frombuffer(text, np.uint8))


def check_messages(messages: Iterable[Mapping[str, Any]]) -> None:
    """Raises SessionError for what JSON cannot hold."""
    try:
        _text({"messages": list(messages)})
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"messages: {error}; they are kept as JSON") from error


def checked_name(name: str | None) -> str | None:
    """A name of a session or node. Raises NoSession for one that is empty or too long."""
    if name is not None and not 0 < len(name) <= MOST_NAME:
        raise NoSession(f"a name has 1 to {MOST_NAME} characters, this one {len(name)}")
    return name


def _session(
    owner: str, id_: str, document: Mapping[str, Any], entries: Mapping[tuple[str, str], Entry]
) -> _Session:
    """From its file. Raises ValueError, KeyError or TypeError for one that is damaged."""
    nodes: dict[str, _Node] = {}
    for given in document["nodes"]:
        node = _Node(
            str(given["id"]), given["parent"], int(given["base"]), int(given["position"]),
            given["digest"], int(given["nbytes"]), float(given["created"]), str(given["reason"]),
            given["name"],
            entries.get((owner, given["end"])), entries.get((owner, given["start"])),
            int(given["n_messages"]),
        )  # fmt: skip
        if (node.parent is None) != (not nodes) or (nodes and node.parent not in nodes):
            raise ValueError(f"node {node.id}: its parent is not before it")
        parent = nodes[node.parent].position if node.parent is not None else 0
        if not 0 <= node.base <= min(parent, node.position):
            raise ValueError(f"node {node.id}: base {node.base}")
        if node.parent is None:
            node.tokens, node.messages = _NO_TOKENS, []
        nodes[node.id] = node
    if document["tip"] not in nodes:
        raise ValueError(f"its tip {document['tip']!r} is no node")
    forked = document["forked_from"]
    return _Session(
        id_, owner, document["name"], float(document["created"]), nodes, document["tip"],
        None if forked is None else (str(forked[0]), str(forked[1])),
    )  # fmt: skip


def _node_view(node: _Node) -> NodeView:
    there = node.end is not None and node.end.queue is not None
    tier = node.end.tier if there and node.end is not None else "none"
    return NodeView(
        node.id, node.parent, node.position, node.base, node.digest, node.nbytes, tier, node.name,
        node.created, node.reason, node.n_messages,
    )  # fmt: skip


def _holder(session: _Session, node: _Node) -> str:
    return f"{session.id}/{node.id}"


def _file(session: _Session, what: str) -> str:
    return f"{PREFIX}/{session.owner}/{session.id}/{what}.json"


def _fresh(nbytes: int) -> str:
    return secrets.token_hex(nbytes)


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
