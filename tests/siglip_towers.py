"""Small SigLIP towers of random weights, for tests and for the tool that records golden values.

IS: configs, tensors and images as functions of a seed, and a model that is a tower alone. IS NOT:
expected values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flashrt.core.backend import Backend
from flashrt.core.region import DType, Region, Role
from flashrt.core.runs import Run
from flashrt.core.tape import Tape
from flashrt.engine.engine import Engine, PoolDefault
from flashrt.models.vla.siglip import (
    Fit,
    SiglipConfig,
    SiglipRecorder,
    as_matrices,
    fitted_low,
    fitted_middle,
    rules,
)
from flashrt.ops.table import CURSOR_WORDS
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.rules import as_stored

Array = NDArray[np.float32]
SEE = "see"


@dataclass(frozen=True, slots=True)
class TowerSet:
    """A tower, how images are put before it, and the sizes (height, width) of its cameras."""

    config: SiglipConfig
    fit: Callable[[int, int, int], Fit]
    cameras: tuple[tuple[int, int], ...]

    @property
    def fits(self) -> list[Fit]:
        """Of each camera."""
        return [self.fit(*size, self.config.side) for size in self.cameras]


SETS = {
    "smolvla": TowerSet(
        SiglipConfig(
            side=24, patch=4, hidden=24, depth=2, heads=2, intermediate=40, out=20, group=2,
            tower="model.vlm_with_expert.vlm.model.vision_model", is_biased=False,
            projection="model.vlm_with_expert.vlm.model.connector.modality_projection.proj",
        ),
        fitted_low,
        ((30, 20), (9, 47), (24, 24)),
    ),
    "pi05": TowerSet(
        SiglipConfig(
            side=20, patch=5, hidden=36, depth=3, heads=3, intermediate=56, out=16, group=1,
            tower="paligemma_with_expert.paligemma.model.vision_tower.vision_model",
            projection="paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
            is_biased=True,
        ),
        fitted_middle,
        ((33, 48), (15, 11)),
    ),
}  # fmt: skip


def tensors_of(c: SiglipConfig, seed: int) -> dict[str, Array]:
    """Every tensor, each sublayer of the size of its input."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        f"{c.tower}.embeddings.patch_embedding.weight": (c.hidden, 3, c.patch, c.patch),
        f"{c.tower}.embeddings.patch_embedding.bias": (c.hidden,),
        f"{c.tower}.embeddings.position_embedding.weight": (c.patches, c.hidden),
        f"{c.tower}.post_layernorm.weight": (c.hidden,),
        f"{c.tower}.post_layernorm.bias": (c.hidden,),
        f"{c.projection}.weight": (c.out, c.group**2 * c.hidden),
    }
    if c.is_biased:
        shapes[f"{c.projection}.bias"] = (c.out,)
    products = {f"self_attn.{n}_proj": (c.hidden, c.hidden) for n in ("q", "k", "v", "out")}
    products |= {"mlp.fc1": (c.intermediate, c.hidden), "mlp.fc2": (c.hidden, c.intermediate)}
    norms = {"layer_norm1": (c.hidden,), "layer_norm2": (c.hidden,)}
    for i in range(c.depth):
        for name, shape in (products | norms).items():
            shapes[f"{c.tower}.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{c.tower}.encoder.layers.{i}.{name}.bias"] = shape[:1]
    return {name: _drawn(rng, name, shape) for name, shape in shapes.items()}


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    x = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return np.float32(0.3) * x
    if len(shape) == 1:
        return 1 + np.float32(0.2) * x
    if "position" in name:
        return np.float32(0.7) * x
    return np.float32(1.5 / math.sqrt(math.prod(shape[1:]))) * x


def images_of(made: TowerSet, seed: int) -> list[Array]:
    """An image per camera, [H, W, 3] in 0 .. 1."""
    rng = np.random.default_rng(seed)
    return [rng.random((*size, 3), np.float32) for size in made.cameras]


class TowerModel:
    """A tower alone: the phase `see`, whose rows are how many of the cameras look."""

    name = "tower"

    def __init__(self, made: TowerSet, checkpoint: Checkpoint) -> None:
        self.made = made
        self.identity: Mapping[str, object] = {}
        self.weights = as_stored(rules(made.config), checkpoint.stored)
        n, c = len(made.cameras), made.config
        images = [
            Region(f"image.{i}", (*size, 3), DType.F32, Role.IO)
            for i, size in enumerate(made.cameras)
        ]
        self.lane_regions = (
            Region("cursor", (CURSOR_WORDS,), DType.I32, Role.FIXED),
            *images,
            Region("seen", (n * c.tokens, c.out), DType.F32, Role.IO),
        )
        self.phases = tuple((SEE, i + 1) for i in range(n))
        self._regions = {r.name: r for r in self.lane_regions}
        self._regions |= {rule.region.name: rule.region for rule in self.weights}

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model."""
        del lanes
        return ()

    def record(self, phase: str, rows: int) -> Tape:
        """See Model."""
        tape, seen = Tape(phase, rows), self._regions["seen"]
        images = [self._regions[f"image.{i}"] for i in range(rows)]
        out = seen.span(0, rows * self.made.config.tokens)
        recorder = SiglipRecorder(self.made.config, self._regions, tape)
        recorder.see(images, self.made.fits[:rows], out)
        return tape


class TowerEngine(Engine):
    """A tower on a device."""

    model: TowerModel

    @classmethod
    def of(cls, name: str, folder: Path, backend: Backend, **options: Any) -> TowerEngine:
        """The set of a name, its weights written to a folder in float32."""
        made = SETS[name]
        save_file(tensors_of(made.config, 7), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        checkpoint = as_matrices(open_checkpoint(folder), made.config)
        model = TowerModel(made, checkpoint)
        none = PoolDefault(fixed=0)
        return cls(model, checkpoint, backend, pool_default=none, **options)

    def see(self, images: list[Array]) -> Array:
        """Embeddings of the first cameras: [cameras, tokens, columns]."""
        lane = self.lanes[0]
        for i, image in enumerate(images):
            self.set_lane_array(lane, f"image.{i}", image)
        self.replay(SEE, len(images), (Run(0, 1),))
        seen = self.lane_array(lane, "seen").astype(np.float32)
        shape = (len(self.model.made.cameras), self.model.made.config.tokens, -1)
        return seen.reshape(shape)[: len(images)]
