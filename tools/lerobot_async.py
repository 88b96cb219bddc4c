"""LeRobot's async inference against `flashrt serve-policy`: payloads for the tests, and a check.

Run it where lerobot (0.4.4) with its `async` extra is, and flashrt can be imported:

    python tools/lerobot_async.py record
    python tools/lerobot_async.py check --python PYTHON_OF_FLASHRT

`record` writes tests/policy_server/recorded: what LeRobot's client pickles for a robot of seven
joints and a camera, in protocols 4 and 5, with torch tensors too; an answer of ours that torch has
read; what LeRobot's policy server answers; and digests of images as it resizes them. `check` drives
LeRobot's own RobotClient, unchanged but for a robot of numbers, against LeRobot's policy server and
against ours, and compares the actions; then lets its control loop run.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import lerobot.async_inference.robot_client as client_module
import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig, RobotClientConfig
from lerobot.async_inference.helpers import (
    RemotePolicyConfig,
    TimedObservation,
    map_robot_keys_to_lerobot_features,
    resize_robot_observation_image,
)
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.robots.config import RobotConfig
from lerobot.transport import services_pb2, services_pb2_grpc

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flashrt.policy_server.payloads import write_actions  # noqa: E402
from tests.act_policies import write_set  # noqa: E402
from tests.policy_files import uniform  # noqa: E402

FOLDER = ROOT / "tests" / "policy_server" / "recorded"
JOINTS = tuple(f"joint_{i}.pos" for i in range(7))
HEIGHT, WIDTH = 48, 80  # of the camera; the policy takes 64 x 64
SEEDS = (41, 42, 43)
MOST_APART = 1e-3
SIZES = (
    (48, 80, 64, 64), (64, 64, 64, 64), (7, 9, 31, 5), (120, 33, 17, 90), (1, 1, 4, 3),
    (480, 640, 224, 224),
)  # fmt: skip


def seen_by(seed: int) -> dict[str, Any]:
    """What the robot sees: numbers that tests can draw again."""
    joints = uniform("joints", (len(JOINTS),), seed) * 2
    pixels = uniform("camera", (HEIGHT, WIDTH, 3), seed)
    seen: dict[str, Any] = {n: float(v) for n, v in zip(JOINTS, joints, strict=True)}
    return seen | {"top": ((pixels + 1) * 128).astype(np.uint8)}


class NumberRobot:
    """A robot of numbers, with what RobotClient asks of one."""

    name = "numbers"

    def __init__(self) -> None:
        self.action_features = dict.fromkeys(JOINTS, float)
        self.observation_features = {**self.action_features, "top": (HEIGHT, WIDTH, 3)}
        self.seed = SEEDS[0]
        self.sent: list[dict[str, float]] = []

    def connect(self) -> None:
        """It is there."""

    disconnect = connect

    def get_observation(self) -> dict[str, Any]:
        """By its seed."""
        return seen_by(self.seed)

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """Noted; the next observation is another."""
        self.sent.append(action)
        self.seed += 1
        return action


@RobotConfig.register_subclass("numbers")
class NumberRobotConfig(RobotConfig):
    """For RobotClientConfig."""


def record() -> None:
    """Write the payloads."""
    FOLDER.mkdir(exist_ok=True)
    features = map_robot_keys_to_lerobot_features(NumberRobot())
    instructions = RemotePolicyConfig("act", "user/plain", features, 10, "cuda")
    seen = seen_by(SEEDS[0]) | {"task": "pick the cube"}
    observation = TimedObservation(12.5, 3, seen, True)
    tensors = seen | {
        "top": torch.from_numpy(seen["top"].transpose(2, 0, 1).copy()).permute(1, 2, 0),
        JOINTS[0]: torch.tensor(seen[JOINTS[0]]),
        JOINTS[1]: np.float32(seen[JOINTS[1]]),
        JOINTS[2]: np.array([seen[JOINTS[2]]]),
        "unused": torch.arange(6, dtype=torch.int64)[2:],
    }
    chunk = uniform("answer", (3, 2), 1)
    answer = write_actions(chunk, 5.0, 1 << 31, 0.25, "lerobot.async_inference.helpers")
    read = pickle.loads(answer)
    assert torch.equal(torch.stack([a.get_action() for a in read]), torch.from_numpy(chunk))
    assert [a.get_timestep() for a in read] == [(1 << 31) + i for i in range(3)]
    assert [a.get_timestamp() for a in read] == [5.0, 5.25, 5.5]
    payloads = {
        "instructions": pickle.dumps(instructions),
        "observation": pickle.dumps(observation),
        "observation-5": pickle.dumps(observation, protocol=5),
        "tensors": pickle.dumps(TimedObservation(12.5, 3, tensors, False)),
        "answer": answer,
    }
    for name, data in payloads.items():
        (FOLDER / f"{name}.pickle").write_bytes(data)
        print(name, len(data))
    with random_policy() as policy, lerobots_server() as address:
        chunks = [rows.astype(float).tolist() for rows, *_ in chunks_of(address, policy)]
    expected = {"seeds": SEEDS, "chunks": chunks, "resized": [resized(*case) for case in SIZES]}
    (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n")


def resized(*size: int) -> list[int]:
    """height, width -> height, width of a random image, and the CRC of what it becomes."""
    image = ((uniform("image", (*size[:2], 3), sum(size)) + 1) * 128).astype(np.uint8)
    small = resize_robot_observation_image(torch.from_numpy(image), (3, *size[2:]))
    return [*size, zlib.crc32(small.permute(1, 2, 0).contiguous().numpy().tobytes())]


@contextmanager
def random_policy() -> Iterator[Path]:
    """A directory with an ACT policy of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_set("plain", Path(folder) / "plain")


