"""The driver double, and the real driver bindings over a libcuda double.

The SIMT driver has to be stricter than a GPU: what a missing sync, a wrong address or a call during
capture would break there by chance must fail here every time.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cache import Binary
from flashrt.backends.cuda.driver_api import ArgumentBlock, HostBuffer, LaunchConfig
from flashrt.backends.simt.driver import SimtDriver
from flashrt.backends.simt.kernel import MAX_SHARED_BYTES
from flashrt.base.errors import BackendError

HERE = Path(__file__).parent
NBYTES = 4096
ONE = LaunchConfig((1, 1, 1), (1, 1, 1))

# A kernel as the shim builds it: *p = 2 * *p + 1, or the error that the second argument asks for.
KERNEL = r"""
#include <stdint.h>
#include <stdio.h>
struct args { int32_t *p; int32_t fails; };
int simt_step(const unsigned *gb, unsigned shared, uint64_t seed, void **params, void *workspace,
              char *err, int n) {
  struct args *a = params[0];
  (void)gb; (void)shared; (void)seed;
  if (a->fails) { snprintf(err, n, "planted"); return -1; }
  *a->p = 2 * *a->p + 1;
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Binary:
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "step.c").write_text(KERNEL)
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the tests need a C compiler"
    path = folder / "step.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "step.c"], check=True)
    return Binary(path, path.read_bytes(), "", was_cached=True)


@pytest.fixture
def driver() -> SimtDriver:
    return SimtDriver()


class Bench:
    """A stream, a device range and a pinned buffer."""

    def __init__(self, driver: SimtDriver) -> None:
        self.driver = driver
        self.stream = driver.stream_create()
        self.address = driver.mem_alloc(NBYTES)
        self.host: HostBuffer = driver.host_alloc(NBYTES)

    def word(self) -> int:
        """The first int32 on the device, as a synchronous read sees it."""
        self.driver.copy_to_host(self.host.address, self.address, 4, self.stream)
        self.driver.stream_sync(self.stream)
        return int(self.host.array[:4].view(np.int32)[0])


@pytest.fixture
def bench(driver: SimtDriver) -> Iterator[Bench]:
    yield Bench(driver)
    driver.close()


def block(bench: Bench, fails: int = 0) -> ArgumentBlock:
    return ArgumentBlock(struct.pack("@Pi0P", bench.address, fails))


def test_device_memory_is_poisoned(bench: Bench) -> None:
    assert bench.word() == -1


def test_read_before_sync_sees_old_data(bench: Bench) -> None:
    bench.host.array[:] = 7
    bench.driver.copy_to_host(bench.host.address, bench.address, NBYTES, bench.stream)
    assert (bench.host.array == 7).all(), "nothing may happen before a sync"
    bench.driver.stream_sync(bench.stream)
    assert (bench.host.array == 0xFF).all()


def test_upload_reads_its_source_late(bench: Bench) -> None:
    bench.host.array[:4] = 1
    bench.driver.copy_to_device(bench.address, bench.host.address, 4, bench.stream)
    bench.host.array[:4] = 2  # too early: the copy has not run
    assert bench.word() == 0x02020202


def test_event_orders_two_streams(bench: Bench) -> None:
    driver, other, event = bench.driver, bench.driver.stream_create(), bench.driver.event_create()
    driver.fill(bench.address, 1, 4, bench.stream)
    driver.event_record(event, bench.stream)
    driver.fill(bench.address, 2, 4, bench.stream)
    driver.stream_wait(other, event)
    driver.copy_to_host(bench.host.address, bench.address, 4, other)
    driver.stream_sync(other)
    assert (bench.host.array[:4] == 1).all(), "waits for the event, and for no more"


def test_event_sync_drains_to_the_event_only(bench: Bench) -> None:
    driver, event = bench.driver, bench.driver.event_create()
    driver.copy_to_host(bench.host.address, bench.address, 4, bench.stream)
    driver.event_record(event, bench.stream)
    driver.copy_to_host(bench.host.address + 4, bench.address, 4, bench.stream)
    bench.host.array[:8] = 0
    driver.event_sync(event)
    assert bench.host.array[:8].tolist() == [255] * 4 + [0] * 4


def test_polling_an_event_ends_but_not_at_once(bench: Bench) -> None:
    driver, event = bench.driver, bench.driver.event_create()
    assert driver.event_is_done(event), "an event never recorded has happened"
    for _ in range(3):
        driver.fill(bench.address, 1, 4, bench.stream)
    driver.event_record(event, bench.stream)
    answers = [driver.event_is_done(event) for _ in range(5)]
    assert answers == [False, False, False, True, True]


