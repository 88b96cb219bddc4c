"""Rank 5: control loops: a policy at a fixed rate that can be snapshot, forked and rewound."""

from flashrt.robot.environment import Environment, EnvironmentState, PlainState
from flashrt.robot.lerobot import PolicyAgent
from flashrt.robot.loop import ControlLoop
from flashrt.robot.policy import NamedVerbs, Policy, SharedVerbs
from flashrt.robot.recording import record, replay
from flashrt.robot.rollout import Moment, Rollout, Transition, step_together
from flashrt.robot.run import RunReport, run
from flashrt.robot.together import slack_together, tick_together

__all__ = [
    "ControlLoop",
    "Environment",
    "EnvironmentState",
    "Moment",
    "NamedVerbs",
    "PlainState",
    "Policy",
    "PolicyAgent",
    "Rollout",
    "RunReport",
    "SharedVerbs",
    "Transition",
    "record",
    "replay",
    "run",
    "slack_together",
    "step_together",
    "tick_together",
]
