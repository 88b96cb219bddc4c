"""Tapes of SmolVLA: an image's rows, the instruction's and the state's, and Euler steps over them.

IS: the order of launches; formulas as in LeRobot's smolvlm_with_expert. IS NOT: the blocks
themselves (models/blocks), the tower (vla.siglip), or the regions of a lane (model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from flashrt.core.region import Region, View
from flashrt.core.tape import Tape
from flashrt.models.blocks import INV_FREQ, BlockRecorder, bias_name
from flashrt.models.features import STATE
from flashrt.models.prefix import SPANS, Span
from flashrt.models.scaling import shift_of
from flashrt.models.smolvla.config import SmolVlaConfig
from flashrt.models.smolvla.vlm import Vlm
from flashrt.models.smolvla.weights import (
    ACTION_IN,
    ACTION_MID,
    ACTION_OUT,
    EMBED,
    EXPERT_NORM,
    STATE_IN,
    TIMES,
    Weights,
)
from flashrt.models.vla.policy import VlaRecorder
from flashrt.models.vla.siglip import SiglipRecorder, fitted_low
from flashrt.ops import table as ops


class SmolVlaRecorder(VlaRecorder):
    """Records the launches of one tape."""

    config: SmolVlaConfig

    def __init__(self, filled: Weights, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(filled.config, regions, tape)
        self.filled = filled
        self.vlm: Vlm = filled.vlm
        self.blocks = BlockRecorder(regions, tape, filled.vlm.eps)

    # -- what a plan stands on ---------------------------------------------------------------------

    def look(self, camera: int) -> None:
        """What the tower makes of an image, among the rows of all cameras."""
        image, tower = self.config.cameras[camera], self.filled.tower
        out = self.regions["made"].span(camera * tower.tokens, tower.tokens)
        SiglipRecorder(tower, self.regions, self.tape).see(
            [self.regions[f"images.{camera}"]],
            [fitted_low(image.height, image.width, tower.side)],
            out,
        )

    def read(self) -> None:
        """Rows of images and of the instruction, which all see each other."""
        rows, blocks = self.tape.rows, self.blocks
        blocks.cursor = self.regions[SPANS].at(Span.BLOCK)
        x = blocks.scratch("x", self.vlm.hidden)
        blocks.launch(
            ops.EMBED_SEEN, tokens=self.regions["words"].view().cols(0, rows),
            table=self.regions[EMBED], seen=self.regions["seen"], x=x,
            journal=self.regions["journal"],
        )  # fmt: skip
        factor = float(np.float32(math.sqrt(self.vlm.hidden)))
        blocks.launch(ops.SCALE_ROWS, x=x, factor=factor)
        self._through_vlm(x, ops.Seen.LAUNCH)

    def read_state(self) -> None:
        """The state's row, which sees those and itself."""
        c, regions, blocks = self.config, self.regions, self.blocks
        blocks.cursor = regions[SPANS].at(Span.STATE)
        state = self.tape.scratch("state", 1, c.state_dim)
        self.tape.record(
            ops.NORMALIZE, x=regions["state"], mean=regions[f"stats.{STATE}.mean"],
            std=regions[f"stats.{STATE}.std"], y=state, shift=shift_of(self.filled.mode),
        )  # fmt: skip
        row = self.tape.scratch("state.row", 1, self.vlm.hidden)
        self.dense(STATE_IN, state, row)
        x = blocks.scratch("x", self.vlm.hidden)
        blocks.launch(
            ops.EMBED_SEEN, tokens=regions["words"].view().cols(0, 1), table=regions[EMBED],
            seen=row, x=x, journal=regions["journal"],
        )  # fmt: skip
        self._through_vlm(x, ops.Seen.PAST)

    def _through_vlm(self, x: Region, seen: ops.Seen) -> None:
        """Rows through the VLM: new keys and values of each layer, and what the expert makes of
        them. Of the last layer these are all that is used.
        """
        c, v, blocks = self.config, self.vlm, self.blocks
        h = blocks.activation("vlm.0.h", v.hidden)
        blocks.rmsnorm(x, "vlm.0.input_norm", h)
        crossed = 0
        for i in range(c.num_vlm_layers):
            at = f"vlm.{i}"
            keys, values = self._kept("keys", "values", i)
            u, q = blocks.append_keys(at, h, keys, values, v.query_heads)
            assert u is None  # no gates
            if c.has_expert(i) and not c.sees_itself(i):
                self._cross(i, crossed)
                crossed += 1
            if i + 1 == c.num_vlm_layers:
                break
            r = blocks.attend(at, None, q, keys, values, seen=seen)
            r = blocks.mlp(at, x, r)
            h = blocks.activation(f"vlm.{i + 1}.h", v.hidden)
            blocks.add_rmsnorm(x, r, f"vlm.{i + 1}.input_norm", h)

    def _cross(self, layer: int, index: int) -> None:
        """Keys and values of a layer of the expert, from the VLM's, which `append_keys` turned from
        columns of u.
        """
        v, blocks, at = self.vlm, self.blocks, f"expert.{layer}"
        u = self.tape.scratched(f"vlm.{layer}.u").view()
        queries, width = v.query_heads * v.head_dim, v.kv_heads * v.head_dim
        k, own = u.cols(queries, queries + width), u.cols(queries + width, queries + 2 * width)
        turned = blocks.scratch(f"{at}.turned", v.kv_heads, v.head_dim)
        blocks.launch(ops.ROPE_ROWS, x=k, inv_freq=self.regions[INV_FREQ], y=turned, placed=1)
        plain = blocks.scratch(f"{at}.plain", width)
        blocks.launch(ops.KEEP_VALUES, x=own, y=plain)
        made = []
        for name, rows in (("k", turned.view().reshape(blocks.rows, width)), ("v", plain.view())):
            x = blocks.activation(f"{at}.{name}.in", width)
            blocks.launch(ops.ACTIVATIONS, x=rows, y=x)
            made.append(blocks.linear(f"{at}.{name}.out", x, f"{at}.{name}"))
        keys, values = self._kept("cross_keys", "cross_values", index)
        blocks.launch(ops.APPEND_ROWS, k=made[0], v=made[1], keys=keys, values=values)

    def _kept(self, keys: str, values: str, layer: int) -> tuple[View, View]:
        """Rows of keys and values of a layer."""
        n = self.vlm.kv_heads
        first, second = (self.regions[name].span(layer * n, n) for name in (keys, values))
        return first, second

    # -- Euler steps -------------------------------------------------------------------------------

    def velocity(self, step: int) -> Region:
        """Of the actions at a step: rows of the expert behind those of the VLM."""
        c, v, blocks, tape = self.config, self.vlm, self.blocks, self.tape
        blocks.rows, blocks.cursor = c.chunk_size, self.regions[SPANS].at(Span.SUFFIX)
        inner = blocks.scratch("inner", v.expert_hidden)
        self.dense(ACTION_IN, self.regions["flow"], inner, self.regions[TIMES].at(step), ops.SILU)
        x = blocks.scratch("x", v.expert_hidden)
        self.dense(ACTION_MID, inner, x)
        r: Region | None = None
        crossed = 0
        for i in filter(c.has_expert, range(c.num_vlm_layers)):
            at = f"expert.{i}"
            h = self._normed(f"{at}.input_norm", x, r)
            if c.sees_itself(i):
                r = blocks.attention(at, h, *self._kept("keys", "values", i), v.query_heads)
            else:
                u = blocks.linear(f"{at}.u", h, f"{at}.q")
                q = blocks.scratch(f"{at}.q", v.query_heads, v.head_dim)
                blocks.launch(ops.ROPE_ROWS, x=u, inv_freq=self.regions[INV_FREQ], y=q, placed=0)
                keys, values = self._kept("cross_keys", "cross_values", crossed)
                crossed += 1
                r = blocks.attend(at, None, q, keys, values, seen=ops.Seen.BEFORE)
            r = blocks.mlp(at, x, r)
        last = self._normed(EXPERT_NORM, x, r)
        velocity = tape.scratch("velocity", c.chunk_size, c.max_action_dim)
        blocks.product(last, ACTION_OUT, velocity)
        blocks.launch(ops.ADD_BIAS, x=velocity, b=self.regions[bias_name(ACTION_OUT)])
        return velocity

    def _normed(self, norm: str, x: Region, r: Region | None) -> Region:
        """x += r, if there is one; the norm of that."""
        h = self.blocks.activation(f"{norm}.h", x.shape[1])
        if r is None:
            self.blocks.rmsnorm(x, norm, h)
        else:
            self.blocks.add_rmsnorm(x, r, norm, h)
        return h
