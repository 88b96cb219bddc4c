"""pi0.5 (Physical Intelligence 2025, arXiv 2504.16054) as LeRobot has it: cameras, a task, a state.

IS: a policy of its config, its sizes and its weights. IS NOT: config fields (config), sizes
(sizes), weights (weights), text (text), launches (tapes), or what is common to such policies
(vla.policy).

The state is part of the text, so all of a plan's rows are one block, and another state makes the
block anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from flashrt.base.errors import CheckpointError
from flashrt.core.region import DType
from flashrt.models.actions import Stacks
from flashrt.models.lane import kv_regions
from flashrt.models.pi05.config import Pi05Config, parse_config
from flashrt.models.pi05.sizes import named, sizes_of
from flashrt.models.pi05.tapes import Pi05Recorder
from flashrt.models.pi05.text import Text, tokenizer_file
from flashrt.models.pi05.weights import Weights, scaling_of
from flashrt.models.vla.policy import Action, Vla, check_images
from flashrt.models.vla.reading import Words, reading_of
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.checkpoint import Checkpoint


class Pi05(Vla):
    """Regions, weight rules and tapes of one policy."""

    config: Pi05Config
    positive = ()

    def __init__(self, config: Pi05Config, filled: Weights, text: Text, words: Words) -> None:
        """Raises CheckpointError for images that are normalised, or that do not fit the tower."""
        sizes, tokens = filled.sizes, filled.tower.tokens
        if config.side % sizes.patch:
            raise CheckpointError(
                f"image_resolution {config.side} is no multiple of the tower's patches of "
                f"{sizes.patch} pixels"
            )
        check_images(config.cameras, filled.scaling, tokens)
        super().__init__(
            "pi05",
            config,
            filled.rules,
            tokens,
            sizes.hidden,
            lambda positions: kv_regions(
                "keys", "values", (sizes.depth * sizes.kv_heads, positions, sizes.head_dim),
                DType.F32,
            ),
            lambda regions, tape: Pi05Recorder(filled, regions, tape),
        )  # fmt: skip
        self.filled = filled
        self.vocab_size = sizes.vocab_size
        self.identity: Mapping[str, object] = dataclasses.asdict(config) | {
            "modes": {name: str(mode) for name, mode in filled.scaling.modes.items()},
            "sizes": dataclasses.asdict(sizes),
        }
        self.scaling = filled.scaling
        heads = {
            "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
        }  # fmt: skip
        self.stacks: Stacks = {
            "language_model": {
                "num_hidden_layers": sizes.depth, "hidden_size": sizes.hidden,
                "intermediate_size": sizes.intermediate, **heads, "vocab_size": sizes.vocab_size,
            },
            "expert": {
                "num_hidden_layers": sizes.depth, "hidden_size": sizes.expert_hidden,
                "intermediate_size": sizes.expert_intermediate, **heads,
            },
            "tower": filled.tower.sizes,
        }  # fmt: skip
        self._text, self._words = text, words

    def tokenizer(self) -> Tokenizer:
        """See PrefixModel."""
        return self._words.tokenizer()

    def task_tokens(self, task: str, state: Action) -> list[int]:
        """See PrefixModel."""
        return self._words.tokens(self._text.of(task, state))


def pi05_of(checkpoint: Checkpoint, weights: str | None = None) -> tuple[Pi05, Checkpoint]:
    """The model of a policy's checkpoint, and the checkpoint as its weight rules name it.
    `weights`: see flashrt.load. Raises CheckpointError; PlanError.
    """
    try:
        config = parse_config(checkpoint.config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    root, source, reading = checkpoint.path, named(checkpoint), reading_of(checkpoint.path)
    config = dataclasses.replace(config, tokenizer_max_length=reading.most)
    filled = Weights(config, sizes_of(source), scaling_of(source, config), source, weights)
    find = functools.partial(tokenizer_file, root, reading.name)
    words = Words(find, reading, filled.sizes.vocab_size)
    return Pi05(config, filled, Text(root, filled), words), filled.checkpoint
