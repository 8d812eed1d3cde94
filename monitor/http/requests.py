"""What a request asks for, and errors of answers as statuses of responses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from monitor.evaluation.latents.views import Latent, LatentExamples, LatentTable, TextFirings, TriedText, to_json
from monitor.http.html import render
from monitor.http.responses import MUTABLE
from monitor.run_directory import NotFoundError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
View = TypeVar("View", Latent, LatentTable, TextFirings, TriedText, LatentExamples)


def with_status(answer: Callable[[], View]) -> View:
    """The explorer's answer; its errors with the status of a response."""
    try:
        return answer()
    except NotFoundError as error:
        raise HTTPException(404, str(error)) from None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def sae_of(request: Request) -> str:
    """The name of the SAE in the path or in the query."""
    return request.path_params.get("sae") or request.query_params.get("sae", "")


def integer(request: Request, name: str, default: int, least: int = -1) -> int:
    """A whole number in the query. Raises HTTPException."""
    text = request.query_params.get(name, str(default))[:20]
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise HTTPException(400, f"{name} = {text!r}: expected a whole number, at least {least}")
    return value


def real(request: Request, name: str, default: float) -> float:
    """A finite number in the query. Raises HTTPException."""
    text = request.query_params.get(name, "")[:20] or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HTTPException(400, f"{name} = {text!r}: expected a number")
    return value


def html_response(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, {"Content-Security-Policy": POLICY, "Cache-Control": MUTABLE})


def view_response(view: View) -> Response:
    return Response(to_json(view), media_type="application/json", headers={"Cache-Control": MUTABLE})


def empty(title: str, text: str) -> str:
    """HTML in the place of something that is not there."""
    return render("empty.html", title=title, text=text)
