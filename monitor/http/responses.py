"""Responses that a client may have cached: tagged with their digest, 304 for a client that names the tag (RFC 9110).

tagged_json     a JSON text in memory
json_file       a small JSON file, hashed as it is read
hashed_file     a large file whose digest is known, sent in chunks
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

IMMUTABLE = "public, max-age=31536000, immutable"
MUTABLE = "no-cache"


def tagged_json(request: Request, body: bytes, caching: str, headers: dict[str, str] | None = None) -> Response:
    """A response with the JSON text `body`, or 304."""
    headers = _tag_headers(hashlib.sha256(body).hexdigest(), caching) | (headers or {})
    return _not_modified(request, headers) or Response(body, media_type="application/json", headers=headers)


def json_file(
    request: Request, path: Path, caching: str, absent: str, headers: dict[str, str] | None = None
) -> Response:
    """A response with a JSON file, or 304. Raises HTTPException 404 with the message `absent` when there is none."""
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        raise HTTPException(404, absent) from None
    return tagged_json(request, body, caching, headers)


def hashed_file(request: Request, path: Path, sha256: str, absent: str) -> Response:
    """A response with an immutable file of this digest, or 304. Raises HTTPException 404 as `json_file` does."""
    headers = _tag_headers(sha256, IMMUTABLE)
    if (response := _not_modified(request, headers)) is not None:
        return response
    try:
        status = path.stat()
    except FileNotFoundError:
        raise HTTPException(404, absent) from None
    media_type = "application/json" if path.suffix == ".json" else "application/octet-stream"
    return _ChunkedFileResponse(path, headers=headers, media_type=media_type, stat_result=status)


class _ChunkedFileResponse(FileResponse):
    chunk_size = 1 << 18
    """Bytes read and sent at a time: each chunk costs a call into another thread."""


def _tag_headers(sha256: str, caching: str) -> dict[str, str]:
    """Headers of a response whose body has this digest, in hex."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {
        "ETag": f'"sha256-{sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Cache-Control": caching,
    }


def _not_modified(request: Request, headers: dict[str, str]) -> Response | None:
    """A 304 response if the request's If-None-Match names the ETag of `headers`, else None."""
    tags = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return Response(status_code=304, headers=headers) if headers["ETag"] in tags or "*" in tags else None
