"""The eyes of a server: images become tokens, and the tower sees those that will be fed.

IS: a thread of its own for both, so that neither the event loop nor the lanes' steps wait for them,
and no two images are unfolded at once; limits of what is taken. IS NOT: parts of messages (wire),
the tower (engine.images), or the memory of images (engine.sight).

What is known of a prompt is not fed, so the tower need not see its images: not those of earlier
turns, and after a restart none that the store has states of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.engine.sight import Image, Sight
from flashrt.models.sight import FIRST_WORD
from flashrt.serve.ask import Closing, QueueFull
from flashrt.serve.prefix import PrefixIndex, owner_key
from flashrt.serve.scheduler import Scheduler
from flashrt.session.engine import SessionEngine
from flashrt.text.template import ChatError
from flashrt.vision.pixels import Bounds

MOST_WAITING: Final = 64  # requests
WAIT_S: Final = 5.0  # until those who are turned away may try again
MOST_IMAGES: Final = 100  # of a conversation
MOST_NBYTES: Final = 20 << 20  # of an image, as a file
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_BOUNDS = Bounds(most_pixels=1 << 26, formats=FORMATS)

_T = TypeVar("_T")
Read = Callable[[], bytes]  # a file; raises ChatError for what is none


def _stays() -> bool:
    return False


class Eyes:
    """Of one engine; for any thread."""

    def __init__(self, engine: SessionEngine, index: PrefixIndex, scheduler: Scheduler) -> None:
        self._engine, self._index, self._scheduler = engine, index, scheduler
        self._thread = ThreadPoolExecutor(1, "flashrt-eyes")
        self._waiting = 0  # about: a bound, not a count that anything rests on

    @property
    def sight(self) -> Sight | None:
        """The engine's, if it sees."""
        return self._engine.sight

    def glance(
        self, files: Sequence[Read], is_gone: Callable[[], bool] = _stays
    ) -> Future[tuple[Image, ...]]:
        """Images whose tokens are known. Once `is_gone`, nothing more is done. Raises ImageError,
        which names the one at fault by its number; at once QueueFull, Closing.
        """
        return self._submit(lambda: self._glanced(files, is_gone))

    def look(
        self,
        owner: str,
        tokens: Sequence[int],
        images: Sequence[Image],
        is_gone: Callable[[], bool] = _stays,
    ) -> Future[None]:
        """The tower sees the images of a prompt that will be fed. Raises at once as `glance`."""
        return self._submit(lambda: self._looked(owner, tokens, images, is_gone))

    def close(self) -> None:
        """Let the image at hand be seen; nothing more. Blocks."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, work: Callable[[], _T]) -> Future[_T]:
        if self._waiting >= MOST_WAITING:
            raise QueueFull(
                f"{self._waiting} requests wait until their images are seen; try again in "
                f"{WAIT_S:.0f} s",
                WAIT_S,
            )
        try:
            future = self._thread.submit(work)
        except RuntimeError as error:
            raise Closing("the server is shutting down; send the request again later") from error
        self._waiting += 1
        future.add_done_callback(self._served)
        return future

    def _served(self, _: Future[Any]) -> None:
        self._waiting -= 1

    def _glanced(self, files: Sequence[Read], is_gone: Callable[[], bool]) -> tuple[Image, ...]:
        sight = self._engine.sight
        assert sight is not None, "asked of a model that sees"
        if len(files) > MOST_IMAGES:
            raise ImageError(
                f"the conversation has {len(files)} images; up to {MOST_IMAGES} are taken"
            )
        images = []
        for i, read in enumerate(files):
            if is_gone():
                break
            try:
                images.append(sight.glance(read(), _BOUNDS))
            except (ImageError, ChatError) as error:
                raise ImageError(f"image {i + 1} of {len(files)}: {error}") from error
        return tuple(images)

    def _looked(
        self,
        owner: str,
        tokens: Sequence[int],
        images: Sequence[Image],
        is_gone: Callable[[], bool],
    ) -> None:
        sight, prompt = self._engine.sight, np.array(tokens, np.int32)
        assert sight is not None, "asked of a model that sees"
        known = self._scheduler.call(lambda: self._known(owner, prompt)).result()
        words = np.flatnonzero(prompt >= FIRST_WORD)
        ends = words[np.cumsum([len(image.tokens) for image in images]) - 1]
        for image, end in zip(images, ends, strict=True):
            if is_gone():
                return
            if end >= known:
                sight.look(image)

    def _known(self, owner: str, prompt: NDArray[np.int32]) -> int:
        """Tokens of a prompt that some state is known of; in the scheduler's thread."""
        found = self._index.find(owner_key(owner), prompt)
        return found[0].position if found else 0
