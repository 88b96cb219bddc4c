"""A robot policy as plain numpy in float64: each of its ops, and the whole of it.

IS: written from the equations of models/policy. IS NOT: fast, or exact to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashrt.models.flow_policy.config import PolicyConfig
from flashrt.ops.cursor import PolicyWord, RequestWord
from tests.reference import Array, Operands, Results, philox, sigmoid, silu


def normal(n: int, seed: tuple[int, int], tick: int) -> Array:
    """Noise of a plan: Box and Muller on Philox' words, counter (i / 4, tick, 0, 0)."""
    words = [w for i in range(-(-n // 4)) for w in philox((i, tick, 0, 0), seed)]
    u = np.minimum((np.array(words, np.float64).reshape(-1, 2) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n]


def words(**values: int) -> Array:
    """A cursor's words as an expected result: NaN where nothing is written."""
    out = np.full(16, np.nan)
    for name, value in values.items():
        out[PolicyWord[name.upper()]] = value
    return out


def gru(u: Array, v: Array, memory: Array) -> Array:
    """torch.nn.GRUCell after its two matrix products: gates in the order r, z, n."""
    (ur, uz, un), (vr, vz, vn) = np.split(u, 3), np.split(v, 3)
    r, z = sigmoid(ur + vr), sigmoid(uz + vz)
    return (1 - z) * np.tanh(un + r * vn) + z * memory


def observe(o: Operands) -> Results:
    scaled = np.clip((o["observation"] - o["mean"]) / o["std"], -10, 10)
    tick = int(o["cursor"][PolicyWord.TICK])
    return {"x": np.concatenate([scaled, o["previous"]]), "cursor": words(observed=tick)}


def dense(o: Operands) -> Results:
    y = o["x"] @ o["w"].T + o["b"]
    return {"y": (y, silu(y), np.maximum(y, 0))[int(o.attrs["activation"])]}


def dense_add(o: Operands) -> Results:
    return {"y": o["y"] + o["x"] @ o["w"].T + o["b"]}


def gru_cell(o: Operands) -> Results:
    return {"memory": gru(o["u"], o["v"], o["memory"])}


def flow_begin(o: Operands) -> Results:
    cursor = o["cursor"].astype(int)
    t = max(int(cursor[PolicyWord.OBSERVED]), 0)
    seed = (
        int(cursor[PolicyWord.SEED_LOW]) & 0xFFFFFFFF,
        int(cursor[PolicyWord.SEED_HIGH]) & 0xFFFFFFFF,
    )
    x = normal(o["queue"].size, seed, t).reshape(o["queue"].shape)
    return {"context": np.concatenate([o["memory"], o["encoded"]]), **begun(o, x, "flow")}


def chunk_begin(o: Operands) -> Results:
    return begun(o, np.zeros(o["queue"].shape), "kept")


def begun(o: Operands, x: Array, name: str) -> Results:
    """A plan: x in rows that are not promised."""
    cursor, queue = o["cursor"].astype(int), o["queue"]
    t, done = max(int(cursor[PolicyWord.OBSERVED]), 0), int(cursor[PolicyWord.TICK])
    mask = np.zeros(len(queue))
    for j in range(int(o["request"][0])):
        row = t + j - int(cursor[PolicyWord.CHUNK])
        x[j] = o["previous"] if t + j < done else queue[row]
        mask[j] = 1
    steps, execute = int(o.attrs["steps"]), int(o.attrs["execute"])
    stop = t + min(int(mask.sum()) + execute, len(queue))
    return {
        name: np.concatenate([x.reshape(-1), mask]),
        "cursor": words(plan_tick=t, plan_stop=stop, plan_steps_left=steps),
    }


def flow_step(o: Operands) -> Results:
    velocity = (o["z"] @ o["w"].T + o["b"])[0].reshape(len(o["mask"]), -1)
    x = o["x"].reshape(velocity.shape)
    moved = np.where(o["mask"][:, None] == 0, x + velocity / o.attrs["steps"], x)
    left = int(o["cursor"][PolicyWord.PLAN_STEPS_LEFT]) - 1
    return {"x": moved.reshape(-1), "cursor": words(plan_steps_left=left)}


def flow_end(o: Operands) -> Results:
    cursor = o["cursor"]
    chunk, stop = int(cursor[PolicyWord.PLAN_TICK]), int(cursor[PolicyWord.PLAN_STOP])
    results = {"cursor": words(chunk=chunk, stop=stop, plan_steps_left=0)}
    if "x" in o.arrays:
        results["queue"] = np.clip(o["x"], -1, 1).reshape(o["queue"].shape)
    return results


def chunk_end(o: Operands) -> Results:
    H, A = o["queue"].shape
    x, mask = o["kept"][: H * A].reshape(H, A), o["kept"][H * A :]
    plan = flow_end(o)["cursor"]
    return {"queue": np.where(mask[:, None] != 0, x, o["chunk"]), "cursor": plan}


def ensemble(o: Operands) -> Results:
    """LeRobot's update: rows shift by one, counts with them."""
    chunk, average, counts = o["chunk"], o["average"].copy(), o["counts"].copy()
    cursor, H = o["cursor"].astype(int), len(o["chunk"])
    is_next = cursor[PolicyWord.CHUNK] == cursor[PolicyWord.PLAN_TICK] - 1
    new, new_counts = chunk.copy(), np.ones(H)
    for j in range(H - 1):
        c = int(counts[j + 1]) if is_next and 1 <= counts[j + 1] < H else 0
        if c:
            summed = average[j + 1] * o["sums"][c - 1] + chunk[j] * o["weights"][c]
            new[j], new_counts[j] = summed / o["sums"][c], c + 1
    return {"average": new, "counts": new_counts}


def flow_noise(o: Operands) -> Results:
    cursor, given = o["cursor"].astype(int), o["given"]
    seed = (int(cursor[PolicyWord.SEED_LOW]), int(cursor[PolicyWord.SEED_HIGH]))
    if o["request"][RequestWord.GIVEN]:
        return {"x": given}
    return {"x": normal(given.size, seed, int(cursor[PolicyWord.PLAN_TICK])).reshape(given.shape)}


def guide(o: Operands) -> Results:
    reached = o["x"] - o.attrs["time"] * o["v"]
    is_guided = o["weights"][:, None] != 0
    error = np.where(is_guided, o["target"] - reached, 0) * o["weights"][:, None]
    return {"v": o["v"] - o.attrs["strength"] * error}


def euler(o: Operands) -> Results:
    left = int(o["cursor"][PolicyWord.PLAN_STEPS_LEFT]) - 1
    return {"x": o["x"] + o.attrs["step"] * o["v"], "cursor": words(plan_steps_left=left)}


def take_action(o: Operands) -> Results:
    cursor = o["cursor"].astype(int)
    tick, stop = int(cursor[PolicyWord.TICK]), int(cursor[PolicyWord.STOP])
    row = tick - int(cursor[PolicyWord.CHUNK])
    has_action = tick < stop and 0 <= row < len(o["queue"])
    previous = o["queue"][row] if has_action else o["previous"]
    changed = words(tick=tick + 1)
    if not has_action:
        changed[PolicyWord.HELD] = cursor[PolicyWord.HELD] + 1
    action = previous * o["scale"] + o["offset"]
    return {"previous": previous, "action": action, "cursor": changed}


POLICY_REFERENCE: dict[str, Callable[[Operands], Results]] = {
    "observe": observe, "dense": dense, "dense_add": dense_add, "gru_cell": gru_cell,
    "flow_begin": flow_begin, "flow_step": flow_step, "flow_end": flow_end,
    "take_action": take_action, "chunk_begin": chunk_begin, "chunk_end": chunk_end,
    "ensemble": ensemble, "flow_noise": flow_noise, "guide": guide, "euler": euler,
}  # fmt: skip


@dataclass(slots=True)
class ReferencePolicy:
    """A whole policy on tensors by name; its verbs are those of ActionEngine."""

    config: PolicyConfig
    tensors: Mapping[str, NDArray[np.generic]]
    seed: int = 0
    memory: Array = field(init=False)
    previous: Array = field(init=False)
    queue: Array = field(init=False)
    encoded: Array = field(init=False)
    tick: int = 0
    observed: int = -1
    chunk: int = 0

    def __post_init__(self) -> None:
        c = self.config
        self.memory, self.encoded = np.zeros(c.memory_dim), np.zeros(c.encoder_dim)
        self.previous = np.zeros(c.action_dim)
        self.queue = np.zeros((c.chunk_size, c.action_dim))

    def layer(self, name: str, x: Array) -> Array:
        """weight x + bias."""
        bias = self.tensors.get(f"{name}.bias", np.zeros(1))
        return np.asarray(self.tensors[f"{name}.weight"], np.float64) @ x + bias

    def observe(self, observation: Array) -> None:
        """Encoder and memory."""
        t = self.tensors
        scaled = (observation - t["stats.observation.mean"]) / t["stats.observation.std"]
        e = np.concatenate([np.clip(scaled, -10, 10), self.previous])
        for name in ("encoder.0", "encoder.1"):
            e = silu(self.layer(name, e))
        u = np.asarray(t["memory.weight_ih"], np.float64) @ e + t["memory.bias_ih"]
        v = np.asarray(t["memory.weight_hh"], np.float64) @ self.memory + t["memory.bias_hh"]
        self.encoded, self.memory, self.observed = e, gru(u, v, self.memory), self.tick

    def velocity(self, x: Array, mask: Array, time: float, condition: Array) -> Array:
        """The head, at one time of the integration."""
        angles = 2 * np.pi * np.array([1, 2, 4, 8]) * time
        features = np.concatenate([np.sin(angles), np.cos(angles)])
        z = self.layer("head.input", np.concatenate([x.reshape(-1), mask]))
        z = silu(z + self.layer("head.time", features) + condition)
        for b in range(self.config.head_blocks):
            inner = silu(self.layer(f"head.blocks.{b}.0", z))
            z = z + self.layer(f"head.blocks.{b}.1", inner)
        return self.layer("head.output", z).reshape(x.shape)

    def plan(self, committed: int = 0) -> None:
        """A chunk from the last observation."""
        c, t = self.config, self.observed
        x = normal(self.queue.size, (self.seed & 0xFFFFFFFF, self.seed >> 32), t)
        x, mask = x.reshape(self.queue.shape), np.zeros(c.chunk_size)
        for j in range(committed):
            x[j] = self.previous if t + j < self.tick else self.queue[t + j - self.chunk]
            mask[j] = 1
        condition = self.layer("head.condition", np.concatenate([self.memory, self.encoded]))
        for step in range(c.num_inference_steps):
            v = self.velocity(x, mask, step / c.num_inference_steps, condition)
            x = np.where(mask[:, None] == 0, x + v / c.num_inference_steps, x)
        self.queue, self.chunk = np.clip(x, -1, 1), t

    def act(self) -> Array:
        """The coming tick's action."""
        self.previous = self.queue[self.tick - self.chunk]
        self.tick += 1
        t = self.tensors
        return np.asarray(self.previous * t["stats.action.scale"] + t["stats.action.offset"])
