"""Many engines on Ray: rollouts from trunks that travel as capsules. See docs/fleet.md.

IS: workers that own an engine each, branches placed on them, and what happens when one dies. IS
NOT: an engine, or a scheduler of machines: Ray has those. Needs `pip install 'flashrt[ray]'`.
"""

from flashrt.fleet.branch import Branch, Rollout, Trunk
from flashrt.fleet.fleet import Fleet

__all__ = ["Branch", "Fleet", "Rollout", "Trunk"]
