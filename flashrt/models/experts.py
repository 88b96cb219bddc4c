"""Mixture of experts: how a family routes, and the weights of a layer's experts.

IS: sizes and rules of routing with the checks that families share, and rules for the weights of a
layer that has a router. IS NOT: launches (`blocks.BlockRecorder.experts`), nor the fields of a
family's config.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.models.fields import Fields
from flashrt.ops.experts import EXPERT_ROWS, Scoring
from flashrt.weights.rules import WeightRule, constant, experts, matrix, vector

# Of all layers together: several times those of any released model. Beyond it, rules for weights of
# a damaged config would take seconds and gigabytes.
_MOST_EXPERTS = 1 << 16
# A constant of models with experts: in place of a bias, for routers that have none.
NO_BIAS = "no_bias"


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a row picks, and what their results are multiplied by: see ops.experts."""

    picked: int  # P
    scoring: Scoring = Scoring.SOFTMAX
    is_normed: bool = True  # gates are divided by their sum
    eps: float = 0.0  # in that division
    scale: float = 1.0
    is_biased: bool = False  # experts are picked by score + bias


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of a layer; the comment of each size gives its symbol in ops/."""

    n: int  # E
    intermediate: int  # I
    routing: Routing

    def check(self, fields: Fields, hidden: int, n_layers: int, size_field: str) -> None:
        """Notes what no router can pick, more experts than there are anywhere, and sizes at which
        an expert's rows begin inside a tile of the stored matrix. `n_layers`: with experts;
        `size_field`: how the family spells that of an expert.
        """
        if self.n * n_layers > _MOST_EXPERTS:
            fields.problems.append(
                f"{self.n:,} experts in {n_layers} layers; at most {_MOST_EXPERTS:,} in all are "
                "supported"
            )
        if self.routing.picked > self.n:
            fields.problems.append(
                f"num_experts_per_tok {self.routing.picked} is more than the {self.n} experts"
            )
        for name, size in ((size_field, self.intermediate), ("hidden_size", hidden)):
            if size % EXPERT_ROWS:
                fields.problems.append(
                    f"{name} {size} is no multiple of {EXPERT_ROWS}, which the matrices of "
                    "experts need"
                )


@dataclass(frozen=True, slots=True)
class Names:
    """How a family's checkpoints call the tensors of a layer with experts. `expert`: of one expert,
    with its number in place of {}; gate, up, down: of a matrix, there and in the shared expert.
    """

    router: str
    expert: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router_bias: str = ""  # of the picks
    shared_gate: str = ""  # of a shared expert


def expert_rules(region: str, e: Experts, hidden: int, names: Names) -> list[WeightRule]:
    """Rules for router and experts: regions router [experts | gate of the shared expert],
    expert_bias, experts_in [expert: gate | up] and experts_out.
    """
    rows = [(f"{names.router}.weight", e.n)]
    if names.shared_gate:
        rows.append((f"{names.shared_gate}.weight", 1))
    each = [names.expert.format(i) for i in range(e.n)]
    halves = [(f"{x}.{n}.weight", e.intermediate) for x in each for n in (names.gate, names.up)]
    downs = [(f"{x}.{names.down}.weight", hidden) for x in each]
    rules = [
        matrix(f"{region}.router", hidden, *rows),
        experts(f"{region}.experts_in", hidden, halves),
        experts(f"{region}.experts_out", e.intermediate, downs),
    ]
    if e.routing.is_biased:
        rules.append(vector(f"{region}.expert_bias", names.router_bias, e.n))
    return rules


def constants(e: Experts | None) -> list[WeightRule]:
    """Rules for what blocks of experts need besides, once for all layers."""
    return [constant(NO_BIAS, (0.0,) * e.n)] if e is not None and not e.routing.is_biased else []
