"""A radix tree over token ids: which known sequences are a prefix of another, by exact comparison.

IS: insertion, removal, and a walk that looks at each token of a prompt once. IS NOT: what the
values are (prefix).
"""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.store.reuse import common_prefix

_V = TypeVar("_V")
_NO_TOKENS = np.empty(0, np.int32)


class Node(Generic[_V]):
    """`edge`: the tokens from the parent to here."""

    __slots__ = ("children", "edge", "parent", "value")

    def __init__(self, parent: Node[_V] | None, edge: NDArray[np.int32]) -> None:
        self.parent = parent
        self.edge = edge
        self.children: dict[int, Node[_V]] = {}  # by the first token of their edges
        self.value: _V | None = None


class RadixTree(Generic[_V]):
    """Values by sequences of tokens; one per sequence."""

    def __init__(self) -> None:
        self.root: Node[_V] = Node(None, _NO_TOKENS)

    def path(self, tokens: NDArray[np.int32]) -> list[_V]:
        """Values of all sequences that are prefixes of `tokens`, longest first."""
        at, done, found = self.root, 0, list[_V]()
        while True:
            if at.value is not None:
                found.append(at.value)
            child = at.children.get(int(tokens[done])) if done < len(tokens) else None
            if child is None:
                break
            stop = done + len(child.edge)
            if stop > len(tokens) or not np.array_equal(tokens[done:stop], child.edge):
                break
            at, done = child, stop
        return found[::-1]

    def node(self, tokens: NDArray[np.int32]) -> Node[_V]:
        """The node of exactly these tokens, made if there is none: give it a value, or `prune`."""
        at, done = self.root, 0
        while done < len(tokens):
            child = at.children.get(int(tokens[done]))
            if child is None:
                fresh = Node(at, tokens[done:].copy())
                at.children[int(tokens[done])] = fresh
                return fresh
            n = common_prefix(child.edge, tokens[done:])
            if n < len(child.edge):
                child = self._split(child, n)
            at, done = child, done + n
        return at

    def prune(self, node: Node[_V]) -> None:
        """A node without a value goes, unless sequences part there."""
        while node.parent is not None and node.value is None and not node.children:
            parent = node.parent
            del parent.children[int(node.edge[0])]
            node = parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            (child,) = node.children.values()
            parent = node.parent
            child.edge = np.concatenate([node.edge, child.edge])
            child.parent = parent
            parent.children[int(child.edge[0])] = child

    def _split(self, child: Node[_V], n: int) -> Node[_V]:
        """A node in the midst of an edge, n tokens from its beginning."""
        parent = child.parent
        assert parent is not None, "the root has no edge"
        middle = Node(parent, child.edge[:n].copy())
        parent.children[int(child.edge[0])] = middle
        child.edge = child.edge[n:].copy()
        child.parent = middle
        middle.children[int(child.edge[0])] = child
        return middle