@contextmanager
def lerobots_server() -> Iterator[str]:
    """The address of LeRobot's policy server, in this process."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    servicer = PolicyServer(PolicyServerConfig())
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def our_server(python: str, policy: Path) -> Iterator[str]:
    """The address of `flashrt serve-policy`, in a process of another interpreter."""
    command = [python, "-m", "flashrt", "serve-policy", str(policy), "--port", "0"]
    command += ["--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("listening on "):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: [print("  ", e, end="") for e in process.stderr]).start()
        yield line.split()[-1]
    finally:
        process.terminate()
        print("server ended with", process.wait(20))


def client_of(address: str, policy: Path) -> Any:
    """LeRobot's client with a robot of numbers, started."""
    config = RobotClientConfig(
        policy_type="act",
        pretrained_name_or_path=str(policy),
        robot=NumberRobotConfig(),
        actions_per_chunk=15,
        server_address=address,
        aggregate_fn_name="latest_only",
    )
    client = client_module.RobotClient(config)
    assert client.start(), "the client did not start"
    return client


def chunks_of(address: str, policy: Path) -> list[tuple[np.ndarray, list[int], list[float]]]:
    """Of observations that its control loop sends: actions, timesteps, seconds since the first."""
    client = client_of(address, policy)
    found = []
    for i, seed in enumerate(SEEDS):
        client.robot.seed = seed
        client.latest_action = 10 * i
        client.must_go.set()
        client.control_loop_observation("pick the cube")
        data = client.stub.GetActions(services_pb2.Empty()).data
        actions = pickle.loads(data)
        stamps = [a.get_timestamp() - actions[0].get_timestamp() for a in actions]
        rows = np.stack([a.get_action().numpy() for a in actions])
        found.append((rows, [a.get_timestep() for a in actions], stamps))
    client.stop()
    return found


def check(python: str) -> None:
    """Compare, and let the client's loop run."""
    with random_policy() as policy:
        with lerobots_server() as address:
            wanted = chunks_of(address, policy)
        with our_server(python, policy) as address:
            got = chunks_of(address, policy)
            client = client_of(address, policy)
            receiver = threading.Thread(target=client.receive_actions, daemon=True)
            receiver.start()
            loop = threading.Thread(target=client.control_loop, args=("pick the cube",))
            loop.start()
            time.sleep(4)
            client.shutdown_event.set()
            loop.join()
            receiver.join()
            client.stop()
            sent = len(client.robot.sent)
    for (ours, steps, stamps), (theirs, their_steps, their_stamps) in zip(got, wanted, strict=True):
        apart = float(np.abs(ours - theirs).max())
        print(f"actions {ours.shape}, apart by {apart:.2e} of {np.abs(theirs).max():.2f}")
        assert apart < MOST_APART
        assert steps == their_steps
        assert np.allclose(stamps, their_stamps, atol=1e-6)
    print(f"control loop: {sent} actions sent in 4 s at 30 fps, of seeds to {client.robot.seed}")
    assert sent > 100


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    client_module.make_robot_from_config = lambda config: NumberRobot()
    record() if options.what == "record" else check(options.python)
