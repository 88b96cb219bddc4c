"""flashrt: execution-state capsules for hybrid models on one device.

    engine = flashrt.load("path/to/checkpoint")
    session = engine.session()

Importing this package loads neither a device nor a tokenizer; `load` does, when it is called.
"""

from flashrt.base.errors import (
    CapsuleError,
    CheckpointError,
    FlashrtError,
    GrammarError,
    LaneBusy,
    PoolFull,
    SessionError,
)
from flashrt.capsule.capsule import Capsule
from flashrt.load import load, load_policy
from flashrt.robot.loop import ControlLoop
from flashrt.session.engine import SessionEngine as Engine
from flashrt.session.session import Session
from flashrt.session.together import together
from flashrt.text.grammar import Grammar

__all__ = [
    "Capsule",
    "CapsuleError",
    "CheckpointError",
    "ControlLoop",
    "Engine",
    "FlashrtError",
    "Grammar",
    "GrammarError",
    "LaneBusy",
    "PoolFull",
    "Session",
    "SessionError",
    "load",
    "load_policy",
    "together",
]
