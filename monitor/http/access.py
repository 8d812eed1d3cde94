"""Access to the service: free for everybody who reaches it or, with `monitor.token_file`, for holders of its token.

Programs send `Authorization: Bearer TOKEN`. A browser asks for the token once, or opens an address that ends in
`?token=TOKEN`: from then on it sends a cookie that is derived from the token, and the token is gone from the address.
/healthz needs none. The token is compared in constant time and never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from html import escape
from pathlib import Path
from urllib.parse import quote, urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

PUBLIC_PATHS = ("/healthz",)
COOKIE_SECONDS = 30 * 24 * 3600
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
"""Characters of a bearer token (RFC 6750), enough of them that it cannot be guessed."""

STYLE = """
:root { color-scheme: light dark; }
body { margin: 15vh auto; max-width: 32rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"


class TokenError(ValueError):
    """The token file cannot be used; `str(error)` says what to do."""


def read_token(path: Path) -> str:
    """The token in a file, blanks around it removed. Raises TokenError."""
    make = f"make one with `openssl rand -hex 24 > {path}`"
    try:
        token = path.read_text("ascii").strip()
    except OSError as error:
        raise TokenError(f"monitor.token_file = {path} cannot be read ({error.strerror}); {make}") from None
    except ValueError:
        token = ""
    if not TOKEN.fullmatch(token):
        raise TokenError(f"monitor.token_file = {path} holds no token of 16 or more letters and digits; {make}")
    return token


class TokenGate:
    """ASGI: passes requests with the token on, and asks the others for it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token
        # Browsers send the cookies of a host to all its ports: this one opens nothing but this monitor.
        self._cookie = hmac.new(token.encode(), b"sluice monitor", "sha256").hexdigest()
        self._cookie_name = f"sluice-{hashlib.sha256(self._cookie.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            return await self._app(scope, receive, send)
        request = Request(scope)
        if _is_equal(request.query_params.get("token", ""), self._token):
            response = self._start_session(request)
        elif self._is_authorized(request):
            return await self._app(scope, receive, send)
        else:
            response = _login(request)
        await response(scope, receive, send)

    def _is_authorized(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return (scheme.lower() == "bearer" and _is_equal(token.strip(), self._token)) or _is_equal(
            request.cookies.get(self._cookie_name, ""), self._cookie
        )

    def _start_session(self, request: Request) -> Response:
        """Sets the cookie and leads to the same address without the token.

        By a page and not by a redirect, along which a strict cookie is not sent after a link of another site.
        """
        parameters = [
            (key, value) for key, value in QueryParams(request.scope["query_string"]).multi_items() if key != "token"
        ]
        # One slash: an address that begins with two would lead to another host.
        address = "/" + quote(request.scope["path"].lstrip("/")) + (f"?{urlencode(parameters)}" if parameters else "")
        response = _page(
            f'<meta http-equiv="refresh" content="0;url={escape(address)}"><a href="{escape(address)}">on</a>'
        )
        response.set_cookie(
            self._cookie_name,
            self._cookie,
            max_age=COOKIE_SECONDS,
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )
        return response


def _is_equal(secret: str, expected: str) -> bool:
    return hmac.compare_digest(secret.encode(), expected.encode())


def _login(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return _page(
            "<h1>Sluice</h1><p>This monitor asks for its token, which is in the file that its run file names as "
            'monitor.token_file.</p><form><input type="password" name="token" aria-label="token" autofocus required> '
            "<button>Open</button></form>",
            401,
        )
    message = (
        "this monitor asks for its token: send `Authorization: Bearer TOKEN`, or set SLUICE_TOKEN for Sluice's commands"
    )
    return JSONResponse({"error": message}, 401, {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"})


def _page(body: str, status: int = 200) -> Response:
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sluice</title><style>{STYLE}</style>{body}",
        status,
        {
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": POLICY,
        },
    )
