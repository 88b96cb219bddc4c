"""Images in requests: the parts and blocks that each API has for them, checked, as one form.

IS: which part is an image, and that it is one that can be had: within the request, in base64, of a
format that is read; else a refusal that names the field and the way out. IS NOT: decoding (eyes).
Nothing is fetched from the network, and no file of the server is opened.
"""

from __future__ import annotations

from typing import Any

from flashrt.base.messages import shown
from flashrt.serve.body import Fields
from flashrt.serve.eyes import FORMATS, MOST_NBYTES
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.served import Served

TYPES = ("image_url", "input_image")  # of parts, in OpenAI's APIs
_MEDIA = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
_ALIASES = {"image/jpg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}
_DETAILS = ("auto", "low", "high", "original")
_MOST_HEAD = 200  # characters before the data
_MOST_CHARS = -(-MOST_NBYTES // 3) * 4
_HOW = "send the image itself, as data:image/png;base64,..."


def part_of(part: Fields, served: Served) -> dict[str, Any]:
    """OpenAI's {"type": "image_url", "image_url": {"url", "detail"?}}, and {"type": "input_image",
    "image_url": url, "detail"?}; in the first form, a data URI. Refuses what cannot be had.
    """
    check_sees(part, served)
    part.refused("file_id", f"files are not kept here: {_HOW}")
    holder, name = part, "image_url"
    if isinstance(part.get("image_url"), dict):
        holder, name = Fields(part.get("image_url"), part.path("image_url")), "url"
    holder.text("detail", _DETAILS)  # all are seen in full
    url = holder.needed_text(name)
    scheme, _, rest = url[:_MOST_HEAD].partition(":")
    if scheme.lower() != "data":
        raise _unfetched(holder.path(name), url)
    head, comma, _ = rest.partition(",")
    media, *options = (word.strip().lower() for word in head.split(";"))
    if not comma or options[-1:] != ["base64"]:
        path = holder.path(name)
        raise bad(path, f"{path} begins with {shown(url[:40])}; {_HOW}", "invalid_image_url")
    return _made(holder, name, media, url[url.index(",") + 1 :])


def block_of(block: Fields, served: Served) -> dict[str, Any]:
    """Anthropic's {"type": "image", "source": {"type": "base64", "media_type", "data"}}, in the
    same form. Refuses what cannot be had.
    """
    check_sees(block, served)
    source = block.object("source")
    if source is None:
        raise block.refuse("source", 'an object {"type": "base64", "media_type", "data"}')
    kind = source.needed_text("type")
    how = "send the image itself, in base64"
    if kind == "url":
        path = source.path("type")
        raise bad(path, f"{path} is 'url'; the server fetches nothing: {how}")
    if kind == "file":
        path = source.path("type")
        raise bad(path, f"{path} is 'file'; files are not kept here: {how}")
    source.text("type", ("base64",))
    media = source.needed_text("media_type").lower()
    return _made(source, "data", media, source.needed_text("data"), "media_type")


def check_sees(part: Fields, served: Served) -> None:
    """Refuse an image where the model was loaded without a tower."""
    if not served.sees:
        path = part.path("type")
        raise bad(
            path, f"{path} is {shown(part.get('type'))}; {served.blind}", "unsupported_content"
        )


def _made(
    holder: Fields, name: str, media: str, data: str, media_name: str | None = None
) -> dict[str, Any]:
    media = _ALIASES.get(media, media)
    if media not in _MEDIA:
        path = holder.path(media_name or name)
        raise bad(
            path,
            f"{path}: the media type is {shown(media)}; images are {', '.join(FORMATS)}",
            "invalid_image_format",
        )
    if len(data) > _MOST_CHARS:
        path = holder.path(name)
        raise bad(
            path,
            f"{path}: the image has over {MOST_NBYTES:,} bytes, the most that is taken: scale it "
            "down, or compress it more",
            "image_too_large",
        )
    if not data:
        raise bad(holder.path(name), f"{holder.path(name)}: the image has no bytes; {_HOW}",
                  "invalid_image_url")  # fmt: skip
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}


def _unfetched(path: str, url: str) -> Refusal:
    return bad(
        path,
        f"{path} is {shown(url[:80])}; the server fetches nothing, neither from the network nor "
        f"from its disk: {_HOW}",
        "invalid_image_url",
    )
