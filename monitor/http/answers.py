"""Answers of the HTTP service that a client may have already: tagged with their digest, 304 for who names it."""

from __future__ import annotations

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import Response

IMMUTABLE = "public, max-age=31536000, immutable"
MUTABLE = "no-cache"


def json_unless_known(request: Request, body: bytes, caching: str, headers: dict[str, str] | None = None) -> Response:
    """`body` is JSON already."""
    headers = tags(hashlib.sha256(body).hexdigest(), caching) | (headers or {})
    if is_known(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def tags(sha256: str, caching: str) -> dict[str, str]:
    """Headers of an answer with this digest, hex."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {
        "ETag": f'"sha256-{sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Cache-Control": caching,
    }


def is_known(request: Request, tag: str) -> bool:
    """Whether the client has what the ETag names."""
    offered = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return tag in offered or "*" in offered
