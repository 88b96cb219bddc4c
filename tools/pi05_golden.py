"""Golden sets of pi0.5: what LeRobot's policy answers with the random weights of
tests/pi05_policies.

Run it where lerobot (0.4.4) and transformers (4.57) are; it writes tests/golden/pi05, a kilobyte
or two per set:

    python tools/pi05_golden.py

LeRobot wants a transformers of its own, whose Gemma has adaptive norms. `Gemma` below stands in for
it, in the arithmetic that pi0.5 defines: dense(condition) is scale, shift and gate; a norm is
x / rms(x) * (1 + scale) + shift; a sublayer adds gate * its output. Neither embeddings nor image
features are scaled but where the policy does it. Everything else is LeRobot's: resizing, the text
of a state, the tower, the order of rows, masks, positions, time embedding, Euler steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lerobot.configs.policies import PreTrainedConfig  # noqa: E402
from lerobot.policies.pi05 import (  # noqa: E402
    modeling_pi05,
    processor_pi05,  # noqa: F401  (registers a step)
)
from lerobot.processor import PolicyProcessorPipeline  # noqa: E402
from lerobot.processor.converters import (  # noqa: E402
    policy_action_to_transition,
    transition_to_policy_action,
)

from tests.pi05_policies import (  # noqa: E402
    SETS,
    Sizes,
    left_over_of,
    noise_of,
    observation_of,
    tensors_of,
    write_random_pi05,
)

FOLDER = ROOT / "tests" / "golden" / "pi05"
OBSERVATIONS = (11, 12, 13)  # their seeds
GUIDES = ((9, 2, None), (5, 1, 4))  # rows of the chunk before, delay, horizon
EPS, ROPE_BASE = 1e-6, 10000.0


class Norm(nn.Module):
    """An RMS norm with weights, or of a condition."""

    def __init__(self, size: int, *, is_adaptive: bool) -> None:
        super().__init__()
        if is_adaptive:
            self.dense = nn.Linear(size, 3 * size)
        else:
            self.weight = nn.Parameter(torch.zeros(size))

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm, and what the sublayer behind it is multiplied by."""
        unit = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        if condition is None:
            return unit * (1 + self.weight), torch.ones(())
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        return unit * (1 + scale) + shift, gate


class Gemma(nn.Module):
    """Layers of Gemma over embeddings, before or behind rows whose keys and values are given."""

    def __init__(self, s: Sizes, *, is_expert: bool) -> None:
        super().__init__()
        self.head_dim = s.head_dim
        hidden = s.expert_hidden if is_expert else s.hidden
        wide = s.expert_intermediate if is_expert else s.intermediate
        inner, one = s.heads * s.head_dim, s.head_dim
        self.layers = nn.ModuleList()
        for _ in range(s.depth):
            layer = nn.Module()
            layer.input_layernorm = Norm(hidden, is_adaptive=is_expert)
            layer.post_attention_layernorm = Norm(hidden, is_adaptive=is_expert)
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            for name, rows in (("q", inner), ("k", one), ("v", one)):
                setattr(layer.self_attn, f"{name}_proj", nn.Linear(hidden, rows, bias=False))
            layer.self_attn.o_proj = nn.Linear(inner, hidden, bias=False)
            layer.mlp.gate_proj = nn.Linear(hidden, wide, bias=False)
            layer.mlp.up_proj = nn.Linear(hidden, wide, bias=False)
            layer.mlp.down_proj = nn.Linear(wide, hidden, bias=False)
            self.layers.append(layer)
        self.norm = Norm(hidden, is_adaptive=is_expert)
        self.embed_tokens: nn.Embedding | None = None
        self.config = types.SimpleNamespace(use_adarms=is_expert)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None,
        use_cache: bool,
        adarms_cond: torch.Tensor | None,
    ) -> Any:
        """As LeRobot calls it."""
        x, kept = inputs_embeds, []
        places = position_ids[:, None, :, None].float()
        frequencies = ROPE_BASE ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        cosine, sine = torch.cos(places * frequencies), torch.sin(places * frequencies)

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def turned(rows: torch.Tensor) -> torch.Tensor:
            low, high = rows.chunk(2, dim=-1)
            return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)

        for i, layer in enumerate(self.layers):
            h, gate = layer.input_layernorm(x, adarms_cond)
            mixer = layer.self_attn
            q, k, v = (heads(getattr(mixer, f"{name}_proj")(h)) for name in "qkv")
            q, k = turned(q), turned(k)
            if past_key_values is not None:
                before, own = past_key_values[i], (k, v)
                k, v = (torch.cat(pair, dim=2) for pair in zip(before, own, strict=True))
            kept.append((k, v))
            scores = q @ k.transpose(2, 3) / self.head_dim**0.5 + attention_mask
            mixed = scores.softmax(-1) @ v
            x = x + gate * mixer.o_proj(mixed.transpose(1, 2).flatten(2))
            h, gate = layer.post_attention_layernorm(x, adarms_cond)
            inner = nn.functional.gelu(layer.mlp.gate_proj(h), approximate="tanh")
            x = x + gate * layer.mlp.down_proj(inner * layer.mlp.up_proj(h))
        x, _ = self.norm(x, adarms_cond)
        return types.SimpleNamespace(
            last_hidden_state=x, past_key_values=kept if use_cache else None
        )


