"""The floating-point mode of the calling thread: how the host's own arithmetic rounds.

IS: the default mode (to nearest, subnormals kept) for a block of Python and numpy, whatever other
code made of the thread's: fesetround, or a library that was linked with -ffast-math.
IS NOT: for kernels; they set theirs by themselves. It exists because weights are converted and
parameters are rounded on the host: in another mode a load would give another model.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from flashrt.base.errors import FlashrtError

# Variables, for the compiler of Python would compute with constants itself.
_ONE, _LITTLE = 1.0, 2.0**-55  # less than half of what separates 1 from its neighbours
_HALF, _LEAST_NORMAL = 0.5, 2.0**-1022
_ENVIRONMENT_NBYTES = 256  # of C's fenv_t, with room to spare
_TO_NEAREST = 0  # FE_TONEAREST of every C library


def is_default() -> bool:
    """Whether this thread rounds to nearest and keeps subnormal numbers."""
    return _ONE + _LITTLE == _ONE - _LITTLE and _LEAST_NORMAL * _HALF > 0.0


class DefaultFloatMode:
    """A `with` block that computes in the default mode; afterwards the thread has its own again.

    Entering raises FlashrtError where the mode cannot be changed.
    """

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before: object = None

    def __enter__(self) -> None:
        if is_default():
            return
        take, put = _functions()
        before = ctypes.create_string_buffer(_ENVIRONMENT_NBYTES)
        take(before)
        put(None)
        if not is_default():
            put(before)
            raise FlashrtError(
                "this thread rounds floating-point numbers in another way than to nearest, or "
                "flushes small ones to zero, and it cannot be undone here: call flashrt from a "
                "thread that does not, or before the library that changed it"
            )
        self._before = before

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            _functions()[1](self._before)


@functools.cache
def _functions() -> tuple[Callable[[object], object], Callable[[object], object]]:
    """C's fegetenv, and fesetenv; None is the default environment."""
    library = ctypes.CDLL(None)  # the process
    if not hasattr(library, "fesetenv"):  # not linked against libm
        library = ctypes.CDLL("libm.so.6")

    def put(environment: object) -> None:
        if environment is not None:
            library.fesetenv(environment)
        elif hasattr(library, "_FE_DFL_ENV"):  # macOS
            library.fesetenv(ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV")))
        else:
            library.fesetenv(ctypes.c_void_p(-1))
            library.fesetround(_TO_NEAREST)

    return library.fegetenv, put