def test_launch_copies_its_arguments(bench: Bench, library: Binary) -> None:
    driver = bench.driver
    function = driver.module_function(driver.module_load(library), "step")
    driver.fill(bench.address, 0, 4, bench.stream)
    arguments = block(bench)
    driver.launch(function, ONE, arguments, bench.stream)
    del arguments  # the driver has its own copy
    driver.launch(function, ONE, block(bench), bench.stream)
    assert bench.word() == 3


def test_graph_replays_what_was_captured(bench: Bench, library: Binary, tmp_path: Path) -> None:
    driver = bench.driver
    function = driver.module_function(driver.module_load(library), "step")
    driver.fill(bench.address, 0, 4, bench.stream)
    driver.capture_begin(bench.stream)
    driver.launch(function, ONE, block(bench), bench.stream)
    driver.launch(function, ONE, block(bench), bench.stream)
    graph = driver.capture_end(bench.stream)
    assert bench.word() == 0, "capture runs nothing"
    executable = driver.graph_instantiate(graph)
    driver.graph_upload(executable, bench.stream)
    for _ in range(3):
        driver.graph_launch(executable, bench.stream)
    assert bench.word() == 63
    driver.graph_dot(graph, tmp_path / "graph.dot")
    assert "node0 -> node1" in (tmp_path / "graph.dot").read_text()
    driver.graph_destroy(graph, executable)
    assert driver.counts["cuGraphLaunch"] == 3
    assert driver.counts["cuLaunchKernel"] == 2


def test_capture_refuses_what_cuda_refuses(bench: Bench, library: Binary) -> None:
    bench.driver.capture_begin(bench.stream)
    for forbidden in (
        lambda: bench.driver.mem_alloc(1),
        lambda: bench.driver.host_alloc(1),
        lambda: bench.driver.module_load(library),
        lambda: bench.driver.stream_sync(bench.stream),
    ):
        with pytest.raises(BackendError, match="STREAM_CAPTURE_UNSUPPORTED"):
            forbidden()
    bench.driver.capture_end(bench.stream)
    bench.driver.stream_sync(bench.stream)


def test_kernel_failure_names_kernel_and_schedule(bench: Bench, library: Binary) -> None:
    function = bench.driver.module_function(bench.driver.module_load(library), "step")
    bench.driver.launch(function, ONE, block(bench, fails=1), bench.stream)
    with pytest.raises(BackendError, match=r"kernel step: planted \(schedule seed 0\)"):
        bench.driver.stream_sync(bench.stream)


def test_seeds_differ_by_launch_and_repeat_by_driver(library: Binary) -> None:
    def schedules(seed: int) -> list[str]:
        bench, found = Bench(SimtDriver(seed)), []
        function = bench.driver.module_function(bench.driver.module_load(library), "step")
        for _ in range(3):
            bench.driver.launch(function, ONE, block(bench, fails=1), bench.stream)
            with pytest.raises(BackendError) as caught:
                bench.driver.stream_sync(bench.stream)
            found.append(str(caught.value))
        return found

    assert len(set(schedules(1))) == 3
    assert schedules(1) == schedules(1) != schedules(2)


def test_addresses_are_checked(bench: Bench) -> None:
    driver, stream, host = bench.driver, bench.stream, bench.host.address
    pageable = np.zeros(64, np.uint8).ctypes.data
    end = bench.address + NBYTES
    for wrong, message in (
        (lambda: driver.fill(end - 1, 0, 2, stream), "leave an allocation"),
        (lambda: driver.fill(bench.address - 1, 0, 1, stream), "in no device allocation"),
        (lambda: driver.copy_to_device(bench.address, pageable, 8, stream), "pinned host"),
        (lambda: driver.copy_to_host(host, host, 8, stream), "not device memory"),
        (lambda: driver.copy_on_device(bench.address, bench.address + 7, 8, stream), "overlap"),
        (lambda: driver.copy_on_device(end - 20, bench.address, 24, stream), "leave an alloc"),
        (lambda: driver.mem_free(bench.address + 1), "not allocated"),
    ):
        with pytest.raises(BackendError, match=message):
            wrong()


def test_out_of_memory_tells_wanted_and_free() -> None:
    driver = SimtDriver(memory_bytes=1000)
    driver.mem_alloc(600)
    with pytest.raises(BackendError, match="OUT_OF_MEMORY, 500 bytes wanted, 400 of 1,000"):
        driver.mem_alloc(500)
    assert driver.mem_info() == (400, 1000)


