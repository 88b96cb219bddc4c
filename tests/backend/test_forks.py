"""A forked child: the CPU device works there, with threads of its own; a GPU says that it cannot.

IS: os.fork while other threads replay. IS NOT: sessions in two processes, see tests/property.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError
from flashrt.core.backend import BoundLaunch, Graph
from flashrt.ops import OPS
from tests.backend.cases import linear
from tests.backend.runner import Runner

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
TASKS = Path("/proc/self/task")


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    """A pool of three threads."""
    device = CpuDevice(threads=3)
    yield device
    device.close()
    CpuDevice().build(OPS)  # the pool is the process's


def in_child(work: Callable[[], bool]) -> str:
    """Runs it in a forked child, for 20 seconds at most; what came of it."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    for _ in range(2000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return {0: "right", 1: "wrong"}.get(
                os.waitstatus_to_exitcode(status), f"died: {status}"
            )
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def test_a_child_has_threads_and_the_same_bits(device: CpuDevice) -> None:
    """Red before: the child went on with one thread, however many the parent had."""
    case = linear(64, 60, K=1030, N=2070)
    runner = Runner(device)
    expected = runner.run(case)["y"].tobytes()
    counted: list[int] = []

    def work() -> bool:
        is_same = runner.run(case)["y"].tobytes() == expected
        counted.append(len(list(TASKS.iterdir())) if TASKS.exists() else 3)
        return is_same and counted == [3]

    assert in_child(work) == "right"
    assert runner.run(case)["y"].tobytes() == expected, "the parent's threads are where they were"
    assert in_child(lambda: in_child(work) == "right") == "right", "a child's child"


def replayed(device: CpuDevice, runner: Runner) -> Graph:
    """A graph whose launches take a while."""
    captured: list[BoundLaunch] = []
    launch = device.eager
    device.eager = lambda launches: (captured.extend(launches), launch(launches))[1]  # type: ignore
    runner.run(linear(64, 60, K=1030, N=2070))
    return device.capture(captured * 4)


@pytest.mark.slow
def test_a_fork_waits_for_kernels_of_other_threads(device: CpuDevice) -> None:
    """Red without the handlers: the child finds the pool in the middle of a region, and hangs."""
    runner = Runner(device)
    graph = replayed(device, runner)
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            device.replay(graph)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        found = [in_child(lambda: device.replay(graph) is None) for _ in range(10)]
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert found == ["right"] * 10


def test_a_device_that_does_not_come_along_says_so() -> None:
    """Red before: work was queued that nobody would do, or the driver said "not initialized"."""
    device = SimtDevice()
    device.build(OPS)
    memory = device.allocate("arena", 1 << 12)
    arrive = device.begin_read(memory.address, 16)
    out = np.zeros(16, np.uint8)

    def refused(verb: Callable[[], object]) -> bool:
        try:
            verb()
        except BackendError as error:
            return "forked" in str(error) and "spawn" in str(error)
        return False

    def work() -> bool:
        device.close()  # nothing there is the child's to release
        verbs = (lambda: device.read(memory.address, out), device.sync, arrive)
        return all(refused(verb) for verb in verbs)

    assert in_child(work) == "right"
    device.fill(memory.address, 16, 7)
    device.read(memory.address, out)
    assert out.tolist() == [7] * 16 and arrive().tolist() != [7] * 16
    device.close()
