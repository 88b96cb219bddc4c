"""Time of a chunk of ACT, flashrt beside LeRobot on torch: one run, taking turns, same threads.

    python tools/act_bench.py --torch /path/to/python-with-lerobot [--threads 2] [--chunks 12]

Writes a policy of LeRobot's usual size (one camera of 480 x 640, 52 M parameters with the encoder
that inference does not use) with random weights, starts a worker for each, and asks them in turns
for a chunk of the same observation: packing, normalisation and scaling of actions are included.
Prints a JSON document with seconds per chunk, processor seconds, and peak memory of each process;
and for flashrt the seconds of a loop's tick between two chunks, which takes an observation in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.act_policies import act_config, observation_of, write_random_act  # noqa: E402

CONFIG = act_config(
    {"top": (480, 640)}, state=14, action=14, chunk_size=100, n_action_steps=100, dim_model=512,
    n_heads=8, dim_feedforward=3200, n_encoder_layers=4, latent_dim=32, n_vae_encoder_layers=4,
)  # fmt: skip
SEED = 5


def flashrt_chunks(folder: Path) -> tuple[Callable[[dict[str, Any]], Any], Any]:
    """What makes a chunk of an observation; the engine, which has a lane for a loop besides."""
    import flashrt

    engine = flashrt.load_policy(folder, device="cpu", lanes=2)
    lane = engine.take_lane(engine)
    engine.reset(lane)

    def chunk(observation: dict[str, Any]) -> Any:
        engine.observe(lane, observation)
        engine.plan(lane)
        return engine.chunk(lane)

    return chunk, engine


def tick_seconds(engine: Any, observation: dict[str, Any]) -> float:
    """Of a tick that makes no chunk, and its slack, in processor time; the median."""
    import flashrt

    loop = flashrt.ControlLoop(engine)
    times = []
    for _ in range(CONFIG["chunk_size"]):
        before = time.process_time()
        loop.tick(observation)
        loop.slack()
        times.append(time.process_time() - before)
    return statistics.median(times[1:])


def torch_chunks(folder: Path, threads: int) -> Callable[[dict[str, Any]], Any]:
    """The same by LeRobot."""
    sys.path.insert(0, str(ROOT / "tools"))
    import torch
    from act_golden import as_lerobot, loaded

    torch.set_num_threads(threads)
    policy, before, after = loaded(folder)

    @torch.no_grad()
    def chunk(observation: dict[str, Any]) -> Any:
        return after(policy.predict_action_chunk(before(as_lerobot(observation))))[0].numpy()

    return chunk


def work(kind: str, folder: Path, threads: int) -> None:
    """Answer each line with a chunk's times."""
    observation, more = observation_of(CONFIG, SEED), {}
    if kind == "flashrt":
        chunk, engine = flashrt_chunks(folder)
        more["tick_cpu_s"] = tick_seconds(engine, observation)
    else:
        chunk = torch_chunks(folder, threads)
    chunk(observation)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        found = chunk(observation)
        times = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"wall_s": times[0], "cpu_s": times[1], "peak_bytes": peak} | more
        print(json.dumps(answer | {"chunk": found.astype(float).tolist()}), flush=True)


def write_policy(python: str, folder: Path) -> None:
    """With names and shapes as LeRobot has them."""
    code = (
        "import sys, json; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tools'];"
        "import act_golden, act_bench; print(json.dumps(act_golden.tensors_of(act_bench.CONFIG)))"
    )
    done = subprocess.run([python, "-c", code, str(ROOT)], capture_output=True, check=True)
    tensors = json.loads(done.stdout.splitlines()[-1])
    write_random_act(folder, CONFIG, tensors, SEED)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", required=True, help="a python that has lerobot and torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work[0], Path(asked.work[1]), asked.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        write_policy(asked.torch, Path(name))
        found: dict[str, list[dict[str, Any]]] = {"flashrt": [], "torch": []}
        workers = {}
        for kind, python in (("flashrt", sys.executable), ("torch", asked.torch)):
            workers[kind] = subprocess.Popen(
                [python, __file__, "--torch", asked.torch, "--threads", str(asked.threads),
                 "--work", kind, name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"FLASHRT_THREADS": str(asked.threads)},
            )  # fmt: skip
        for worker in workers.values():
            assert worker.stdin is not None and worker.stdout is not None
            while worker.stdout.readline().strip() != "ready":
                pass
        for _ in range(asked.chunks):
            for kind, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                found[kind].append(json.loads(worker.stdout.readline()))
        for worker in workers.values():
            worker.communicate()
    chunks = [runs[0].pop("chunk") for runs in found.values()]
    apart = max(abs(a - b) for x, y in zip(*chunks, strict=True) for a, b in zip(x, y, strict=True))
    document: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": asked.threads,
        "chunks": asked.chunks, "most_apart": apart,
    }  # fmt: skip
    for kind, runs in found.items():
        document[kind] = {
            "wall_s": statistics.median(r["wall_s"] for r in runs),
            "least_wall_s": min(r["wall_s"] for r in runs),
            "cpu_s": statistics.median(r["cpu_s"] for r in runs),
            "peak_bytes": max(r["peak_bytes"] for r in runs),
        } | {name: value for name, value in runs[0].items() if name == "tick_cpu_s"}
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
