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

from collections.abc import Sequence

from flashrt.capsule.lineage import Lane
from flashrt.robot.policy import Array, Cursor, Policy, SharingPolicy


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


# -- the same for several lanes of one engine, in as few replays --------------------------------


def run_tick_together(
    engine: SharingPolicy, lanes: Sequence[Lane], observations: Sequence[Array]
) -> list[Array]:
    """`run_tick` of each: one replay for those that have an action, three for those that have run
    out. Nobody has looked yet whether the actions are finite.
    """
    is_out = [has_run_out(engine.cursor(lane)) for lane in lanes]
    out = [i for i, empty in enumerate(is_out) if empty]
    going = [i for i, empty in enumerate(is_out) if not empty]
    found: dict[int, Array] = {}
    if out:
        empty_lanes = [lanes[i] for i in out]
        engine.observe_together_trusted(empty_lanes, [observations[i] for i in out])
        engine.plan_together(empty_lanes, 0)
        found.update(zip(out, engine.act_together(empty_lanes), strict=True))
    if going:
        seen = [observations[i] for i in going]
        actions = engine.tick_together_trusted([lanes[i] for i in going], seen)
        found.update(zip(going, actions, strict=True))
    return [found[i] for i in range(len(lanes))]


def run_slack_together(
    engine: SharingPolicy, lanes: Sequence[Lane], overlaps: Sequence[int]
) -> list[bool]:
    """`run_slack` of each: one replay for chunks that are made at once, one for those that are
    begun, one for each Euler step, of all lanes that are at it.
    """
    pairs = zip(lanes, overlaps, strict=True)
    rows = [committed_rows(engine.cursor(lane), overlap) for lane, overlap in pairs]
    if at_once := [lane for lane, n in zip(lanes, rows, strict=True) if n == 1]:
        engine.plan_together(at_once, 1)
    if begun := [(lane, n) for lane, n in zip(lanes, rows, strict=True) if n > 1]:
        engine.begin_plan_together([lane for lane, _ in begun], [n for _, n in begun])
    due = [euler_steps_due(engine.cursor(lane)) for lane in lanes]
    is_planned = [n > 0 or steps > 0 for n, steps in zip(rows, due, strict=True)]
    while any(due):
        left = [
            engine.cursor(lane).plan_steps_left if due[i] else 0 for i, lane in enumerate(lanes)
        ]
        at_it = [i for i, steps in enumerate(left) if steps == max(left)]  # the furthest behind
        engine.continue_plan_together([lanes[i] for i in at_it])
        for i in at_it:
            due[i] -= 1
    return is_planned
