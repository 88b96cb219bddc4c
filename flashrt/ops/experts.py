"""Mixture of experts: the router's picks, and the products with the weights of picked experts.

IS: signatures; the rules of the routers of transformers' modeling_qwen3_next (softmax),
modeling_granitemoehybrid (softmax of those picked, which is the normed softmax) and
modeling_lfm2_moe (sigmoid, picked by a bias). IS NOT: code; see `table`. E experts, of which a row
picks P; I is an expert's intermediate size.

Weights of all experts are one matrix, expert after expert: in `experts_in` expert e has rows
[2 I e, 2 I (e + 1)), its gate, then its up; in `experts_out` rows [H e, H (e + 1)). I and H are
multiples of `EXPERT_ROWS`, so that an expert begins where a panel or a row tile does. Picks of a
row ascend, and its sum over experts has their order: so its bits do not depend on who else picked
them. `groups`, `members` and `products` are workspace: a backend puts there what it likes.
"""

from __future__ import annotations

from enum import IntEnum

from flashrt.core.op import Attr, Op, Param
from flashrt.ops.params import CURSOR, act, f32, i32, matrix

EXPERT_ROWS = 32  # of a panel, the larger unit in which backends store rows of a matrix


class Scoring(IntEnum):
    """What makes a score of a logit."""

    SOFTMAX = 0
    SIGMOID = 1


ROUTE = Op(
    "route",
    "picks[t] = the P experts with the largest logits, where `biased` the largest scores + bias, "
    "ascending by number; equals by lower number, NaN last. gates[t, j] = the score of "
    "picks[t, j], softmax over all logits or sigmoid; where `normed` over (sum of those + eps); "
    "times scale. A row with a NaN has NaN for gates; bias is read only where `biased`",
    (
        f32("logits", "r", "T", "E", strided=True),
        f32("bias", "r", "E"),
        CURSOR,
        i32("picks", "w", "T", "P"),
        f32("gates", "w", "T", "P"),
    ),
    (
        Attr("scoring", names=Scoring),
        Attr("biased"),
        Attr("normed"),
        Attr("eps", "float32"),
        Attr("scale", "float32"),
    ),
    at_most=(("P", "E"),),
)
_GROUPED: tuple[Param, ...] = (  # workspace to group picks by expert
    i32("groups", "w", "E", 2),
    i32("members", "w", "T", "P", 2),
)
EXPERTS_IN = Op(
    "experts_in",
    "h[t, j] = silu(x G^T) (x U^T) of row t, G and U those of expert picks[t, j]; sums as of "
    "`linear`",
    (
        act("x", "r", "T", "H"),
        matrix("w", "E*2*I", "H"),
        i32("picks", "r", "T", "P"),
        CURSOR,
        *_GROUPED,
        act("h", "w", "T", "P", "I"),
    ),
    multiples=(("I", EXPERT_ROWS),),
    at_most=(("P", "E"),),
)
EXPERTS_OUT = Op(
    "experts_out",
    "y[t] = sum over j, ascending, of gates[t, j] (h[t, j] D^T), D that of expert picks[t, j]; "
    "inner sums as of `linear`, the outer one is fma(gate, product, sum), from 0",
    (
        act("h", "r", "T", "P", "I"),
        matrix("w", "E*H", "I"),
        i32("picks", "r", "T", "P"),
        f32("gates", "r", "T", "P"),
        CURSOR,
        *_GROUPED,
        f32("products", "w", "T", "P", "H"),
        f32("y", "w", "T", "H"),
    ),
    multiples=(("H", EXPERT_ROWS),),
    at_most=(("P", "E"),),
)
ADD_GATED = Op(
    "add_gated",
    "y += sigmoid(gate[t]) * x, per row: a shared expert; without the gate where `gated` is 0",
    (
        f32("y", "rw", "T", "H"),
        f32("x", "r", "T", "H"),
        f32("gate", "r", "T", 1, strided=True),
        CURSOR,
    ),
    (Attr("gated"),),
)
