"""Golden sets of SmolVLA: what LeRobot's policy answers with the weights of tests/smolvla_policies.

Run it where lerobot (0.4.4), transformers (4.57) and torch are; it writes tests/golden/smolvla:

    python tools/smolvla_golden.py

A set is a JSON file: of each of three observations the tokens, and the chunk after the
postprocessor for fixed noise; of a set with real-time chunking, chunks that one before guides.
LeRobot runs in float32; patches of the tower stand where they do in bfloat16 in sets that begin
from the VLM's weights, as released policies do (see models/vla/siglip).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor
from transformers.models.smolvlm import modeling_smolvlm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lerobot.configs.policies import PreTrainedConfig  # noqa: E402
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy  # noqa: E402
from lerobot.processor import PolicyProcessorPipeline  # noqa: E402
from lerobot.processor.converters import (  # noqa: E402
    policy_action_to_transition,
    transition_to_policy_action,
)

from tests.smolvla_policies import (  # noqa: E402
    SETS,
    SPECIAL,
    left_over_of,
    noise_of,
    observation_of,
    write_random_smolvla,
)

OBSERVATIONS = (11, 12, 13)  # their seeds, and those of noise
# Rows left over of the chunk before, inference_delay and execution_horizon.
GUIDED = ((8, 2, None), (10, 0, 4), (3, 5, 9))


class RasterPositions(torch.nn.Module):
    """Each patch at its own place, whatever places are asked for."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.weight[None].expand(len(places), *self.weight.shape)


def add_vlm_files(folder: Path, vlm: dict[str, Any]) -> None:
    """What transformers wants beside the files that flashrt reads."""
    fake, image, whole, end = SPECIAL[3:]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=SPECIAL[1], pad_token=SPECIAL[1],
        unk_token=SPECIAL[2], bos_token=SPECIAL[0], additional_special_tokens=list(SPECIAL[3:]),
        extra_special_tokens={
            "fake_image_token": fake, "image_token": image, "global_image_token": whole,
            "end_of_utterance_token": end,
        },
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    SmolVLMImageProcessor().save_pretrained(folder)
    sizes, scale = vlm["vision_config"], vlm["scale_factor"]
    length = (sizes["image_size"] // sizes["patch_size"] // scale) ** 2
    text = json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": length})
    (folder / "processor_config.json").write_text(text)


def loaded(folder: Path, vlm: dict[str, Any]) -> tuple[SmolVLAPolicy, Any, Any]:
    """Policy, preprocessor and postprocessor; the VLM's weights are the policy's."""
    add_vlm_files(folder / "vlm", vlm)
    config = PreTrainedConfig.from_pretrained(folder)
    is_raster, config.load_vlm_weights = config.load_vlm_weights, False
    policy = SmolVLAPolicy.from_pretrained(folder, config=config, strict=True).float().eval()
    if is_raster:
        for module in policy.modules():
            if isinstance(module, modeling_smolvlm.SmolVLMVisionEmbeddings):
                module.position_embedding = RasterPositions(module.position_embedding.weight)
    before = PolicyProcessorPipeline.from_pretrained(folder, "policy_preprocessor.json")
    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        "policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return policy, before, after


def as_lerobot(observation: dict[str, Any]) -> dict[str, Any]:
    """Images as float, channels first."""
    batch = {}
    for name, values in observation.items():
        if isinstance(values, str):
            batch[name] = values
        elif values.dtype.kind == "u":
            pixels = torch.from_numpy(values).type(torch.float32) / 255
            batch[name] = pixels.permute(2, 0, 1).contiguous()
        else:
            batch[name] = torch.from_numpy(values)
    return batch


@torch.no_grad()
def golden(name: str) -> dict[str, Any]:
    """A set."""
    config, vlm, seed = SETS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy, before, after = loaded(write_random_smolvla(folder, config, vlm, seed), vlm)
        chunks, tokens, guided = [], [], []

        def chunk(number: int, **rest: Any) -> list[list[float]]:
            batch = before(as_lerobot(observation_of(config, number)))
            mask = batch["observation.language.attention_mask"][0].bool()
            tokens.append(batch["observation.language.tokens"][0][mask].tolist())
            noise = torch.from_numpy(noise_of(config, number))[None]
            actions = policy.predict_action_chunk(batch, noise=noise, **rest)
            return np.round(after(actions)[0].double().numpy(), 6).tolist()

        for number in OBSERVATIONS:
            chunks.append(chunk(number))
        if config.get("rtc_config"):
            for most, delay, horizon in GUIDED:
                rows = min(most, config["chunk_size"])
                left = torch.from_numpy(left_over_of(config, rows, seed))[None]
                asked = {"inference_delay": delay, "execution_horizon": horizon}
                made = chunk(11, prev_chunk_left_over=left, **asked)
                guided.append({"rows": rows, "delay": delay, "horizon": horizon, "chunk": made})
    return {
        "observations": OBSERVATIONS, "tokens": tokens[: len(chunks)],
        "chunks": chunks, "guided": guided,
    }  # fmt: skip


def main() -> None:
    """Write all sets."""
    folder = ROOT / "tests" / "golden" / "smolvla"
    folder.mkdir(exist_ok=True)
    for name in SETS:
        (folder / f"{name}.json").write_text(json.dumps(golden(name)) + "\n")
        print(name, (folder / f"{name}.json").stat().st_size)


if __name__ == "__main__":
    main()