def test_geometry_and_shared_memory_limits(bench: Bench, library: Binary) -> None:
    driver = bench.driver
    function = driver.module_function(driver.module_load(library), "step")
    for config, message in (
        (LaunchConfig((1, 1, 1), (1025, 1, 1)), "block"),
        (LaunchConfig((1, 65536, 1), (1, 1, 1)), "grid"),
        (LaunchConfig((0, 1, 1), (1, 1, 1)), "grid"),
        (LaunchConfig((1, 1, 1), (1, 1, 1), (48 << 10) + 1), "allow_shared"),
    ):
        with pytest.raises(BackendError, match=message):
            driver.launch(function, config, block(bench), bench.stream)
    driver.allow_shared(function, MAX_SHARED_BYTES)
    driver.launch(
        function, LaunchConfig((1, 1, 1), (1, 1, 1), MAX_SHARED_BYTES), block(bench), bench.stream
    )
    with pytest.raises(BackendError, match="the most that a block has"):
        driver.allow_shared(function, MAX_SHARED_BYTES + 1)


def test_missing_kernel_is_named(bench: Bench, library: Binary) -> None:
    with pytest.raises(BackendError, match=r"\(nothing\).*no such kernel"):
        bench.driver.module_function(bench.driver.module_load(library), "nothing")


# ---- the real bindings over a libcuda double


@pytest.fixture(scope="module")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "cuda.bindings.driver", reason="needs cuda-python: pip install flashrt[cuda]"
    )
    if sys.platform != "linux":
        pytest.skip("the libcuda double is found through LD_LIBRARY_PATH")
    folder = tmp_path_factory.mktemp("libcuda")
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the tests need a C compiler"
    soname = ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    source = str(HERE / "libcuda_double.c")
    subprocess.run([compiler, "-shared", "-fPIC", *soname, source, "-ldl"], check=True)
    return folder


def run_bindings(folder: Path, code: str, *arguments: str, **environment: str) -> dict[str, object]:
    """Run `code` in a process of its own over the double; it leaves its findings in `found`."""
    script = f"import json\nfound = {{}}\n{code}\nprint(json.dumps(found))\n"
    root = str(HERE.parents[1])
    variables = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": root, **environment}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


BINDINGS = """
import struct, tempfile, threading
from pathlib import Path
import numpy as np
from flashrt.backends.cache import Binary
from flashrt.backends.cuda.driver import CudaDriver
from flashrt.backends.cuda.driver_api import ArgumentBlock, LaunchConfig
from flashrt.base.errors import BackendError

driver = CudaDriver()
info = driver.info
found["info"] = [info.name, info.arch, list(info.driver_version), info.multiprocessors]
p, host, s = driver.mem_alloc(1024), driver.host_alloc(1024), driver.stream_create()
mapped = driver.host_alloc(64, is_mapped=True)
found["mapped"] = [mapped.device_address - mapped.address, host.device_address]
host.array[:] = np.arange(1024) % 256
driver.copy_to_device(p, host.address, 1024, s)
host.array[:] = 0
driver.copy_on_device(p + 512, p + 8, 4, s)
driver.fill(p, 9, 2, s)
driver.copy_to_host(host.address, p, 1024, s)
driver.stream_sync(s)
found["bytes"] = [host.array[a:b].tolist() for a, b in ((0, 4), (512, 516))]

driver.fill(p, 0, 40, s)
host.array[:12] = range(1, 13)
driver.copy_rows_to_device(p, 10, host.address, 3, 4, s)
driver.copy_to_host(host.address, p, 40, s)
found["rows"] = host.array[:40].reshape(4, 10).tolist()

timed, event = driver.event_create(is_timed=True), driver.event_create()
driver.event_record(event, s)
found["polls"] = [driver.event_is_done(event) for _ in range(2)]
driver.event_sync(event)
driver.stream_wait(s, event)
found["elapsed_us"] = driver.elapsed_us(timed, timed)

folder = Path(tempfile.mkdtemp())
module = driver.module_load(Binary(Path("k.cubin"), b"cubin", "", was_cached=True))
function = driver.module_function(module, "add_one")
driver.allow_shared(function, 60000)
driver.fill(p, 0, 16, s)
block = ArgumentBlock(struct.pack("@Pi0P", p, 3))
for is_programmatic in (False, True):
    config = LaunchConfig((1, 2, 3), (4, 5, 6), 60000, is_programmatic)
    driver.launch(function, config, block, s)
driver.capture_begin(s)
for is_programmatic in (False, True):
    driver.launch(function, LaunchConfig((1, 2, 3), (4, 5, 6), 0, is_programmatic), block, s)
graph = driver.capture_end(s)
executable = driver.graph_instantiate(graph)
driver.graph_upload(executable, s)
driver.graph_launch(executable, s)
driver.graph_dot(graph, folder / "g.dot")
found["dot"] = (folder / "g.dot").read_text()
driver.graph_destroy(graph, executable)
driver.copy_to_host(host.address, p, 16, s)
found["words"] = host.array[:16].view(np.int32).tolist()

def elsewhere():
    found["thread"] = driver.mem_alloc(8) != 0
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()

bad = Binary(Path("bad.cubin"), b"PTX..", "", was_cached=True)
errors = []
for wrong in (
    lambda: driver.mem_alloc(1 << 40),
    lambda: driver.module_load(bad),
    lambda: driver.module_function(module, "missing"),
    lambda: driver.allow_shared(function, 1 << 20),
):
    try:
        wrong()
    except BackendError as error:
        errors.append(str(error))
found["errors"] = errors
calls = ("cuLaunchKernel", "cuLaunchKernelEx", "cuGraphLaunch")
found["launches"] = [driver.counts[call] for call in calls]
driver.event_destroy(event)
driver.host_free(host)
driver.mem_free(p)
driver.stream_destroy(s)
driver.close()
"""


