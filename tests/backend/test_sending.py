"""Words that a replay sends to the host by itself: the right word, without a copy.

IS: op `hold_send` and its ring on the simt device, whose streams are lazy: what the host looks at
too early is old, every time. IS NOT: sessions that are a token ahead (tests/property/test_queued).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from flashrt.backends.cuda.fused_ops import WORD_RING
from flashrt.backends.cuda.graph import CudaGraph
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError
from flashrt.core.backend import BoundLaunch
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.op import Op, bind
from flashrt.core.region import DType, Region, Role
from flashrt.core.runs import STRIDE_UNIT, Run, Stride, table_of
from flashrt.ops.cursor import CURSOR_WORDS, CursorWord
from flashrt.ops.rows import HOLD, LAST_CURSOR, STOP_WORDS
from flashrt.ops.table import OPS
from tests.fuzz.injector import Injector

N_SLOTS = WORD_RING.shape[0]
LANE_BYTES = 3 * STRIDE_UNIT
STOP = 7
CURSOR = Region("cursor", (CURSOR_WORDS,), DType.I32, Role.FIXED)
STOPS = Region("stops", (STOP_WORDS,), DType.I32, Role.IO)


class Lanes:
    """Two lanes of a cursor and its stops, and the graph that ends their tokens."""

    def __init__(self, device: SimtDevice) -> None:
        self.device = device
        device.build(OPS)
        self.base = device.allocate("lanes", 4 * LANE_BYTES).address
        self.runs_at = self.base + 3 * LANE_BYTES
        self.graph = self.capture(HOLD)
        for lane in (0, 1):
            self.write(self.stops_at(lane), 1, STOP)
            self.write(self.cursor_at(lane), 0, 1, -1)

    def capture(self, *ops: Op, max_runs: int = 1) -> CudaGraph:
        """Of `hold` and of what changes a cursor."""
        at = {"cursor": self.cursor_at(0), "stops": self.stops_at(0), "last": self.cursor_at(0)}
        launches = []
        for op in ops:
            names = [p.name for p in op.params]
            launch = bind(op, {name: STOPS if name == "stops" else CURSOR for name in names}, {})
            addresses = tuple(at[name] for name in names)
            strides = (Stride(LANE_BYTES // STRIDE_UNIT),) * len(addresses)
            launches.append(BoundLaunch(launch, addresses, self.runs_at, strides, max_runs))
        graph = self.device.capture(launches)
        assert isinstance(graph, CudaGraph)
        return graph

    def stops_at(self, lane: int) -> int:
        return self.base + lane * LANE_BYTES

    def cursor_at(self, lane: int) -> int:
        return self.stops_at(lane) + STRIDE_UNIT

    def token_at(self, lane: int) -> int:
        return self.cursor_at(lane) + 4 * CursorWord.TOKEN

    def write(self, address: int, *words: int) -> None:
        self.device.write(address, np.array(words, np.int32).view(np.uint8))

    def replay(self, lane: int, token: int) -> Callable[[], int]:
        """A replay whose token is this one, as `sample` would have left it; what waits for it."""
        self.write(self.token_at(lane), token)
        self.run(self.graph, lane)
        return self.device.begin_read_word(self.token_at(lane))

    def run(self, graph: CudaGraph, lane: int) -> None:
        self.device.replay(graph, table_of((Run(lane, 1),)), self.runs_at)

    def copies(self) -> int:
        """To the host, so far."""
        return self.device.driver.counts["cuMemcpyDtoHAsync"]


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    device = SimtDevice()
    yield Lanes(device)
    device.close()


def test_words_of_many_replays_arrive_in_any_order(lanes: Lanes) -> None:
    """Red when a slot is another's, when the ring comes round over a word that nobody took yet, and
    when a lane's word is sought in lane 0's.
    """
    n, copies = 2 * N_SLOTS + 3, lanes.copies()
    tokens = [int(t) for t in np.random.default_rng(5).integers(-1, 250_000, n)]
    waits = [lanes.replay(i % 2, token) for i, token in enumerate(tokens)]
    order = np.random.default_rng(6).permutation(n).tolist()
    assert {i: waits[i]() for i in order} == dict(enumerate(tokens))
    assert lanes.copies() == copies, "the device has sent them by itself"


def test_a_word_that_nobody_took_is_kept_from_the_next_round(lanes: Lanes) -> None:
    """Red when a slot is given to another replay before its word was taken to the host's own."""
    waits = [lanes.replay(0, 41), lanes.device.begin_read_word(lanes.token_at(0))]
    for _ in range(N_SLOTS):
        lanes.run(lanes.graph, 1)  # nobody asks for its word
    lanes.device.sync()
    assert [wait() for wait in waits] == [41, 41]


def test_a_stop_leaves_no_row_and_is_sent(lanes: Lanes) -> None:
    """Red when `hold_send` is not a `hold` any more: its other half."""
    for token, rows in ((3, 1), (STOP, 0), (-1, 0)):
        lanes.write(lanes.cursor_at(1), 0, 1)
        assert lanes.replay(1, token)() == token
        words = np.zeros(CURSOR_WORDS, np.int32)
        lanes.device.read(lanes.cursor_at(1), words.view(np.uint8))
        assert words[CursorWord.ROWS] == rows


