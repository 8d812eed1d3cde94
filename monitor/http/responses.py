"""Responses that a client may have cached: tagged with their digest, 304 for a client that names the tag (RFC 9110)."""

from __future__ import annotations

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import Response

IMMUTABLE = "public, max-age=31536000, immutable"
MUTABLE = "no-cache"


def tagged_json(request: Request, body: bytes, caching: str, headers: dict[str, str] | None = None) -> Response:
    """A response with the JSON text `body`, or 304."""
    headers = tag_headers(hashlib.sha256(body).hexdigest(), caching) | (headers or {})
    if is_not_modified(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def tag_headers(sha256: str, caching: str) -> dict[str, str]:
    """Headers of a response whose body has this digest, in hex."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {
        "ETag": f'"sha256-{sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Cache-Control": caching,
    }


def is_not_modified(request: Request, tag: str) -> bool:
    """Whether the request's If-None-Match names the tag."""
    tags = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return tag in tags or "*" in tags