def test_bindings_follow_the_c_conventions(fake_libcuda: Path) -> None:
    found = run_bindings(fake_libcuda, BINDINGS)
    assert found["info"] == ["Double 0", "sm_90", [13, 0], 132]
    assert found["bytes"] == [[9, 9, 2, 3], [8, 9, 10, 11]]
    rows = [[3 * i + 1, 3 * i + 2, 3 * i + 3, *[0] * 7] for i in range(4)]
    assert found["rows"] == rows
    assert found["polls"] == [False, True]
    assert found["elapsed_us"] == 1500.0
    assert found["mapped"] == [0, 0], "kernels see the one where the host does, the other nowhere"
    assert found["words"] == [4, 4, 4, 0]
    assert "2 nodes" in str(found["dot"])
    assert found["thread"] is True
    assert found["launches"] == [2, 2, 1]
    memory, image, function, shared = found["errors"]  # type: ignore[misc]
    assert "1,099,511,627,776 bytes wanted, 1,073,740,792 of" in memory
    assert "INVALID_IMAGE" in image and "update the driver" in image
    assert "(missing)" in function and "NOT_FOUND" in function
    assert "1048576 bytes of shared memory wanted" in shared


DEVICE = """
import numpy as np
from flashrt.backends.cuda.device import open_device
from flashrt.core.backend import BoundLaunch
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.op import bind
from flashrt.core.region import DType, Region, Role
from flashrt.ops.table import ADVANCE, OPS

device = open_device("high")
device.build(OPS)
arena = device.allocate("arena", 1 << 20)
found["description"] = device.description
cursor = Region("cursor", (16,), DType.I32, Role.FIXED)
launches = [BoundLaunch(bind(ADVANCE, {"cursor": cursor}, {}), (arena.address,))] * 2
graph = device.capture(launches)
device.seal()
words = np.zeros(16, np.int32)
words[:2] = 10, 3
device.write(arena.address, words.view(np.uint8))
for _ in range(100):
    device.replay(graph)
device.eager(launches)
device.copy(CopyList((Copy(0, 4096, 4),)), arena.address, arena.address)
device.fill(arena.address + 4, 1, 255)
device.sync()
out = np.zeros(16384, np.uint8)
device.read(arena.address, out)
found["words"] = [int(out[i : i + 4].view(np.int32)[0]) for i in (0, 4, 4096)]
counts = device.driver.counts
names = ("cuGraphLaunch", "cuLaunchKernel", "cuLaunchKernelEx", "cuMemAlloc", "cuModuleLoadData")
found["counts"] = [counts[name] for name in names]
device.close()
freed = ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuGraphExecDestroy", "cuEventDestroy")
found["freed"] = [counts[name] for name in freed]
found["carveouts"], found["unloaded"] = counts["cuFuncSetAttribute"], counts["cuModuleUnload"]
"""


