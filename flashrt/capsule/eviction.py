"""Eviction: which capsules leave the device when the pool is full, and where they go.

IS: budgets per tier, and the order: cheapest to make again per byte freed goes first. IS NOT: the
moving (tiers).

Nothing is lost: capsules are demoted, device -> host -> disk, within the budgets; when those are
full too, the pool is. Never demoted: what is pinned, and what a live lane would go back to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flashrt.capsule import tiers
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Tier
from flashrt.capsule.lineage import Lane, chain_of
from flashrt.capsule.table import CapsuleTable


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that demoted capsules may take; 0 and 0: a full pool is full."""

    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A capsule that could go."""

    capsule: Capsule
    n_tokens: int  # to prefill from the nearest boundary below it, should it be made again
    freed_nbytes: int

    @property
    def worth(self) -> float:
        """Tokens to prefill per byte; the measured speed is the same for all, so it cancels."""
        return self.n_tokens / max(self.freed_nbytes, 1)


def make_room(table: CapsuleTable, budgets: Budgets, busy: Iterable[Lane]) -> bool:
    """Demote one capsule from the device; False when none may go.

    Raises CapsuleError when the disk tier cannot be written.
    """
    if not budgets.host_bytes and not budgets.disk_bytes:
        return False
    protected = in_use(table, busy)
    for candidate in candidates(table, Tier.DEVICE, protected):
        if _fits_host(table, budgets, candidate.freed_nbytes, protected):
            candidate.capsule.to(Tier.HOST)
            return True
        used = table.used_nbytes(Tier.DISK)
        if used + candidate.freed_nbytes <= budgets.disk_bytes:
            candidate.capsule.to(Tier.DISK)
            return True
    return False


def candidates(
    table: CapsuleTable, tier: Tier, protected: frozenset[Capsule] = frozenset()
) -> list[Candidate]:
    """Capsules of a tier that may leave it and free something, cheapest first."""
    below = {Tier.DEVICE: Tier.HOST, Tier.HOST: Tier.DISK}[tier]
    ends = {c.segment for c in table.capsules}
    found = []
    for capsule in table.capsules - protected:
        if capsule.is_pinned or capsule.fixed.tier is not tier:
            continue
        moving = tiers.to_move(table.capsules, capsule, below)
        freed = sum(item.extent.nbytes for item in moving if item.extent.tier is tier)
        older = (s.stop for s in chain_of(capsule.segment) if s in ends)
        base = max((p for p in older if p < capsule.position), default=0)
        found.append(Candidate(capsule, capsule.position - base, freed))
    return sorted(found, key=lambda c: (c.worth, c.capsule.position))


def in_use(table: CapsuleTable, busy: Iterable[Lane]) -> frozenset[Capsule]:
    """What live lanes would go back to."""
    found = (table.boundaries(lane, lane.position) for lane in busy)
    return frozenset(c for c in found if isinstance(c, Capsule))


def _fits_host(
    table: CapsuleTable, budgets: Budgets, nbytes: int, protected: frozenset[Capsule]
) -> bool:
    """Whether the host tier has room, or gets it by sending its cheapest to disk."""
    if nbytes > budgets.host_bytes:
        return False
    for candidate in candidates(table, Tier.HOST, protected):
        if table.used_nbytes(Tier.HOST) + nbytes <= budgets.host_bytes:
            break
        if table.used_nbytes(Tier.DISK) + candidate.freed_nbytes <= budgets.disk_bytes:
            candidate.capsule.to(Tier.DISK)
    return table.used_nbytes(Tier.HOST) + nbytes <= budgets.host_bytes
