"""Rank 6: a policy for robots elsewhere, over the gRPC of LeRobot's async inference.

`PolicyServer` is what the four calls do, `Listener` the port that they come in by; the latter needs
grpcio. Payloads are pickles, and no unpickler ever sees them: see pickles.
"""

from flashrt.policy_server.clients import ServerOptions
from flashrt.policy_server.policies import Policies
from flashrt.policy_server.server import PolicyServer

__all__ = ["Policies", "PolicyServer", "ServerOptions"]
