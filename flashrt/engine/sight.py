"""What a lane's engine sees: images and the rows that they become, kept in host memory.

IS: an image -> its words and rows, made once per content; tokens with such words among them -> what
a launch takes besides. IS NOT: the tower (images), the meaning of words (models/sight), or reading
of files (vision/pixels).

The memory is bounded, oldest use first. An image that has left it is still itself: whoever feeds
its words again, as a rollback does, must show it again first, and is told so before anything
changes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ImageError
from flashrt.engine.images import ImageEngine
from flashrt.models.qwen35.patches import fitted, patches_of
from flashrt.models.sight import FIRST_WORD, LEAST_ROWS, words_of
from flashrt.vision.pixels import Picture, file_of, pixels_of

DEFAULT_BYTES = 256 << 20  # of rows that are kept
Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image as a session takes it: `tokens` go among the other tokens of a prompt."""

    tokens: Words  # [height * width]: words that stand for its rows
    height: int  # in tokens
    width: int


class _Known(NamedTuple):
    image: Image
    rows: NDArray[np.float32]  # [height * width, hidden]


class Given(NamedTuple):
    """What a launch of tokens takes besides: see models.sight."""

    seen: NDArray[np.float32]  # [n, hidden]
    offsets: Words  # [n, 3]
    growth: int


class Sight:
    """A tower and what it has seen. `most_bytes`: of rows that are kept."""

    def __init__(self, tower: ImageEngine, most_bytes: int = DEFAULT_BYTES) -> None:
        self.tower = tower
        self.most_bytes = most_bytes
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # by all words of an image
        self._by_first: dict[int, list[bytes]] = {}  # keys of `_known` by the first word
        self._by_file: dict[bytes, bytes] = {}  # by hashes of files: what need not be decoded

    @property
    def image_token(self) -> int:
        """What a chat template writes for an image."""
        return self.tower.model.config.image_token

    @property
    def nbytes(self) -> int:
        """Bytes of rows that are kept."""
        return sum(known.rows.nbytes for known in self._known.values())

    def image(self, picture: Picture) -> Image:
        """An image, ready to be fed. Raises ImageError for what is none, or too small."""
        file = file_of(picture)
        if file is None:
            key = self._seen(np.asarray(picture))
        else:
            source = hashlib.blake2b(file, digest_size=32).digest()
            key = self._by_file.get(source) or self._seen(file)
            self._by_file[source] = key
        self._known.move_to_end(key)
        return self._known[key].image

    def _seen(self, picture: bytes | NDArray[np.uint8]) -> bytes:
        """The words of an image, which is in memory from here on."""
        c = self.tower.model.config
        most = self.tower.model.buckets[-1] * c.patch**2
        pixels = pixels_of(picture, lambda tall, wide: fitted(c, tall, wide, most))
        height, width = (n // (c.patch * c.merge) for n in pixels.shape[:2])
        if height * width < LEAST_ROWS:
            raise ImageError(
                f"the image is {width} x {height} tokens; {LEAST_ROWS} are needed to tell it from "
                "others: enlarge it"
            )
        words = words_of(pixels, height * width)
        key = words.tobytes()
        if key not in self._known:
            rows = self.tower.see(patches_of(c, pixels))
            self._make_room(rows.nbytes)
            self._known[key] = _Known(Image(words, height, width), rows)
            self._by_first.setdefault(int(words[0]), []).append(key)
        return key

    def _make_room(self, nbytes: int) -> None:
        while self._known and self.nbytes + nbytes > self.most_bytes:
            gone, known = self._known.popitem(last=False)
            first = int(known.image.tokens[0])
            self._by_first[first].remove(gone)
            if not self._by_first[first]:
                del self._by_first[first]
            self._by_file = {file: key for file, key in self._by_file.items() if key != gone}

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
        for image, rows, start, count in self._images_in(before, tokens):
            is_text = False
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

    def _images_in(
        self, before: Words, tokens: Words
    ) -> Iterator[tuple[Image, NDArray[np.float32], int, int]]:
        """Images among tokens that follow others, as they come: each with its rows, the index of
        its first word, negative where it began before, and how many of its words are there.
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
            image, rows, count = self._match(words[i:])
            if i + count > skipped:
                yield image, rows, i - skipped, count
            following = np.flatnonzero(words[i + count :] >= FIRST_WORD)
            i = i + count + int(following[0]) if len(following) else len(words)

    def _match(self, words: Words) -> tuple[Image, NDArray[np.float32], int]:
        """The image that words begin with, its rows, and how many of the words are its."""
        best: tuple[int, bytes] | None = None
        for key in self._by_first.get(int(words[0]), ()):
            own = self._known[key].image.tokens[: len(words)]
            differ = np.flatnonzero(own != words[: len(own)])
            count = int(differ[0]) if len(differ) else len(own)
            if best is None or count > best[0]:
                best = count, key
        if best is None:
            raise ImageError(
                f"a token {words[0]} is of an image that is not in memory; show it again "
                "(engine.image), then repeat the call; engine.sight.most_bytes is "
                f"{self.most_bytes:,}: raise it where a prompt has more"
            )
        count, key = best
        self._known.move_to_end(key)
        image, rows = self._known[key]
        return image, rows, count