def test_device_runs_over_the_bindings(fake_libcuda: Path) -> None:
    """All of CudaDevice, NVRTC's cubins included; on sm_90 launches are programmatic."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    found = run_bindings(fake_libcuda, DEVICE)
    assert found["description"] == "cuda: Double 0, sm_90, 1.0 GiB, driver for CUDA 13.0"
    after = 10 + 3 * 2 * 101
    assert found["words"] == [after, 255, after]
    assert found["counts"] == [100, 0, 4, 2, 3]
    assert found["freed"] == [2, 6, 3, 1, 32]
    assert found["carveouts"] == 3, "every kernel is asked for the same split, once"
    assert found["unloaded"] == 3, "what was loaded goes"


MODEL = """
import sys
import flashrt

engine = flashrt.load(sys.argv[1], device="auto", max_positions=64, draft=False)
found["device"] = engine.device
counts = engine.backend.driver.counts
session = engine.session()
session.prefill(range(40))
capsule = session.snapshot()
session.prefill([1])
before = counts.copy()
session.prefill([2])
used = counts - before
found["used"] = {name: used[name] for name in sorted(used)}
session.restore(capsule)
found["position"] = session.position
names = ("cuGraphInstantiate", "cuGraphUpload", "cuMemAlloc", "cuLaunchKernelEx", "cuLaunchKernel")
found["counts"] = {name: counts[name] for name in names}
found["graphs"] = engine.stats()["graphs"]
engine.close()
"""


def test_a_model_loads_and_captures_over_the_bindings(fake_libcuda: Path) -> None:
    """Load, capture, replay, snapshot and restore with cubins for sm_90; kernels do nothing."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    found = run_bindings(fake_libcuda, MODEL, str(HERE.parent / "golden" / "tiny"))
    assert found["device"] == "cuda", "auto takes the GPU where there is one"
    assert found["position"] == 40
    used = found["used"]
    assert isinstance(used, dict)
    assert used.pop("cuMemcpyHtoDAsync") <= 3, "tokens, and what of the cursor changed"
    assert used.pop("cuCtxGetCurrent") <= 4, "one question per verb"
    assert used == {"cuGraphLaunch": 1}
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert counts["cuGraphInstantiate"] == counts["cuGraphUpload"] == found["graphs"]
    assert counts["cuMemAlloc"] == 3, "arena, weights, and the tables of the device"
    assert counts["cuLaunchKernelEx"] > 150, "captured launches may start early on sm_90"
    assert counts["cuLaunchKernel"] <= 2, "the copy kernel, for snapshot and restore"


CONTEXTS = """
import ctypes, os
from flashrt.backends.cuda.device import Capacities, CudaDevice
from flashrt.backends.cuda.driver import CudaDriver
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.base.errors import BackendError

libcuda = ctypes.CDLL("libcuda.so.1")
current, foreign = ctypes.c_void_p(), ctypes.c_void_p(0x1000)

def now():
    libcuda.cuCtxGetCurrent(ctypes.byref(current))
    return current.value

found["before"] = now()
driver = CudaDriver(1)
device = CudaDevice(driver, Nvrtc(driver.info.arch), capacities=Capacities(reserve_bytes=1 << 20))
arena = device.allocate("arena", 4096)
ours = now()
found["kept"] = ours is not None
libcuda.cuCtxSetCurrent(foreign)  # what another library may do at any time
device.fill(arena.address, 4096, 1)  # a verb
found["verb"] = now()
driver.mem_info()  # a call outside of one
found["call"] = now()
libcuda.cuCtxSetCurrent(foreign)
try:
    device.allocate("weights", (1 << 30) - (64 << 20))
except BackendError as error:
    found["reserve"] = str(error)
found["raised"] = now()
device.close()
found["closed"] = now()
again = CudaDriver(0)
again.mem_info()
found["switched"] = now()
libcuda.cuCtxSetCurrent(None)
again.mem_info()
again.close()
found["alone"] = now()
found["counts"] = driver.counts["cuCtxSetCurrent"]
"""


def test_other_contexts_are_left_as_they_were(fake_libcuda: Path) -> None:
    """The double refuses work in a context that is not flashrt's. Red where the current context
    is remembered instead of asked for, or a caller's is not given back.
    """
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    found = run_bindings(fake_libcuda, CONTEXTS, DOUBLE_DEVICES="2")
    assert found["before"] is None and found["kept"] is True
    for moment in ("verb", "call", "raised", "closed", "switched"):
        assert found[moment] == 0x1000, moment
    assert found["alone"] is None, "our own is not left behind: it is gone"


