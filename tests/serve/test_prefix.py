"""Promise: the radix tree finds exactly the known sequences that a prompt begins with."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashrt.serve.queue import FairQueue
from flashrt.serve.radix import RadixTree

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)


@given(st.lists(st.tuples(st.booleans(), SEQUENCES), max_size=40), st.lists(SEQUENCES, max_size=10))
def test_the_tree_is_a_table_of_prefixes(
    changes: list[tuple[bool, tuple[int, ...]]], prompts: list[tuple[int, ...]]
) -> None:
    """Fault: an edge that was split or merged has lost a token, or a value."""
    tree: RadixTree[tuple[int, ...]] = RadixTree()
    known: set[tuple[int, ...]] = set()
    for is_there, sequence in changes:
        node = tree.node(np.array(sequence, np.int32))
        assert (node.value is not None) == (sequence in known)
        node.value = sequence if is_there else None
        (known.add if is_there else known.discard)(sequence)
        tree.prune(node)
    for prompt in prompts:
        wanted = [prompt[:n] for n in range(len(prompt), 0, -1) if prompt[:n] in known]
        assert tree.path(np.array(prompt, np.int32)) == wanted
    for sequence in list(known):
        node = tree.node(np.array(sequence, np.int32))
        node.value = None
        tree.prune(node)
    assert not tree.root.children, "nothing is kept of what is gone"


def test_who_is_next() -> None:
    """Fault: an owner with many lanes is served first, or priority is for ever."""
    queue: FairQueue[str] = FairQueue()
    for i in range(6):
        queue.push("a", i, f"a{i}")
    queue.push("b", 0, "b0")
    assert queue.pop({"a": 0, "b": 1}) == "a5"
    assert queue.pop({}) == "b0"
    queue.push("a", 0, "fork", is_next=True)
    assert [queue.pop({}) for _ in range(4)] == ["fork", "a4", "a0", "a3"]
    assert queue.remove(lambda item: item == "a1") == ["a1"]
    assert (queue.pop({}), queue.pop({}), len(queue)) == ("a2", None, 0)
