"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844) as LeRobot has it: cameras, a task and a state.

IS: a policy of its config, its VLM and its weights. IS NOT: config fields (config), the VLM's files
(vlm), weights (weights), launches (tapes), or what is common to such policies (vla.policy).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from flashrt.base.errors import CheckpointError
from flashrt.core.region import DType, Region
from flashrt.models.actions import Stacks
from flashrt.models.lane import kv_regions
from flashrt.models.scaling import Scaling
from flashrt.models.smolvla.config import SmolVlaConfig, parse_config
from flashrt.models.smolvla.tapes import SmolVlaRecorder
from flashrt.models.smolvla.vlm import Vlm, tokenizer_file, vlm_of
from flashrt.models.smolvla.weights import Weights, named, scaling_of
from flashrt.models.vla.policy import Action, Vla, check_images
from flashrt.models.vla.reading import Words, reading_of
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.checkpoint import Checkpoint


class SmolVla(Vla):
    """Regions, weight rules and tapes of one policy. The state has a row of its own."""

    config: SmolVlaConfig
    positive = ("stats.observation.state.std",)

    def __init__(
        self,
        config: SmolVlaConfig,
        vlm: Vlm,
        scaling: Scaling,
        words: Words,
        checkpoint: Checkpoint,
        weights: str | None = None,
    ) -> None:
        """Raises CheckpointError for images that are normalised, or too small to be told apart."""
        self.filled = Weights(config, vlm, scaling, checkpoint, weights)
        tokens = self.filled.tower.tokens
        check_images(config.cameras, scaling, tokens)
        super().__init__(
            "smolvla",
            config,
            self.filled.rules,
            tokens,
            vlm.hidden,
            lambda positions: _kept(config, vlm, positions),
            lambda regions, tape: SmolVlaRecorder(self.filled, regions, tape),
            state_dim=config.state_dim,
        )
        self.vocab_size = vlm.vocab_size
        self.identity: Mapping[str, object] = dataclasses.asdict(config) | {
            "modes": {name: str(mode) for name, mode in scaling.modes.items()},
            "vlm": dataclasses.asdict(vlm),
        }
        self.scaling = scaling
        self.stacks: Stacks = {
            "language_model": {
                "num_hidden_layers": config.num_vlm_layers, "hidden_size": vlm.hidden,
                "intermediate_size": vlm.intermediate, **_heads(vlm), "vocab_size": vlm.vocab_size,
            },
            "expert": {
                "num_hidden_layers": config.num_expert_layers, "hidden_size": vlm.expert_hidden,
                "intermediate_size": vlm.expert_intermediate, **_heads(vlm),
            },
            "tower": self.filled.tower.sizes,
        }  # fmt: skip
        self._words = words

    def tokenizer(self) -> Tokenizer:
        """See PrefixModel."""
        return self._words.tokenizer()

    def task_tokens(self, task: str, state: Action) -> list[int]:
        """See PrefixModel."""
        del state  # it has a row of its own
        return self._words.tokens(self._words.reading.line(task))


def _heads(v: Vlm) -> dict[str, int]:
    return {
        "num_attention_heads": v.query_heads, "num_key_value_heads": v.kv_heads,
        "head_dim": v.head_dim,
    }  # fmt: skip


def _kept(c: SmolVlaConfig, v: Vlm, positions: int) -> list[Region]:
    """Keys and values of the VLM's layers, and of those of the expert that look at these alone."""
    layers = range(c.num_vlm_layers)
    crossed = sum(c.has_expert(i) and not c.sees_itself(i) for i in layers)
    shape = (positions, v.head_dim)
    kept = kv_regions("keys", "values", (c.num_vlm_layers * v.kv_heads, *shape), DType.F32)
    if crossed:
        kept += kv_regions("cross_keys", "cross_values", (crossed * v.kv_heads, *shape), DType.F32)
    return kept


def smolvla_of(checkpoint: Checkpoint, weights: str | None = None) -> tuple[SmolVla, Checkpoint]:
    """The model of a policy's checkpoint, and the checkpoint as its weight rules name it.
    `weights`: see flashrt.load. Raises CheckpointError; PlanError.
    """
    try:
        config = parse_config(checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    source, reading = named(checkpoint), reading_of(checkpoint.path)
    config = dataclasses.replace(config, tokenizer_max_length=reading.most)
    vlm = vlm_of(source, config)
    find = functools.partial(tokenizer_file, checkpoint.path, config, reading)
    words = Words(find, reading, vlm.vocab_size)
    model = SmolVla(config, vlm, scaling_of(source, config), words, source, weights)
    return model, model.filled.checkpoint