def test_memory_for_kernels_is_kept_back(fake_libcuda: Path) -> None:
    """Red where arena and weights take all, and a graph fails later with OUT_OF_MEMORY."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    code = CONTEXTS.replace("reserve_bytes=1 << 20", "").replace("(64 << 20)", "(100 << 20)")
    found = run_bindings(fake_libcuda, code, DOUBLE_DEVICES="2")
    assert "the weights of 968,884,224 bytes would leave" in str(found["reserve"])
    assert "kernels and graphs" in str(found["reserve"])
    assert "use a smaller max_positions" in str(found["reserve"])


VIEWS = """
import ctypes
from flashrt.backends.cuda.device import open_device
from flashrt.core.region import DType, Region, Role

device = open_device(ordinal=1)
memory = device.allocate("arena", 4096)
view = device.view(Region("rows", (2, 3), DType.F32, Role.IO), memory.address)
found["device"] = view.__dlpack_device__()
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
capsule = view.__dlpack__()
words = (ctypes.c_int32 * 4).from_address(pointer(capsule, b"dltensor"))
found["tensor"] = list(words[2:4])
found["array"] = view.__cuda_array_interface__["data"][0] == memory.address
device.close()
"""


def test_views_name_their_device(fake_libcuda: Path) -> None:
    """On the second of two. Red where consumers are told that it is the first."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    found = run_bindings(fake_libcuda, VIEWS, DOUBLE_DEVICES="2")
    assert found["device"] == found["tensor"] == [2, 1]
    assert found["array"] is True


PROBE = """
from flashrt.backends.cuda.probe import probe
status = probe()
found.update(is_usable=status.is_usable, text=str(status))
"""


@pytest.mark.parametrize(
    ("environment", "is_usable", "text"),
    [
        ({}, True, "Double 0, sm_90, 1.0 GiB, driver for CUDA 13.0"),
        ({"DOUBLE_INIT": "100"}, False, "CUDA_ERROR_NO_DEVICE"),
        ({"DOUBLE_MAJOR": "7"}, False, "needs sm_80"),
        ({"DOUBLE_VERSION": "12040"}, False, "cannot load kernels of NVRTC"),
        ({"DOUBLE_VERSION": "12040"}, False, "pip install 'flashrt[cuda12]', or update the driver"),
        ({"DOUBLE_INTEGRATED": "1"}, True, "1.0 GiB shared with the host"),
    ],
)
def test_probe_says_why(
    fake_libcuda: Path, environment: dict[str, str], is_usable: bool, text: str
) -> None:
    found = run_bindings(fake_libcuda, PROBE, **environment)
    assert found["is_usable"] is is_usable
    assert text in str(found["text"])


AUTO = """
import warnings
from flashrt.backends.choose import open_backend
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    found["name"] = open_backend("auto").name
found["heard"] = [f"{w.category.__name__}: {w.message}" for w in heard]
"""


def test_auto_says_why_a_gpu_is_not_used(fake_libcuda: Path) -> None:
    """Red while it fell back to the CPU in silence, and if it complains where there is no GPU."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")
    old = run_bindings(fake_libcuda, AUTO, DOUBLE_VERSION="12040")
    assert old["name"] == "cpu"
    (text,) = old["heard"]  # type: ignore[misc]
    assert text.startswith("DeviceWarning: device='auto' runs on the CPU, though there is a GPU")
    assert "flashrt[cuda12]" in text
    assert run_bindings(fake_libcuda, AUTO) == {"name": "cuda", "heard": []}
    hidden = run_bindings(fake_libcuda, AUTO, DOUBLE_INIT="100", CUDA_VISIBLE_DEVICES="")
    assert hidden == {"name": "cpu", "heard": []}


def test_failed_launch_says_that_the_process_is_lost(fake_libcuda: Path) -> None:
    code = """
from flashrt.backends.cuda.driver import CudaDriver
from flashrt.base.errors import BackendError
driver = CudaDriver()
try:
    driver.stream_sync(driver.stream_create())
except BackendError as error:
    found["text"] = str(error)
"""
    text = str(run_bindings(fake_libcuda, code, DOUBLE_SYNC="700")["text"])
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in text
    assert "restart the process" in text


def test_importing_flashrt_does_not_touch_cuda() -> None:
    code = "import sys, flashrt, flashrt.backends.cuda.device, flashrt.backends.cuda.probe\n"
    code += "assert not [m for m in sys.modules if m.split('.')[0] == 'cuda'], 'cuda was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])
