"""Released sizes: the sum of all weights is the number of parameters that is published.

Figures of LFM2 and Granite are those of their config.json; of LFM2.5-230M the layers are, and its
MLP's size follows from the sum. Those of Nemotron are NVIDIA's Megatron-Bridge's. Parameters are
the model cards', or what the hub counts; of three models the cards say no more than 4B, 47B, 56B.
"""

from __future__ import annotations

import pytest

from flashrt.models import model_for
from flashrt.models.released import RELEASED

PARAMETERS = {  # in millions, and how far off the published figure may be by its own rounding
    "lfm2.5-230m": (230, 0.5), "lfm2-350m": (354.5, 0.1), "lfm2-700m": (742.5, 0.1),
    "lfm2-1.2b": (1170.3, 0.1), "lfm2-2.6b": (2569.3, 0.1), "granite-4.0-h-350m": (340, 0.5),
    "granite-4.0-h-1b": (1500, 50), "granite-4.0-h-micro": (3200, 50),
    "lfm2-8b-a1b": (8340, 5), "granite-4.0-h-tiny": (6939, 1),
    "granite-4.0-h-small": (32200, 50), "qwen3-next-80b-a3b": (79700, 50),
    "nemotron-h-4b": (4500, 50), "nemotron-h-8b": (8100.852736, 1e-6),
    "nemotron-h-47b": (47000, 500), "nemotron-h-56b": (56300, 500),
    "nemotron-nano-9b-v2": (8890, 5), "nemotron-nano-12b-v2": (12310, 5),
    "nemotron-3-nano-4b": (3973.6, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_sum_of_all_weights(name: str) -> None:
    """Red when a size, a number of layers or a weight is not the released model's."""
    model = model_for(RELEASED[name], max_positions=64)
    millions, apart = PARAMETERS[name]
    found = sum(s.size for rule in model.weights for s in rule.sources) / 1e6
    assert found == pytest.approx(millions, abs=apart)


def test_layers_of_nemotron() -> None:
    """By the models' cards: red when a pattern was cut or pasted wrong."""
    counts = {
        name.removeprefix("nemotron-"): tuple(str(pattern).count(x) for x in "M*-")
        for name, config in RELEASED.items()
        if (pattern := config.get("hybrid_override_pattern")) is not None
    }
    assert counts == {
        "h-4b": (24, 4, 24), "h-8b": (24, 4, 24), "h-47b": (45, 5, 48), "h-56b": (54, 10, 54),
        "nano-9b-v2": (27, 4, 25), "nano-12b-v2": (28, 6, 28), "3-nano-4b": (21, 4, 17),
    }  # fmt: skip
