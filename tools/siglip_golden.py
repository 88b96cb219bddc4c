"""Golden values of SigLIP towers: what transformers and LeRobot answer with the random weights and
images of tests/siglip_towers.

Run it where lerobot (0.4.4) and transformers (4.57) are; it writes tests/golden/siglip.json:

    python tools/siglip_golden.py

Pictures go through LeRobot's own resizing; of the first one the result is kept too. Places of
SmolVLM's patches are found as in bfloat16, which is how LeRobot runs it: in float32 transformers
4.57 moves them by one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lerobot.policies.pi05.modeling_pi05 import resize_with_pad_torch  # noqa: E402
from lerobot.policies.smolvla.modeling_smolvla import resize_with_pad  # noqa: E402

from flashrt.models.vla.siglip import SiglipConfig  # noqa: E402
from tests.siglip_towers import SETS, images_of, tensors_of  # noqa: E402

FILE = ROOT / "tests" / "golden" / "siglip.json"
SEED = 1  # of images


def prepared(name: str, image: np.ndarray[Any, Any], side: int) -> torch.Tensor:
    """[1, 3, side, side], as the policies hand it to the tower."""
    if name == "pi05":
        square = resize_with_pad_torch(torch.from_numpy(image)[None], side, side)
        return (square * 2.0 - 1.0).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    return resize_with_pad(pixels, side, side, pad_value=0) * 2.0 - 1.0


def sizes_of(c: SiglipConfig) -> dict[str, Any]:
    """As transformers names them."""
    return {
        "hidden_size": c.hidden, "intermediate_size": c.intermediate, "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads, "image_size": c.side, "patch_size": c.patch,
        "hidden_act": "gelu_pytorch_tanh", "attn_implementation": "eager",
    }  # fmt: skip


class RasterPositions(torch.nn.Module):
    """Each patch at its own place, whatever places are asked for."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.weight[None].expand(len(places), *self.weight.shape)


class Seen(torch.nn.Module):
    """A tower and the projection behind it."""

    def __init__(self, name: str, c: SiglipConfig) -> None:
        super().__init__()
        self.tower: Any
        if name == "pi05":
            config = transformers.SiglipVisionConfig(**sizes_of(c), vision_use_head=False)
            self.tower = SiglipVisionModel(config).vision_model
            self.projection = torch.nn.Linear(c.hidden, c.out)
            self.connector = None
        else:
            vision = SmolVLMVisionConfig(**sizes_of(c))
            self.tower = SmolVLMVisionTransformer(vision)
            text = transformers.LlamaConfig(hidden_size=c.out, num_attention_heads=1)
            both = transformers.SmolVLMConfig(
                vision_config=vision.to_dict(), text_config=text.to_dict(), scale_factor=c.group
            )
            self.connector = SmolVLMConnector(both)
            self.projection = self.connector.modality_projection.proj
        self.load(c)

    def load(self, c: SiglipConfig) -> None:
        """The tensors of the set."""
        drawn = {n: torch.from_numpy(t) for n, t in tensors_of(c, 7).items()}
        for module, prefix in ((self.tower, c.tower), (self.projection, c.projection)):
            own = {n[len(prefix) + 1 :]: t for n, t in drawn.items() if n.startswith(f"{prefix}.")}
            module.load_state_dict(own)
        if self.connector is not None:
            embeddings = self.tower.embeddings
            embeddings.position_embedding = RasterPositions(embeddings.position_embedding.weight)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings."""
        hidden = self.tower(pixels).last_hidden_state
        return self.connector(hidden) if self.connector is not None else self.projection(hidden)


def rounded(x: torch.Tensor) -> Any:
    """Lists of numbers, to less than a rounding of float32 near 1."""
    return np.round(x.numpy().astype(np.float64), 7).tolist()


@torch.no_grad()
def main() -> None:
    """All sets."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, made in SETS.items():
        model = Seen(name, made.config).eval()
        squares = [prepared(name, x, made.config.side) for x in images_of(made, SEED)]
        found[name] = {
            "seen": [rounded(model(x)[0]) for x in squares],
            "square": rounded(squares[0][0].permute(1, 2, 0)),
        }
    FILE.write_text(json.dumps(found) + "\n")
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main()
