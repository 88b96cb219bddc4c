"""Fusion: neighbouring launches of a tape become one, where few rows make launches the limit.

IS: a pass over the launches of a graph, before they are expanded: which may be one, and the launch
that stands for them, bit for bit. IS NOT: kernels (cuda_src, by way of kernels), or known to models
and core: a tape says what is computed, not in how many launches.

What is between fused launches is never written. So it must be scratch that no other launch of the
tape touches. And a fused launch reads and writes at once what were several launches: the planner
may have put an output where an input was that was dead by then, and such launches stay apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.fused_ops import (
    COUNTERS,
    DELTA_FEW,
    HOLD_SEND,
    LINEAR_ADD,
    LINEAR_SILU,
    LINEARS,
    MOST_KEY_HEADS,
    MOST_PARTS,
    NORM_LINEAR,
    NORM_LINEARS,
    NORM_SILU,
    SENT,
    WORD_RING,
)
from flashrt.backends.cuda.kernels import Shape
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import AttrValue, Op, bind
from flashrt.core.region import ActDTypes, DType, Region, Role, View, resolve_dtype
from flashrt.core.runs import RUNS, RunsWord, Stride

_DELTA = ("conv_window", "delta_gates", "delta_rule", "gated_rmsnorm")


class SendTo(NamedTuple):
    """Addresses, as kernels see them, of WORD_RING and of SENT: a device has one of each."""

    ring: int
    sent: int


def fuse(
    launches: Sequence[BoundLaunch],
    acts: ActDTypes,
    counters: int,
    send_to: SendTo | None = None,
) -> list[BoundLaunch]:
    """The launches with groups of them fused; in order, with the same results in all regions but
    scratch. `launches` must be a whole tape: scratch is dead before and after.

    `counters`: address of the region COUNTERS, zeros, which all graphs of a device share. With
    `send_to`, a `hold` at the end of the tape sends its token to the host: what would be a copy
    behind the replay is part of its last launch.
    """
    return _Fusion(launches, acts, counters, send_to).all()


@dataclass(frozen=True, slots=True)
class _Operand:
    """An operand of a bound launch."""

    view: View
    address: int
    stride: Stride
    max_runs: int

    @property
    def region(self) -> Region:
        return self.view.region

    def extent(self, acts: ActDTypes) -> tuple[int, int]:
        """[start, stop) of what the region of a plain operand has of memory."""
        bits = resolve_dtype(self.region.dtype, acts).bits
        lead = math.prod(self.region.shape[1:]) * bits // 8
        start = self.address - self.view.lead * lead - self.view.col * bits // 8
        return start, start + max(self.region.shape[0] * lead, self.stride.run * self.max_runs)


class _Fusion:
    """The pass over one tape."""

    def __init__(
        self,
        launches: Sequence[BoundLaunch],
        acts: ActDTypes,
        counters: int,
        send_to: SendTo | None,
    ) -> None:
        self._launches = launches
        self._acts = acts
        self._counters = counters
        self._send_to = send_to
        self._users: dict[Region, set[int]] = defaultdict(set)  # of scratch
        for i, bound in enumerate(launches):
            for view in bound.launch.operands:
                if view.region.role is Role.SCRATCH:
                    self._users[view.region].add(i)

    def all(self) -> list[BoundLaunch]:
        """Front to back; what was taken is not looked at again."""
        made: list[BoundLaunch] = []
        at = 0
        while at < len(self._launches):
            group, taken = self._group(at)
            made += group
            at += taken
        return made

    def _group(self, i: int) -> tuple[list[BoundLaunch], int]:
        """What stands for launch `i` and those after it, and for how many."""
        if self._name(i) == "linear":
            if (readers := self._normed(i + 1)) and (added := self._added(i)):
                group, taken = self._normed_group(i + 1, readers)
                return [added, *group], 1 + taken
            if gated := self._gated(i):
                return [gated], 2
            if len(beside := self._beside(i)) > 1:
                return self._products(beside, {}), len(beside)
        if self._name(i) == "rmsnorm" and (readers := self._normed(i)):
            return self._normed_group(i, readers)
        if self._name(i) == "conv_window" and (fused := self._delta(i)):
            return [fused], len(_DELTA)
        if self._name(i) == "hold" and (sending := self._sending(i)):
            return [sending], 1
        return [self._launches[i]], 1

    # ---- the delta rule

    def _delta(self, i: int) -> BoundLaunch | None:
        """A convolution, its gates, the delta rule and the gated norm."""
        if tuple(self._name(i + k) for k in range(len(_DELTA))) != _DELTA:
            return None
        conv, gates, rule, norm = range(i, i + len(_DELTA))
        qkv, o, state = (self._operand(rule, name) for name in ("y", "o", "state"))
        rows = self._launches[conv].launch.dims["T"]
        key_heads = self._launches[rule].launch.attr("key_heads")
        is_one_rule = (
            self._is_between(qkv, conv, gates, rule)
            and self._is_between(o, rule, norm)
            and all(
                self._is_between(self._operand(gates, name), gates, rule)
                for name in ("decay", "beta")
            )
            and self._launches[gates].launch.attr("key_heads") == key_heads
            and self._go_together(conv, rule)
            and all(self._see_all_rows(k, conv) for k in (gates, norm))
        )
        if not is_one_rule or not kernels.fits_delta_few(rows, *state.view.shape[1:]):
            return None
        u, y = self._operand(conv, "u"), self._operand(norm, "y")
        windows = {"z": self._operand(norm, "z")}
        windows |= {name: self._operand(gates, name) for name in ("a", "b")}
        is_one_region = all(w.region == u.region for w in windows.values())
        if not is_one_region or key_heads > MOST_KEY_HEADS or not self._are_apart(y, u):
            return None
        operands = {name: self._operand(conv, name) for name in ("u", "w", "window")}
        operands |= {name: self._with_rows_of(w, u, rows) for name, w in windows.items()}
        operands |= {name: self._operand(gates, name) for name in ("a_log", "dt_bias")}
        operands |= {
            "state": state, "norm": self._operand(norm, "w"), "y": self._with_rows_of(y, u, rows),
            "counters": _Operand(COUNTERS.view(), self._counters, Stride(), 1),
        }  # fmt: skip
        eps = self._launches[norm].launch.attr("eps")
        return self._made(DELTA_FEW, conv, operands, key_heads=key_heads, eps=eps)

    def _see_all_rows(self, i: int, j: int) -> bool:
        """Whether launch `i` sees the rows that `j` sees, of the same runs or of all at once."""
        cursor, runs = self._operand(i, "cursor").view, self._launches[i].runs
        is_of_all = not runs and cursor.region == RUNS and cursor.col == RunsWord.COUNT
        return self._go_together(i, j) or (is_of_all and self._launches[j].runs > 0)

    def _with_rows_of(self, operand: _Operand, of: _Operand, rows: int) -> _Operand:
        """An operand that has the rows of all runs, moved to those of a run as `of` is."""
        if operand.view.shape[0] == rows and operand.stride == of.stride:
            return operand
        if not operand.stride.is_still:  # it moves by itself, with launches that do
            return operand
        view = operand.view
        nbytes = view.row_stride * resolve_dtype(view.region.dtype, self._acts).bits // 8
        stride = Stride(
            row=nbytes if of.stride.row else 0,
            run=nbytes * of.view.run_lead if of.stride.run else 0,
        )
        view = replace(view, shape=(rows, *view.shape[1:]))
        return _Operand(view, operand.address, stride, of.max_runs)

    # ---- the end of a token

    def _sending(self, i: int) -> BoundLaunch | None:
        """A hold that sends the token to the host, if nothing after it may change the token, and it
        is one lane's.
        """
        is_last, bound = i == len(self._launches) - 1, self._launches[i]
        if self._send_to is None or not is_last or bound.max_runs > 1:
            return None
        (words,) = (p.words for p in bound.launch.op.params if p.name == "cursor")
        assert words is not None
        operands = {
            "stops": self._operand(i, "stops"),
            "ring": _Operand(WORD_RING.view(), self._send_to.ring, Stride(), 1),
            "sent": _Operand(SENT.view(), self._send_to.sent, Stride(), 1),
        }
        return self._made(HOLD_SEND, i, operands, word=int(words["TOKEN"]))

    # ---- products

    def _gated(self, i: int) -> BoundLaunch | None:
        """A linear and the silu_mul of it."""
        if not self._is_gated(i):
            return None
        x, y = self._operand(i, "x"), self._operand(i + 1, "y")
        if self._dtype(x) is not self._dtype(y) or not self._are_apart(y, x):
            return None
        return self._made(LINEAR_SILU, i, {"x": x, "w": self._operand(i, "w"), "y": y})

    def _beside(self, i: int) -> range:
        """A linear and those after it that multiply the same rows and go nowhere special."""
        j = i
        while self._name(j) == "linear" and self._is_few(j):
            x, y = self._operand(j, "x"), self._operand(j, "y")
            is_same = x == self._operand(i, "x") and self._go_together(i, j)
            is_last = self._is_gated(j) or self._added(j)
            if not is_same or is_last or not self._are_apart(y, x):
                break
            j += 1
        return range(i, j)

    def _products(
        self, launches: Sequence[int], normed: Mapping[str, _Operand], **attrs: AttrValue
    ) -> list[BoundLaunch]:
        """Linears of the same rows in as few launches as there can be. `normed`: x and norm, where
        they make the norm themselves.
        """
        made: list[BoundLaunch] = []
        left = list(launches)
        while left:
            group = [left.pop(0)]
            while left and len(group) < MOST_PARTS and self._write_apart(*group, left[0]):
                group.append(left.pop(0))
            i = group[0]
            # rows with most bytes first: they would be what the launch waits for at its end
            group.sort(key=lambda j: -self._operand(j, "w").region.dtype.bits)
            own = [(self._operand(j, "w"), self._operand(j, "y")) for j in group]
            operands = dict(normed or {"x": self._operand(i, "x")})
            if len(group) > 1:
                for part, (w, y) in enumerate(own):
                    operands |= {f"w{part}": w, f"y{part}": y}
                op = (NORM_LINEARS if normed else LINEARS)[len(group)]
                made.append(self._made(op, i, operands, **attrs))
            elif normed:
                ((w, y),) = own
                made.append(self._made(NORM_LINEAR, i, operands | {"w": w, "y": y}, **attrs))
            else:
                made.append(self._launches[i])
        return made

    def _write_apart(self, *launches: int) -> bool:
        """Whether outputs of linears have places of their own; columns of one region have."""
        *others, last = (self._operand(j, "y") for j in launches)
        return all(y.region == last.region or self._are_apart(last, y) for y in others)

    def _is_gated(self, i: int) -> bool:
        """Whether a linear's outputs go to a silu_mul alone."""
        if (
            self._name(i + 1) != "silu_mul"
            or not self._is_few(i)
            or not self._go_together(i, i + 1)
        ):
            return False
        u = self._operand(i, "y")
        is_whole = self._operand(i + 1, "u") == u and u.view.row_stride == u.view.shape[-1]
        return is_whole and self._is_between(u, i, i + 1) and u.view.shape[-1] % 32 == 0

    def _added(self, i: int) -> BoundLaunch | None:
        """A linear that adds to what the add_rmsnorm after it would have added it to."""
        if self._name(i + 1) != "add_rmsnorm" or not self._is_few(i):
            return None
        r, x, y = self._operand(i, "y"), self._operand(i, "x"), self._operand(i + 1, "x")
        is_alone = self._operand(i + 1, "r") == r and self._is_between(r, i, i + 1)
        if not is_alone or not self._go_together(i, i + 1) or not self._are_apart(y, x):
            return None
        return self._made(LINEAR_ADD, i, {"x": x, "w": self._operand(i, "w"), "y": y})

    def _normed(self, i: int) -> range:
        """The linears after a norm that can make it themselves, if they are all that read it."""
        if self._name(i) not in ("rmsnorm", "add_rmsnorm"):
            return range(0)
        x, h = self._operand(i, "x"), self._operand(i, "y")
        readers = range(i + 1, i + len(self._users.get(h.region, ())))
        if not readers or not self._is_between(h, i, *readers):
            return range(0)
        for j in readers:
            is_product = self._name(j) == "linear" and self._operand(j, "x") == h
            if not is_product or not self._go_together(i, j) or not self._has_room(j):
                return range(0)
            y = self._operand(j + 1, "y") if self._is_gated(j) else self._operand(j, "y")
            if not self._are_apart(y, x):
                return range(0)
        return readers

    def _normed_group(self, i: int, readers: range) -> tuple[list[BoundLaunch], int]:
        """The linears of `_normed`, each with the norm in it, and how many launches they are for.

        One that goes on to a silu_mul is the last of them.
        """
        x, norm, h = (self._operand(i, name) for name in ("x", "w", "y"))
        eps, dtype = self._launches[i].launch.attr("eps"), self._dtype(h)
        plain: list[int] = []
        gated: list[BoundLaunch] = []
        for j in readers:
            y = self._operand(j + 1, "y") if self._is_gated(j) else None
            if y is not None and self._dtype(y) is dtype:
                operands = {"x": x, "norm": norm, "w": self._operand(j, "w"), "y": y}
                gated.append(self._made(NORM_SILU, j, operands, eps=eps))
            else:
                plain.append(j)
        attrs = {"eps": eps, "parts": kernels.ACT_PARTS[dtype]}
        made = self._products(plain, {"x": x, "norm": norm}, **attrs)
        return made + gated, 1 + len(readers) + len(gated)

    def _is_few(self, i: int) -> bool:
        return self._launches[i].launch.dims["T"] <= kernels.FEW_TOKENS

    def _has_room(self, i: int) -> bool:
        """Whether blocks of a linear hold all rows of x."""
        launch = self._launches[i].launch
        dtype, groups = self._dtype(self._operand(i, "x")), launch.operand("w").region.groups
        dtypes = {"w": launch.operand("w").region.dtype}
        shape = Shape(
            "norm_linear",
            launch.dims,
            dtypes,
            {},
            dtype,
            1,
            {} if groups is None else {"w": groups},
        )
        return kernels.holds_normed_rows(shape)

    # ---- what is asked of any launches

    def _name(self, i: int) -> str:
        return self._launches[i].launch.op.name if i < len(self._launches) else ""

    def _operand(self, i: int, name: str) -> _Operand:
        bound = self._launches[i]
        k = [p.name for p in bound.launch.op.params].index(name)
        stride = bound.strides[k] if bound.strides else Stride()
        return _Operand(bound.launch.operands[k], bound.addresses[k], stride, bound.max_runs)

    def _dtype(self, operand: _Operand) -> DType:
        return resolve_dtype(operand.region.dtype, self._acts)

    def _is_between(self, operand: _Operand, *launches: int) -> bool:
        """Whether these launches are all that knows of a region."""
        return self._users.get(operand.region) == set(launches)

    def _go_together(self, i: int, j: int) -> bool:
        """Whether two launches see the same rows of the same runs."""
        a, b = self._launches[i], self._launches[j]
        same = (a.runs, a.max_runs) == (b.runs, b.max_runs)
        return same and self._operand(i, "cursor") == self._operand(j, "cursor")

    def _are_apart(self, written: _Operand, read: _Operand) -> bool:
        """Whether what one launch writes is beside what another one reads."""
        if Role.SCRATCH not in (written.region.role, read.region.role):
            return True
        (a, a_stop), (b, b_stop) = written.extent(self._acts), read.extent(self._acts)
        return a_stop <= b or b_stop <= a

    def _made(
        self, op: Op, i: int, operands: Mapping[str, _Operand], **attrs: AttrValue
    ) -> BoundLaunch:
        """A launch with the runs and the cursor of launch `i`."""
        bound = self._launches[i]
        operands = {**operands, "cursor": self._operand(i, "cursor")}
        launch = bind(op, {name: o.view for name, o in operands.items()}, attrs)
        inorder = [operands[p.name] for p in op.params]
        addresses = tuple(o.address for o in inorder)
        if not bound.runs:
            return BoundLaunch(launch, addresses)
        strides = tuple(o.stride for o in inorder)
        return BoundLaunch(launch, addresses, bound.runs, strides, bound.max_runs)
