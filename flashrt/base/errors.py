"""The error tree: everything flashrt raises on purpose derives from `FlashrtError`.

IS: the names callers catch. IS NOT: formatting or recovery. Each message says what, where, and what
to do.
"""


class FlashrtError(Exception):
    """Root of all errors that flashrt raises on purpose."""


class FlagError(FlashrtError):
    """A FLASHRT_* variable is unknown or has a value that cannot be read."""


class PlanError(FlashrtError):
    """Regions, launches or an arena plan do not fit together."""


class SealedError(FlashrtError):
    """Something tried to allocate, compile or capture after `seal`."""


class BackendError(FlashrtError):
    """A device or its toolchain cannot do what was asked."""


class CompileError(BackendError):
    """Kernel sources did not compile, or no compiler was found."""


class DeviceWarning(UserWarning):
    """There is a GPU, and device="auto" does not use it."""


class CacheWarning(UserWarning):
    """Compiled kernels lie where others may write, so they are not run but compiled again."""


class CheckpointError(FlashrtError):
    """A checkpoint directory, its config or its tensors are not what the model needs."""


class CheckpointWarning(UserWarning):
    """A checkpoint runs, but not quite as it was made to: weights are rounded, or positions lie
    beyond those that it was trained on.
    """


class CapsuleError(FlashrtError):
    """A capsule cannot be used: dropped, foreign, truncated or corrupted."""


class PoolFull(FlashrtError):
    """The capsule pool has no room; nothing was changed."""


class LaneBusy(FlashrtError):
    """All lanes are in use; close a session or load with more lanes."""


class SessionError(FlashrtError):
    """A session was asked for something that its state does not allow; the state is unchanged."""


class TokenError(SessionError):
    """Token ids are not integers in [0, vocab_size)."""


class ImageError(SessionError):
    """An image cannot be read, or not be seen by the model; or it is not in memory any more."""


class GrammarError(SessionError):
    """A grammar cannot be compiled or followed, or tokens are not what it allows."""


class StoreError(CapsuleError):
    """A capsule store, or something in it, cannot be read or written; nothing was changed."""


class FleetError(FlashrtError):
    """A fleet cannot start or go on, or gave a branch up; see flashrt.fleet."""


class StoreWarning(UserWarning):
    """A call on a store waits for another process, and says for which."""


class ObservationError(SessionError):
    """An observation is not what the policy takes: shape, dtype, or a value that is not finite."""


class DeadlineMissed(SessionError):
    """An action came later than its deadline, and the loop was told to raise; it may go on."""


class RecordingError(SessionError):
    """A recording of a control loop is foreign, truncated or corrupted, or cannot be written."""


class EnvironmentFailed(SessionError):
    """An environment is closed, failed in a step, or cannot be saved; the loop is at a boundary."""


class PayloadError(FlashrtError):
    """What a client sent cannot be read, or names what is not let in; nothing of it was run."""
