"""Why a call of a client is refused, with gRPC's name of the reason.

IS: the error, and the reason of errors that flashrt raises elsewhere. IS NOT: gRPC.
"""

from __future__ import annotations

import enum

from flashrt.base.errors import (
    CheckpointError,
    FlashrtError,
    LaneBusy,
    ObservationError,
    PayloadError,
    PoolFull,
)


class Reason(enum.StrEnum):
    """Names of grpc.StatusCode."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    INTERNAL = "INTERNAL"


class Refusal(FlashrtError):
    """A call that is not answered; the client's session is as it was before."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


_REASONS: tuple[tuple[type[FlashrtError], Reason], ...] = (
    (PayloadError, Reason.INVALID_ARGUMENT),
    (ObservationError, Reason.INVALID_ARGUMENT),
    (LaneBusy, Reason.RESOURCE_EXHAUSTED),
    (PoolFull, Reason.RESOURCE_EXHAUSTED),
    (CheckpointError, Reason.FAILED_PRECONDITION),
)


def reason_of(error: FlashrtError) -> Reason:
    """What a client is told that an error is."""
    if isinstance(error, Refusal):
        return error.reason
    return next((r for kind, r in _REASONS if isinstance(error, kind)), Reason.INTERNAL)
