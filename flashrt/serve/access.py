"""What the server allows: keys, origins, sizes and times.

IS: one frozen record of options, and who an API key is. IS NOT: their enforcement (gate, http).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

OPEN = "everyone"  # the owner where no key is asked for


@dataclass(frozen=True, slots=True)
class Access:
    """keys: API keys; none of them: everyone may ask. hosts: names that a request may give as its
    Host; none: any. origins: web pages of other hosts that may ask; "*": all.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    body_nbytes: int = 16 << 20
    body_s: float = 30.0  # for a body to arrive
    timeout_s: float | None = None  # for a request, in the queue and out of it
    logs_prompts: bool = False
    more: dict[str, object] = field(default_factory=dict)  # shown by /props

    def owner(self, key: str | None) -> str | None:
        """Whose a key is: a name that is none of its letters; None if nobody's. All keys are
        compared whole, whichever fits.
        """
        if not self.keys:
            return OPEN
        given = hashlib.sha256((key or "").encode(errors="surrogateescape")).digest()
        found: str | None = None
        for known in self.keys:
            digest = hashlib.sha256(known.encode()).digest()
            if hmac.compare_digest(digest, given) and key is not None:
                found = f"key-{digest.hex()[:16]}"
        return found
