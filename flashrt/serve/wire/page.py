"""GET /: the page, and its files.

IS: static files and the headers that keep other hosts out of them. IS NOT: what the page does
(serve/page), or any of its data: it asks the routes that all clients ask.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from flashrt.serve.http import Call
from flashrt.serve.refusal import Refusal

FOLDER = Path(__file__).parent.parent / "page"
INDEX = "page.html"
FILES = {
    INDEX: "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "tree.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def page(call: Call) -> Response:
    """GET / and GET /page/{name}."""
    name = call.request.path_params.get("name", INDEX)
    if name not in FILES:
        raise Refusal(404, f"the page has no file {name[:80]!r}")
    data = (FOLDER / name).read_bytes()
    return Response(data, media_type=FILES[name], headers=HEADERS)
