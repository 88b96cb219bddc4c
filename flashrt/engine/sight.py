"""What a lane's engine sees: images and the rows that they become, kept in host memory.

IS: an image -> its words and rows, made once per content; tokens with such words among them -> what
a launch takes besides. IS NOT: the tower (images), the meaning of words (models/sight), or reading
of files (vision/pixels).

The memory is bounded, oldest use first; an image that somebody holds stays as long as that. One
that has left it is still itself: whoever feeds its words again, as a rollback does, must show it
again first, and is told so before anything changes. For any thread: the tower has a lock of its
own, so that lanes go on beside it.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.base.locks import reentrant_lock, while_holding
from flashrt.engine.images import ImageEngine
from flashrt.models.qwen35.patches import fitted, patches_of
from flashrt.models.sight import FIRST_WORD, LEAST_ROWS, words_of
from flashrt.vision.pixels import ANY, Bounds, Picture, file_of, pixels_of

DEFAULT_BYTES = 256 << 20  # of rows that are kept
Words = NDArray[np.int32]
_T = TypeVar("_T")


class Image:
    """An image as a session takes it: `tokens` go among the other tokens of a prompt. While it is
    held, it can be fed. Made by `Sight`.
    """

    def __init__(self, tokens: Words, height: int, width: int, pixels: NDArray[np.uint8]) -> None:
        self.tokens = tokens  # [height * width]: words that stand for its rows
        self.height = height  # in tokens
        self.width = width
        self._pixels: NDArray[np.uint8] | None = pixels  # until the tower has seen them
        self._rows: NDArray[np.float32] | None = None  # [height * width, hidden]


class Given(NamedTuple):
    """What a launch of tokens takes besides: see models.sight."""

    seen: NDArray[np.float32]  # [n, hidden]
    offsets: Words  # [n, 3]
    growth: int


@dataclass(slots=True)
class SightCounters:
    """Since loading."""

    shown: int = 0  # images that were given, again or for the first time
    decoded: int = 0  # those whose file was not known
    seen: int = 0  # runs of the tower
    seen_s: float = 0.0  # what they took


class Sight:
    """A tower and what it has seen. `most_bytes`: of rows that are kept."""

    def __init__(self, tower: ImageEngine, most_bytes: int = DEFAULT_BYTES) -> None:
        self.tower = tower
        self.most_bytes = most_bytes
        self.counters = SightCounters()
        self._kept: OrderedDict[Image, None] = OrderedDict()  # used longest ago first
        # All that are held by somebody: by hashes of files, by all words, and by the first one.
        self._by_file: weakref.WeakValueDictionary[bytes, Image] = weakref.WeakValueDictionary()
        self._by_words: weakref.WeakValueDictionary[bytes, Image] = weakref.WeakValueDictionary()
        self._by_first: dict[int, tuple[weakref.ref[Image], ...]] = {}
        self._books = reentrant_lock()  # held for a few lines
        self._looking = reentrant_lock()  # held while the tower runs

    @property
    def image_token(self) -> int:
        """What a chat template writes for an image."""
        return self.tower.model.config.image_token

    @property
    def nbytes(self) -> int:
        """Bytes of rows that are kept."""
        kept = self._alone(lambda: list(self._kept))
        return sum(image._rows.nbytes for image in kept if image._rows is not None)

    def image(self, picture: Picture) -> Image:
        """An image, ready to be fed. Raises ImageError for what is none, or too small."""
        image = self.glance(picture)
        self.look(image)
        return image

    def glance(self, picture: Picture, bounds: Bounds = ANY) -> Image:
        """An image whose tokens are known; the tower sees it when it is fed, or with `look`.

        Raises ImageError for what is none, or too small, or beyond the bounds.
        """
        file = file_of(picture)
        self.counters.shown += 1
        if file is None:
            return self._glanced(np.asarray(picture), bounds)
        source = hashlib.blake2b(file, digest_size=32).digest()
        known = self._by_file.get(source)
        if known is None:
            known = self._glanced(file, bounds)
            self._by_file[source] = known
        return known

    def look(self, image: Image) -> None:
        """Let the tower see an image, unless it has; its rows are kept. Takes a while: one at a
        time, whichever thread asks.
        """
        self._rows_of(image)

    def check(self, before: Words, tokens: Words) -> None:
        """Raises ImageError unless all images of tokens that follow `before` are in memory."""
        for _ in self._images_in(before, tokens):
            pass

    def given(self, before: Words, tokens: Words) -> Given | None:
        """What goes with tokens that follow others; None where they are text alone.

        An image may be cut at either end. Raises ImageError for words of none that is in memory.
        """
        n, hidden = len(tokens), self.tower.model.config.out
        seen, offsets = np.zeros((n, hidden), np.float32), np.zeros((n, 3), np.int32)
        moved = at = 0
        is_text = True
        for image, start, count in self._images_in(before, tokens):
            is_text, rows = False, self._rows_of(image)
            offsets[at : max(start, 0)] = moved
            r = np.arange(max(-start, 0), count)
            seen[start + r] = rows[r]
            y, x = np.divmod(r, image.width)
            offsets[start + r] = moved + np.stack([-r, y - r, x - r], axis=1)
            at = start + count
            if count == len(image.tokens):
                moved += max(image.height, image.width) - count
        if is_text:
            return None
        offsets[at:] = moved
        return Given(seen, offsets, moved)

    def _images_in(self, before: Words, tokens: Words) -> Iterator[tuple[Image, int, int]]:
        """Images among tokens that follow others, as they come: each with the index of its first
        word, negative where it began before, and how many of its words are there.
        """
        at = np.flatnonzero(tokens >= FIRST_WORD)
        if not len(at):
            return
        first = len(before)  # of the words that the tokens may go on with
        while first and at[0] == 0 and before[first - 1] >= FIRST_WORD:
            first -= 1
        skipped, words = len(before) - first, np.concatenate([before[first:], tokens])
        i = 0 if skipped else int(at[0])
        while i < len(words):
            image, count = self._match(words[i:])
            if i + count > skipped:
                yield image, i - skipped, count
            following = np.flatnonzero(words[i + count :] >= FIRST_WORD)
            i = i + count + int(following[0]) if len(following) else len(words)

    def _match(self, words: Words) -> tuple[Image, int]:
        """The image that words begin with, and how many of the words are its."""
        best: tuple[int, Image] | None = None
        for reference in self._by_first.get(int(words[0]), ()):
            if (image := reference()) is None:
                continue
            own = image.tokens[: len(words)]
            differ = np.flatnonzero(own != words[: len(own)])
            count = int(differ[0]) if len(differ) else len(own)
            if best is None or count > best[0]:
                best = count, image
        if best is None:
            raise ImageError(
                f"a token {words[0]} is of an image that is not in memory; show it again "
                "(engine.image), then repeat the call; engine.sight.most_bytes is "
                f"{self.most_bytes:,}: raise it where a prompt has more"
            )
        count, image = best
        return image, count

    # -- inside ---------------------------------------------------------------------------------

    def _glanced(self, picture: bytes | NDArray[np.uint8], bounds: Bounds) -> Image:
        c = self.tower.model.config
        most = self.tower.model.buckets[-1] * c.patch**2
        pixels = pixels_of(picture, lambda tall, wide: fitted(c, tall, wide, most), bounds)
        self.counters.decoded += 1
        height, width = (n // (c.patch * c.merge) for n in pixels.shape[:2])
        if height * width < LEAST_ROWS:
            raise ImageError(
                f"the image is {width} x {height} tokens; {LEAST_ROWS} are needed to tell it from "
                "others: enlarge it"
            )
        words = words_of(pixels, height * width)
        return self._alone(lambda: self._entered(Image(words, height, width, pixels)))

    def _entered(self, image: Image) -> Image:
        """An image among those that are known, or the one that has the same words."""
        key, first = image.tokens.tobytes(), int(image.tokens[0])
        known = self._by_words.get(key)
        if known is not None:
            return known
        living = {
            word: alive
            for word, refs in self._by_first.items()
            if (alive := tuple(ref for ref in refs if ref() is not None))
        }
        living[first] = (*living.get(first, ()), weakref.ref(image))
        self._by_first = living
        self._by_words[key] = image
        return image

    def _rows_of(self, image: Image) -> NDArray[np.float32]:
        """Its rows, made unless they are there; it was used just now."""
        rows = image._rows
        if rows is None:
            rows = while_holding([self._looking], lambda: self._made(image))
        self._alone(lambda: self._note_use(image))
        return rows

    def _made(self, image: Image) -> NDArray[np.float32]:
        if image._rows is not None:  # by whoever had the tower before
            return image._rows
        assert image._pixels is not None, "dropped only where there are rows"
        began = time.perf_counter()
        rows = self.tower.see(patches_of(self.tower.model.config, image._pixels))
        self.counters.seen += 1
        self.counters.seen_s += time.perf_counter() - began
        image._rows = rows
        image._pixels = None
        return rows

    def _note_use(self, image: Image) -> None:
        self._kept[image] = None
        self._kept.move_to_end(image)
        while len(self._kept) > 1 and self.nbytes > self.most_bytes:
            self._kept.popitem(last=False)

    def _alone(self, work: Callable[[], _T]) -> _T:
        """`work()` with the books: see base.locks.while_holding."""
        return while_holding([self._books], work)
