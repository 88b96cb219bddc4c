"""gymnasium, or the error that says how to install it.

IS: the one import of gymnasium in flashrt. IS NOT: an environment. Exists because gymnasium is an
extra: who installed flashrt alone must be told its name, not that a module is missing.
"""

from flashrt.base.errors import FlashrtError

try:
    import gymnasium
except ImportError as error:
    raise FlashrtError(
        "the environments of flashrt.worlds need gymnasium: pip install 'flashrt[gym]'"
    ) from error

__all__ = ["gymnasium"]
