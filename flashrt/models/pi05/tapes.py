"""Tapes of pi0.5: an image's rows, the block of all rows that are read, and Euler steps over them.

IS: the order of launches; formulas as in LeRobot's modeling_pi05. IS NOT: the blocks themselves
(models/blocks), the tower (vla.siglip), or the regions of a lane (model).

Embeddings of words are multiplied by sqrt(hidden), those of images are not: they are divided by it
when they are made, so that rows of a block are multiplied alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from flashrt.core.op import AttrValue, Op
from flashrt.core.region import Operand, Region, View
from flashrt.core.tape import Tape
from flashrt.models.blocks import BlockRecorder, bias_name
from flashrt.models.features import ACTION
from flashrt.models.pi05.weights import ACTION_IN, ACTION_OUT, EMBED, EXPERT_NORM, Weights
from flashrt.models.prefix import SPANS, Span
from flashrt.models.vla.siglip import SiglipRecorder, fitted_middle
from flashrt.ops import table as ops

EPS = 1e-6  # of every RMS norm


class Pi05Recorder:
    """Records the launches of one tape."""

    def __init__(self, filled: Weights, regions: Mapping[str, Region], tape: Tape) -> None:
        self.filled = filled
        self.config, self.sizes = filled.config, filled.sizes
        self.regions = regions
        self.tape = tape
        self.blocks = BlockRecorder(regions, tape, EPS)

    # -- the policy's own steps --------------------------------------------------------------------

    def see(self) -> None:
        """An observation is there."""
        self._launch(ops.SEE)

    def act(self) -> None:
        """The tick's action."""
        regions = self.regions
        self._launch(
            ops.TAKE_ACTION, queue=regions["queue"], scale=regions[f"stats.{ACTION}.scale"],
            offset=regions[f"stats.{ACTION}.offset"], previous=regions["previous"],
            action=regions["action"],
        )  # fmt: skip

    def begin(self) -> None:
        """Promised rows, and noise."""
        c, regions = self.config, self.regions
        self._launch(
            ops.CHUNK_BEGIN, previous=regions["previous"], queue=regions["queue"],
            request=regions["request"], kept=regions["kept"], steps=c.num_inference_steps,
            execute=c.n_action_steps,
        )  # fmt: skip
        self._launch(
            ops.FLOW_NOISE, given=regions["given"], request=regions["request"], x=regions["flow"]
        )

    # -- what a plan stands on ---------------------------------------------------------------------

    def look(self, camera: int) -> None:
        """What the tower makes of an image, among the rows of all cameras."""
        image, tower = self.config.cameras[camera], self.filled.tower
        out = self.regions["made"].span(camera * tower.tokens, tower.tokens)
        recorder = SiglipRecorder(tower, self.regions, self.tape)
        fit = fitted_middle(image.height, image.width, tower.side)
        recorder.see([self.regions[f"images.{camera}"]], [fit], out)
        self.tape.record(
            ops.SCALE_ROWS, x=out, cursor=recorder.each, factor=1 / self._embedding_factor
        )

    def read(self) -> None:
        """Rows of images and of the text, which all see each other: keys and values of each layer,
        which are all that is used of the last.
        """
        s, rows, blocks, regions = self.sizes, self.tape.rows, self.blocks, self.regions
        blocks.cursor = regions[SPANS].at(Span.BLOCK)
        x = blocks.scratch("x", s.hidden)
        blocks.launch(
            ops.EMBED_SEEN, tokens=regions["words"].view().cols(0, rows), table=regions[EMBED],
            seen=regions["seen"], x=x, journal=regions["journal"],
        )  # fmt: skip
        blocks.launch(ops.SCALE_ROWS, x=x, factor=self._embedding_factor)
        h = blocks.activation("vlm.0.h", s.hidden)
        blocks.rmsnorm(x, "vlm.0.input_norm", h)
        for i in range(s.depth):
            at, (keys, values) = f"vlm.{i}", self._kept(i)
            _, q = blocks.append_keys(at, h, keys, values, s.heads)
            if i + 1 == s.depth:
                break
            r = blocks.attend(at, None, q, keys, values, seen=ops.Seen.LAUNCH)
            h = blocks.activation(f"{at}.mlp.h", s.hidden)
            blocks.add_rmsnorm(x, r, f"{at}.mlp_norm", h)
            r = self._mlp(at, h)
            h = blocks.activation(f"vlm.{i + 1}.h", s.hidden)
            blocks.add_rmsnorm(x, r, f"vlm.{i + 1}.input_norm", h)

    # -- Euler steps -------------------------------------------------------------------------------

    def integrate(self, first: int, stop: int) -> None:
        """Steps [first, stop); the last of all puts the chunk into force."""
        c, regions = self.config, self.regions
        for step in range(first, stop):
            self.tape.scope = f"step {step}: "
            v = self._velocity(step)
            if c.guidance is not None:
                time = 1.0 + step * (-1.0 / c.num_inference_steps)
                self.tape.record(
                    ops.GUIDE, x=regions["flow"], target=regions["target"],
                    weights=regions["weights"], v=v, time=time,
                    strength=c.guidance.strength(time),
                )  # fmt: skip
            self._launch(ops.EULER, v=v, x=regions["flow"], step=-1.0 / c.num_inference_steps)
        if stop == c.num_inference_steps:
            self._launch(
                ops.CHUNK_END, kept=regions["kept"], queue=regions["queue"],
                chunk=regions["flow"].view().cols(0, c.action_dim),
            )  # fmt: skip

    def _velocity(self, step: int) -> Region:
        """Of the actions at a step: rows of the expert behind those that were read, which all see
        all of both.
        """
        c, s, blocks = self.config, self.sizes, self.blocks
        blocks.rows, blocks.cursor = c.chunk_size, self.regions[SPANS].at(Span.SUFFIX)
        x = blocks.scratch("x", s.expert_hidden)
        self.tape.record(
            ops.CONV2D, x=self.regions["flow"].view().reshape(1, c.chunk_size, 1, c.max_action_dim),
            w=self.regions[ACTION_IN], b=self.regions[bias_name(ACTION_IN)],
            y=x.view().reshape(1, c.chunk_size, 1, s.expert_hidden), taps_y=1, taps_x=1, stride=1,
            padding=0, dilation=1, activation=ops.IDENTITY,
        )  # fmt: skip
        r: Region | None = None
        gate: View | None = None
        for i in range(s.depth):
            at, (keys, values) = f"expert.{i}", self._kept(i)
            h, own = self._normed(f"{at}.input_norm", step, x, r, gate)
            _, q = blocks.append_keys(at, h, keys, values, s.heads)
            r = blocks.attend(at, None, q, keys, values, seen=ops.Seen.LAUNCH)
            h, gate = self._normed(f"{at}.mlp_norm", step, x, r, own)
            r = self._mlp(at, h)
        last, _ = self._normed(EXPERT_NORM, step, x, r, gate)
        return blocks.biased("velocity", last, ACTION_OUT)

    def _normed(
        self, norm: str, step: int, x: Region, r: Region | None, gate: View | None
    ) -> tuple[Region, View]:
        """x += gate r, if there is one; the norm of that, and the gate of what is made of it."""
        width = x.shape[1]
        scale, shift, own = (
            self.regions[norm].at(step).cols(i * width, (i + 1) * width) for i in range(3)
        )
        h = self.blocks.activation(f"{norm}.h", width)
        self.blocks.launch(
            ops.ADAPTIVE_RMSNORM, x=x, r=r or x, gate=gate or scale, scale=scale, shift=shift, y=h,
            eps=EPS, added=int(r is not None),
        )  # fmt: skip
        return h, own

    def _mlp(self, at: str, h: Operand) -> Region:
        """Of Gemma; weights gate_up, down."""
        blocks = self.blocks
        u = blocks.linear(f"{at}.mlp.u", h, f"{at}.gate_up")
        y = blocks.activation(f"{at}.mlp.y", u.shape[1] // 2)
        blocks.launch(ops.GEGLU, u=u, y=y)
        return blocks.linear(f"{at}.mlp.r", y, f"{at}.down")

    @property
    def _embedding_factor(self) -> float:
        return float(np.float32(math.sqrt(self.sizes.hidden)))

    def _kept(self, layer: int) -> tuple[View, View]:
        """Rows of keys and values of a layer."""
        n = self.sizes.kv_heads
        first, second = (self.regions[name].span(layer * n, n) for name in ("keys", "values"))
        return first, second

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.regions["cursor"], **bindings)