class PaliGemma(nn.Module):
    """Tower, projection and language model, under the names of transformers."""

    def __init__(self, s: Sizes, side: int, vocabulary: int) -> None:
        super().__init__()
        vision = transformers.SiglipVisionConfig(
            hidden_size=s.vision_hidden, intermediate_size=s.vision_intermediate,
            num_hidden_layers=s.vision_depth, num_attention_heads=s.vision_hidden // 72,
            image_size=side, patch_size=s.patch, hidden_act="gelu_pytorch_tanh",
            vision_use_head=False, attn_implementation="eager",
        )  # fmt: skip
        self.model = nn.Module()
        self.model.vision_tower = transformers.SiglipVisionModel(vision)
        self.model.multi_modal_projector = nn.Module()
        self.model.multi_modal_projector.linear = nn.Linear(s.vision_hidden, s.hidden)
        self.model.language_model = Gemma(s, is_expert=False)
        self.model.language_model.embed_tokens = nn.Embedding(vocabulary, s.hidden)
        self.model.get_image_features = self._image_features

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.model.vision_tower(pixels).last_hidden_state
        return self.model.multi_modal_projector.linear(hidden)

    @property
    def language_model(self) -> nn.Module:
        """As transformers has it."""
        return self.model.language_model

    @property
    def vision_tower(self) -> nn.Module:
        """As transformers has it."""
        return self.model.vision_tower


def policy_of(name: str, folder: Path) -> Any:
    """LeRobot's policy over the stand-in, with the tensors of a set."""
    _, s, _ = SETS[name]
    tensors = {n: torch.from_numpy(t) for n, t in tensors_of(name).items()}
    table = tensors.pop("model.paligemma_with_expert.paligemma.lm_head.weight")
    tensors.pop("model.paligemma_with_expert.gemma_expert.lm_head.weight")
    at = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    tensors[at] = table
    expert = nn.Module()
    expert.model = Gemma(s, is_expert=True)
    modeling_pi05.get_gemma_config = lambda variant: modeling_pi05.GemmaConfig(
        s.expert_hidden if variant == "gemma_300m" else s.hidden, s.depth, 1, s.heads, 1, s.head_dim
    )
    modeling_pi05.PaliGemmaForConditionalGeneration = lambda config: PaliGemma(
        s, config.vision_config.image_size, len(table)
    )
    modeling_pi05.GemmaForCausalLM = lambda config: expert
    check = types.ModuleType("check")
    check.check_whether_transformers_replace_is_installed_correctly = lambda: True
    sys.modules["transformers.models.siglip.check"] = check
    transformers.models.siglip.check = check
    policy = modeling_pi05.PI05Policy(PreTrainedConfig.from_pretrained(folder)).eval()
    policy.load_state_dict(tensors)
    return policy


def batch_of(seen: dict[str, Any]) -> dict[str, Any]:
    """Images as float, channels first."""
    batch: dict[str, Any] = {"task": seen["task"]}
    for name, values in seen.items():
        if name.startswith("observation.images"):
            image = torch.from_numpy(values).float() / 255
            batch[name] = image.permute(2, 0, 1)
        elif name != "task":
            batch[name] = torch.from_numpy(values)
    return batch


@torch.no_grad()
def write(name: str, folder: Path) -> None:
    """One set."""
    write_random_pi05(name, folder)
    policy = policy_of(name, folder)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", padding_side="right"
    )
    before = PolicyProcessorPipeline.from_pretrained(
        folder, "policy_preprocessor.json",
        overrides={"tokenizer_processor": {"tokenizer": words, "tokenizer_name": None}},
    )  # fmt: skip
    after = PolicyProcessorPipeline.from_pretrained(
        folder, "policy_postprocessor.json", to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )  # fmt: skip
    batches = [before(batch_of(observation_of(name, seed))) for seed in OBSERVATIONS]

    def chunk(i: int, lost: str = "", **guided: Any) -> list[list[float]]:
        noise = torch.from_numpy(noise_of(name, OBSERVATIONS[i]))[None]
        batch = {n: values for n, values in batches[i].items() if n != lost}
        made = after(policy.predict_action_chunk(batch, noise=noise, **guided))
        return np.round(made[0].double().numpy(), 7).tolist()

    tokens = [
        batch["observation.language.tokens"][0][
            batch["observation.language.attention_mask"][0].bool()
        ].tolist()
        for batch in batches
    ]
    chunks, guided = [chunk(i) for i in range(len(batches))], []
    for rows, delay, horizon in GUIDES if SETS[name][0]["rtc_config"] else ():
        left = torch.from_numpy(left_over_of(name, rows))[None]
        asked = {"inference_delay": delay, "execution_horizon": horizon}
        made = chunk(0, prev_chunk_left_over=left, **asked)
        guided.append({"rows": rows, "delay": delay, "horizon": horizon, "chunk": made})
    cameras = [n for n in SETS[name][0]["input_features"] if "images" in n]
    found = {
        "observations": OBSERVATIONS, "tokens": tokens, "chunks": chunks, "guided": guided,
        "without": {n: chunk(0, n) for n in cameras if len(cameras) == 2},
    }  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found) + "\n")
    print(name, "chunks of std", np.std(chunks, (1, 2)), "tokens", [len(t) for t in tokens])


if __name__ == "__main__":
    for chosen in sys.argv[1:] or SETS:
        with tempfile.TemporaryDirectory() as made:
            write(chosen, Path(made))
