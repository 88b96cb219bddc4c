"""When to plan, and a policy's verbs in that order: a pure function of a lane's cursor.

IS: the rule, and what a tick and the slack after it call on an engine. IS NOT: state: the cursor is
all there is, so a capsule needs no company. It looks at no clock: results do not depend on timing.

A chunk planned from the observation of tick t has its row j for tick t + j. With tick n to come and
the actions promised up to `stop`, exclusive:

    before the action of tick n    n >= stop            plan from this tick's observation, at once
    in the slack after tick t      stop - t <= overlap  plan; rows [0, stop - t) are as promised

The second is real-time chunking (arXiv 2506.07339) by conditioning on the prefix (2512.05964).
"""

from __future__ import annotations

from flashrt.capsule.lineage import Lane
from flashrt.robot.policy import Array, Cursor, Policy


def has_run_out(cursor: Cursor) -> bool:
    """Whether nothing is promised for the tick to come."""
    return cursor.tick >= cursor.stop


def committed_rows(cursor: Cursor, overlap: int) -> int:
    """Rows promised to a chunk that is begun in this slack; 0: none is due."""
    is_fresh = 0 <= cursor.observed == cursor.tick - 1
    if cursor.plan_steps_left or not is_fresh:
        return 0
    left = cursor.stop - cursor.observed
    return left if 1 <= left <= overlap else 0


def euler_steps_due(cursor: Cursor) -> int:
    """Euler steps for this slack: what is left, spread evenly over the slacks left."""
    slacks = max(1, cursor.stop - cursor.tick + 1)
    return -(-cursor.plan_steps_left // slacks)


def run_tick(engine: Policy, lane: Lane, observation: Array) -> Array:
    """One tick: its action, float32 [action_dim]. The observation was checked."""
    if has_run_out(engine.cursor(lane)):
        engine.observe_trusted(lane, observation)
        engine.plan(lane, 0)
        return engine.act(lane)
    return engine.tick_trusted(lane, observation)


def run_slack(engine: Policy, lane: Lane, overlap: int) -> bool:
    """The part of a chunk that is due in the slack; whether there was one."""
    cursor = engine.cursor(lane)
    committed = committed_rows(cursor, overlap)
    if not committed and not cursor.plan_steps_left:
        return False
    if committed == 1:  # this slack is all there is
        engine.plan(lane, 1)
        return True
    if committed:
        engine.begin_plan(lane, committed)
    for _ in range(euler_steps_due(engine.cursor(lane))):
        engine.continue_plan(lane)
    return True
