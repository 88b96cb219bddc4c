"""Launches that all policies of chunks have: an observation is there, an action, promised rows.

IS: recorders' common part. IS NOT: what a chunk is made of (act, vla), or when to plan
(robot/schedule).
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.op import AttrValue, Op
from flashrt.core.region import Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.actions import ActionConfig
from flashrt.models.features import ACTION
from flashrt.ops import table as ops


class ChunkRecorder:
    """Records the launches of one tape."""

    def __init__(self, config: ActionConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        self.config = config
        self.regions = regions
        self.tape = tape

    def see(self) -> None:
        """An observation is there."""
        self.launch(ops.SEE)

    def act(self) -> None:
        """The tick's action."""
        regions = self.regions
        self.launch(
            ops.TAKE_ACTION, queue=regions["queue"], scale=regions[f"stats.{ACTION}.scale"],
            offset=regions[f"stats.{ACTION}.offset"], previous=regions["previous"],
            action=regions["action"],
        )  # fmt: skip

    def keep_promised(self) -> None:
        """Rows of the chunk in force that the one in the making is to keep."""
        regions = self.regions
        self.launch(
            ops.CHUNK_BEGIN, previous=regions["previous"], queue=regions["queue"],
            request=regions["request"], kept=regions["kept"], steps=self.config.num_inference_steps,
            execute=self.config.n_action_steps,
        )  # fmt: skip

    def put_in_force(self, chunk: Operand) -> None:
        """The chunk that was made, but for what was promised."""
        regions = self.regions
        self.launch(ops.CHUNK_END, kept=regions["kept"], chunk=chunk, queue=regions["queue"])

    def launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        """An op of the policy's own cursor."""
        self.tape.record(op, cursor=self.regions["cursor"], **bindings)
