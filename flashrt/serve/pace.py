"""How many rows of prompts a step may have beside lanes that decode, whose tokens wait for it.

IS: what steps have cost of late, and the rows that a bound leaves room for. IS NOT: whose rows they
are (scheduler). Rows change when a token comes, never which token.

A step of n lanes that decode takes alone(n) seconds; one that also feeds r rows of prompts takes
alone(n) + fixed + r * each. `alone` is a running mean by n; `fixed` and `each` are least squares
over the last mixed steps, older ones counting less. On a CPU `fixed` is small; where a step is one
captured graph, `each` is, and then pieces are as long as the graph takes.
"""

from __future__ import annotations

SHARE = 1.5  # of a step's time goes to prompts, for each part that goes to lanes that decode
LEAST_ROWS = 8  # of a step that feeds prompts: they get on, however tight the bound is
_NEWEST = 0.1  # weight of the newest step in `alone`
_KEPT = 0.97  # weight of a mixed step after one more
_PRIOR_ROWS = 4.0  # spread of rows below which `each` is taken from the mean alone
_LOOK_AGAIN = 64  # mixed steps, then one without prompts: what that takes is measured again


class Pace:
    """Of one engine. Only the scheduler's thread calls it."""

    def __init__(self, itl_s: float | None = None) -> None:
        """itl_s: what a step with prompts may take; None: 1 + SHARE times what it takes without."""
        self._itl_s = itl_s
        self._alone: dict[int, float] = {}
        self._mixed: dict[int, int] = {}  # steps since `alone` was measured
        self._n = self._x = self._y = self._xx = self._xy = 0.0  # sums over mixed steps

    def rows(self, n_decoding: int, most: int) -> int:
        """Rows of prompts, `most` at most, for a step beside so many lanes; 0 once in a while."""
        alone = self._alone.get(n_decoding)
        if alone is None or self._mixed[n_decoding] >= _LOOK_AGAIN:
            return 0
        if not self._n:
            return most
        fixed, each = self._costs()
        bound = SHARE * alone if self._itl_s is None else self._itl_s - alone
        # What is paid to feed rows at all is worth as much again for rows, whatever the bound.
        wanted = max(bound - fixed, fixed) / each
        return int(min(most, max(LEAST_ROWS, wanted)))

    def note(self, n_decoding: int, n_rows: int, seconds: float) -> None:
        """A step has taken so long."""
        alone = self._alone.get(n_decoding)
        if not n_rows:
            self._alone[n_decoding] = (
                seconds if alone is None else alone + _NEWEST * (seconds - alone)
            )
            self._mixed[n_decoding] = 0
        elif alone is not None:
            self._mixed[n_decoding] += 1
            x, y = float(n_rows), max(0.0, seconds - alone)
            self._n = self._n * _KEPT + 1
            self._x = self._x * _KEPT + x
            self._y = self._y * _KEPT + y
            self._xx = self._xx * _KEPT + x * x
            self._xy = self._xy * _KEPT + x * y

    def _costs(self) -> tuple[float, float]:
        """Seconds of a mixed step, and of each row in it, beyond what it takes without."""
        x, y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - x * x
        together = self._xy / self._n - x * y
        mean = max(y / x, 1e-9)
        prior = _PRIOR_ROWS**2
        each = (together + prior * mean) / (spread + prior)
        each = min(max(each, mean * 1e-3), mean)
        return max(0.0, y - each * x), each
