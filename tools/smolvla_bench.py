"""Time of a chunk of SmolVLA at its released size, flashrt alone or beside LeRobot on torch.

    python tools/smolvla_bench.py [--torch /path/to/python] [--threads 2]
        [--chunks 4] [--cameras 1 3] [--torch-dtype float32] [--precisions bfloat16 fast]

Writes a policy of the released sizes (450 M parameters; cameras of 480 x 640) with random weights
in bfloat16, starts a worker for each, and asks them in turns for a chunk. Of flashrt, by precision:
with images that were never seen, so that all rows are made; with another state alone; and with an
observation whose rows a capsule brings back. Packing, normalisation and scaling of actions are
included. Prints a JSON document with seconds per chunk, processor seconds, peak memory of each
process, how far apart actions are, and the seconds of a loop's tick between two chunks, which takes
an observation in.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.smolvla_policies import (  # noqa: E402
    noise_of,
    observation_of,
    smolvla_config,
    vlm_config,
    write_random_smolvla,
)

NAMES = ("top", "left", "wrist")
VLM = vlm_config(
    hidden=960, heads=(15, 5), head_dim=64, ff=2560, layers=32, vision=(768, 12, 3072, 12),
    image=(512, 16, 4),
)  # fmt: skip
VLM["text_config"]["vocab_size"] = 49280
SEED, STATE = 5, "observation.state"
Chunks = dict[str, Callable[[dict[str, Any]], Any]]


def config_of(cameras: int) -> dict[str, Any]:
    """A policy's config.json; its tower stands where LeRobot finds it in float32."""
    images = dict.fromkeys(NAMES[:cameras], (480, 640))
    return smolvla_config(
        images, state=6, action=6, side=512, chunk_size=50, n_action_steps=50, num_vlm_layers=16,
        load_vlm_weights=False,
    )  # fmt: skip


def flashrt_chunks(folder: Path, config: dict[str, Any], precision: Any) -> tuple[Chunks, Any]:
    """What makes a chunk of an observation, in each of three ways; and the engine, which has a lane
    for a loop besides. They are to be called in this order.
    """
    import flashrt
    from flashrt.engine.numbers import Given

    engine = flashrt.load_policy(folder, device="cpu", lanes=2, precision=precision)
    lane, given = engine.take_lane(engine), Given(noise_of(config, SEED))
    engine.reset(lane)
    kept = observation_of(config, SEED)

    def chunk(observation: dict[str, Any]) -> Any:
        engine.observe(lane, observation)
        engine.plan(lane, given=given)
        return engine.chunk(lane)

    chunk(kept)
    capsule = engine.snapshot(lane)

    def restored(observation: dict[str, Any]) -> Any:
        del observation  # which the lane has rows of: those of the capsule are copied
        engine.restore(lane, capsule)
        return chunk(kept)

    def state(observation: dict[str, Any]) -> Any:
        return chunk({**observation, STATE: kept[STATE]})

    return {"all rows": chunk, "state's row": state, "restored": restored}, engine


def tick_seconds(engine: Any, config: dict[str, Any]) -> dict[str, float]:
    """Of a tick that makes no chunk, and its slack: the median."""
    import flashrt

    observation = observation_of(config, SEED)
    loop = flashrt.ControlLoop(engine, overlap=0)
    times: list[tuple[float, float]] = []
    for _ in range(config["n_action_steps"]):
        before = time.perf_counter(), time.process_time()
        loop.tick(observation)
        loop.slack()
        times.append((time.perf_counter() - before[0], time.process_time() - before[1]))
    loop.close()
    wall, cpu = zip(*times[1:], strict=True)
    return {"tick_wall_s": statistics.median(wall), "tick_cpu_s": statistics.median(cpu)}


def torch_chunks(folder: Path, config: dict[str, Any], threads: int, dtype: str) -> Chunks:
    """The same by LeRobot, which makes all anew."""
    sys.path.insert(0, str(ROOT / "tools"))
    import torch
    from smolvla_golden import as_lerobot, loaded

    torch.set_num_threads(threads)
    policy, before, after = loaded(folder, VLM)
    if dtype == "bfloat16":
        policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
    noise = torch.from_numpy(noise_of(config, SEED))[None]

    @torch.no_grad()
    def chunk(observation: dict[str, Any]) -> Any:
        batch = before(as_lerobot(observation))
        return after(policy.predict_action_chunk(batch, noise=noise))[0].float().numpy()

    return {"all rows": chunk}


def work(kind: str, folder: Path, asked: argparse.Namespace) -> None:
    """Answer each line with the times of a chunk in each way."""
    cameras, more = int(folder.name), {}
    config = config_of(cameras)
    if kind != "torch":
        chunks, engine = flashrt_chunks(folder, config, kind.removeprefix("flashrt "))
        more = tick_seconds(engine, config)
    else:
        chunks = torch_chunks(folder, config, asked.threads, asked.torch_dtype)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        answer: dict[str, Any] = {"ways": {}}
        observation = observation_of(config, SEED + 1 + number)
        for way, chunk in chunks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found = chunk(observation)
            times = time.perf_counter() - wall, time.process_time() - cpu
            answer["ways"][way] = {"wall_s": times[0], "cpu_s": times[1]}
            if way == "all rows":
                answer["chunk"] = found.astype(float).tolist()
        answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer | more), flush=True)


def measured(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """A document of one number of cameras."""
    kinds = {f"flashrt {precision}": sys.executable for precision in asked.precisions}
    kinds |= {"torch": asked.torch} if asked.torch else {}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    workers = {}
    for kind, python in kinds.items():
        options = ["--threads", str(asked.threads), "--torch-dtype", asked.torch_dtype]
        workers[kind] = subprocess.Popen(
            [python, __file__, *options, "--work", kind, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"FLASHRT_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    for worker in workers.values():
        assert worker.stdin is not None and worker.stdout is not None
        while (line := worker.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit("a worker ended before it was ready")
    for _ in range(asked.chunks):
        for kind, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            found[kind].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate()
    document: dict[str, Any] = {}
    for kind, runs in found.items():
        document[kind] = {
            way: {
                "wall_s": statistics.median(r["ways"][way]["wall_s"] for r in runs),
                "least_wall_s": min(r["ways"][way]["wall_s"] for r in runs),
                "cpu_s": statistics.median(r["ways"][way]["cpu_s"] for r in runs),
            }
            for way in runs[0]["ways"]
        }
        document[kind]["peak_bytes"] = max(r["peak_bytes"] for r in runs)
        document[kind] |= {n: v for n, v in runs[0].items() if n.startswith("tick")}
    chunks = {kind: np.array([run["chunk"] for run in runs]) for kind, runs in found.items()}
    for kind, own in chunks.items():
        if kind != "torch" and "torch" in chunks:
            document[kind]["most_apart_from_torch"] = float(np.abs(own - chunks["torch"]).max())
    return document


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="a python that has lerobot, num2words and ml_dtypes")
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 3], choices=(1, 2, 3))
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "fast"])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work[0], Path(asked.work[1]), asked)
        return
    from flashrt.commands.doctor import cpu_name  # not for the worker on torch

    document: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores of {cpu_name()}", "threads": asked.threads,
        "chunks": asked.chunks, "torch_dtype": asked.torch_dtype,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for cameras in asked.cameras:
            folder = Path(name) / str(cameras)
            write_random_smolvla(folder, config_of(cameras), VLM, SEED, "bfloat16")
            document[f"{cameras} cameras"] = measured(folder, asked)
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
