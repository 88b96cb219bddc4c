"""Golden sets of ACT: what LeRobot's policy answers with the random weights of tests/act_policies.

Run it where lerobot (0.4.4), torch and torchvision are; it writes tests/golden/act, some kilobytes
per set:

    python tools/act_golden.py

A set is a JSON file: names and shapes of the tensors, so that tests can draw the same weights, and
after the postprocessor the chunk for each of three observations, and the actions of an episode.
Images go in as LeRobot has them from a camera: uint8, then divided by 255, then channels first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
try:
    import torchvision  # noqa: F401
except (ImportError, OSError, RuntimeError):  # its own operators may be built for another torch
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.configs.policies import PreTrainedConfig  # noqa: E402
from lerobot.policies.act.configuration_act import ACTConfig  # noqa: E402, F401  (registers it)
from lerobot.policies.act.modeling_act import ACTPolicy  # noqa: E402
from lerobot.processor import PolicyProcessorPipeline  # noqa: E402
from lerobot.processor.converters import (  # noqa: E402
    policy_action_to_transition,
    transition_to_policy_action,
)

from tests.act_policies import SETS, observation_of, write_random_act  # noqa: E402

OBSERVATIONS = (11, 12, 13)  # their seeds
TICKS = tuple(range(20, 34))  # those of an episode, action by action


def loaded(folder: Path) -> tuple[ACTPolicy, Any, Any]:
    """Policy, preprocessor and postprocessor, as LeRobot's `make_pre_post_processors` has them."""
    policy = ACTPolicy.from_pretrained(folder).eval()
    before = PolicyProcessorPipeline.from_pretrained(folder, "policy_preprocessor.json")
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        "policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return policy, before, after


def as_lerobot(observation: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Images as float, channels first."""
    batch = {}
    for name, values in observation.items():
        tensor = torch.from_numpy(values)
        if values.dtype.kind == "u":
            tensor = (tensor.type(torch.float32) / 255).permute(2, 0, 1).contiguous()
        batch[name] = tensor
    return batch


def tensors_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a policy's weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        policy = ACTPolicy(PreTrainedConfig.from_pretrained(folder))
    return {name: list(value.shape) for name, value in policy.state_dict().items()}


@torch.no_grad()
def golden(name: str) -> dict[str, Any]:
    """A set."""
    config, seed = SETS[name]
    tensors = tensors_of(config)
    chunks = []
    with tempfile.TemporaryDirectory() as folder:
        policy, before, after = loaded(write_random_act(folder, config, tensors, seed))
        for number in OBSERVATIONS:
            batch = before(as_lerobot(observation_of(config, number)))
            # LeRobot asks for the state's device where a policy has no state, too.
            batch.setdefault("observation.state", torch.zeros(1, 1))
            chunks.append(after(policy.predict_action_chunk(batch))[0].double().tolist())
        policy.reset()
        actions = []
        for number in TICKS:
            batch = before(as_lerobot(observation_of(config, number)))
            batch.setdefault("observation.state", torch.zeros(1, 1))
            actions.append(after(policy.select_action(batch))[0].double().tolist())
    return {
        "tensors": tensors, "observations": OBSERVATIONS, "chunks": chunks, "ticks": TICKS,
        "actions": actions,
    }  # fmt: skip


def main() -> None:
    """Write all sets."""
    folder = ROOT / "tests" / "golden" / "act"
    folder.mkdir(exist_ok=True)
    for name in SETS:
        (folder / f"{name}.json").write_text(json.dumps(golden(name)) + "\n")
        print(name, (folder / f"{name}.json").stat().st_size)


if __name__ == "__main__":
    main()
