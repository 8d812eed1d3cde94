"""Errors of a service: JSON for programs, a page for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from monitor.http.html import render
from monitor.http.requests import html_response

FOR_PROGRAMS = ("/v1/", "/parts", "/static/", "/metrics", "/healthz", "/readyz")
"""Beginnings of the addresses whose errors are JSON for people too."""

ErrorHandler = Callable[[Request, Exception], Response]


def error_handlers(paths: str, refusal: str) -> Mapping[type[Exception], ErrorHandler]:
    """Handlers of the errors of a Starlette application.

    `paths` are named to those who ask for another one, `refusal` to those whose method is not served.
    """

    def handle(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return JSONResponse({"error": "the monitor failed at this; its log says how"}, 500)
        message = error.detail
        if error.status_code == 404 and message == "Not Found":
            message = f"no {request.url.path!r} here; there are {paths}"
        if error.status_code == 405:
            message = f"{request.method} is not served{refusal}"
        if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith(FOR_PROGRAMS):
            return _error_page(message, error)
        return JSONResponse({"error": message}, error.status_code, headers=error.headers)

    return {HTTPException: handle, Exception: handle}


def _error_page(message: str, error: HTTPException) -> Response:
    title = "Not yet" if error.status_code == 503 else "Not here"
    html = render("error.html", title=title, text=f"{message[:1].upper()}{message[1:].removesuffix('.')}.")
    return html_response(html, error.status_code)