def test_a_host_that_does_not_wait_gets_no_word(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the host reads before the event: the slot has the word of a round before."""
    for _ in range(N_SLOTS + 2):
        lanes.replay(0, 9)()
    wait = lanes.replay(0, 9)
    with monkeypatch.context() as patch:
        patch.setattr(lanes.device.driver, "event_sync", lambda event: None)
        with pytest.raises(BackendError, match=r"sent word 2 where word 10 was expected"):
            wait()
    assert wait() == 9


def test_a_device_that_counts_otherwise_gives_no_word(lanes: Lanes) -> None:
    """Red when the slot that the host looks at need not be the one that was written."""
    for token in (1, 2, 3):
        assert lanes.replay(0, token)() == token
    lanes.device.driver.fill(lanes.device._sent.send_to.sent, 0, 4, lanes.device.stream)
    with pytest.raises(BackendError, match="where word 3 was expected"):
        lanes.replay(0, 4)()


@pytest.mark.parametrize("has_run", [False, True])
def test_a_replay_that_was_interrupted_is_counted_again(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch, has_run: bool
) -> None:
    """Red when Ctrl-C, before the launch or right after it, lets the host lose count; here where
    the counter begins again at 0, which must not matter either.
    """
    driver, device = lanes.device.driver, lanes.device
    launch = driver.graph_launch
    before = lanes.replay(0, 5)
    driver.fill(device._sent.send_to.sent, 0xFF, 4, device.stream)

    def struck(executable: int, stream: int) -> None:
        if has_run:
            launch(executable, stream)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver, "graph_launch", struck)
        with pytest.raises(KeyboardInterrupt):
            lanes.replay(0, 6)
    assert device.begin_read_word(lanes.token_at(0))() == 6, "a copy: who knows what was sent"
    waits = [lanes.replay(0, 10 + i) for i in range(N_SLOTS + 1)]
    assert [wait() for wait in waits] == [10 + i for i in range(N_SLOTS + 1)]
    assert before() == 5


def test_an_exception_at_any_line_loses_no_count(lanes: Lanes) -> None:
    """Red when a replay is counted before it is launched, or marked as counted before it is."""
    device, table, at = lanes.device, table_of((Run(0, 1),)), lanes.token_at(0)

    def token() -> int:
        device.replay(lanes.graph, table, lanes.runs_at)
        return device.begin_read_word(at)()

    lanes.write(at, 0)
    files = ("device", "graph", "sending", "staging")  # others run within the double's launches
    injector, before = Injector([f"backends/cuda/{f}.py" for f in files]), token()
    n_lines = injector.count(token)
    assert before == 0 and n_lines > 30
    for line in range(n_lines):
        lanes.write(at, 1000)
        assert injector.strike(token, line)
        for n in (line, line + 1):
            assert lanes.replay(0, n)() == n, f"after {injector.where}"


def test_a_word_that_changed_since_is_read_as_it_is(lanes: Lanes) -> None:
    """Red when `begin_read_word` gives what was sent, though a write, a fill, a copy or a replay
    came after it; or the word of another lane, or another word of the cursor.
    """
    device, at = lanes.device, lanes.token_at(0)
    other = lanes.capture(LAST_CURSOR)  # of which each token is 0
    lanes.replay(1, 4)()

    def read_after(change: Callable[[], object], address: int = at) -> int:
        lanes.replay(0, 5)
        change()
        return device.begin_read_word(address)()

    assert read_after(lambda: lanes.write(at, 6)) == 6
    assert read_after(lambda: device.fill(at, 4, 1)) == 0x01010101
    four = Copy(lanes.token_at(1) - lanes.base, at - lanes.base, 4)
    assert read_after(lambda: device.copy(CopyList((four,)), lanes.base, lanes.base)) == 4
    assert read_after(lambda: lanes.run(other, 0)) == 0
    assert read_after(lambda: None, lanes.token_at(1)) == 4
    assert read_after(lambda: None, lanes.cursor_at(0)) == 0
    lanes.replay(0, 5)()
    lanes.replay(1, 4)()
    device.replay(lanes.graph)  # of the lane that the table on the device has: not known here
    assert device.begin_read_word(at)() == 5


def test_what_may_not_be_sent(lanes: Lanes) -> None:
    """Red: a token that a later launch of the tape may change, one of several lanes, and sending
    from a device that is told to fuse nothing.
    """
    for graph, kernels in (
        (lanes.graph, ["hold_send"]),
        (lanes.capture(HOLD, LAST_CURSOR), ["hold", "last_cursor"]),
        (lanes.capture(HOLD, max_runs=2), ["hold"]),
    ):
        assert [node.name for node in graph.nodes] == kernels
        assert (graph.sent is not None) == ("hold_send" in kernels)
    plain = SimtDevice(is_fused=False)
    other = Lanes(plain)
    assert other.graph.sent is None
    copies = other.copies()
    assert other.replay(1, 12)() == 12
    assert other.copies() == copies + 1
    plain.close()
