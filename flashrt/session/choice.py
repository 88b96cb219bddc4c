"""How the next token of a generation is chosen: the sampler's parameters, and a grammar's mask.

IS: the parameters for the present place, which change from token to token where there is a grammar.
IS NOT: sampling (ops.sample), the grammar's rules (text.constraint), or which tokens are known
ahead (tail): a token that was sampled by other parameters, another mask included, is not used.
"""

from __future__ import annotations

from flashrt.ops.sample import SamplerParams
from flashrt.text.constraint import Constraint


class Choice:
    """Of one generation."""

    def __init__(self, params: SamplerParams, constraint: Constraint | None = None) -> None:
        self._plain, self._constraint = params, constraint
        self._params: SamplerParams | None = None if constraint else params

    @property
    def params(self) -> SamplerParams:
        """For the next token; the mask is made when it is first asked for."""
        if self._params is None:
            assert self._constraint is not None
            self._params = self._plain.masked(self._constraint.allowed())
        return self._params

    @property
    def is_stopped(self) -> bool:
        """Whether it is known already that no token can follow."""
        return self._constraint is not None and self._constraint.is_stopped

    def is_over(self) -> bool:
        """Whether no token can follow. Raises GrammarError where the grammar is in a dead end."""
        return self._constraint is not None and self._constraint.is_over()

    def take(self, token: int) -> None:
        """The token that was chosen."""
        if self._constraint is not None:
            self._constraint.take(token)
            self._params = None
