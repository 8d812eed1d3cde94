"""Who may read: everybody who reaches the service, or, with `monitor.token_file`, who has the token in that file.

Programs send `Authorization: Bearer TOKEN`. A browser is asked for the token once, or is given an address that ends in
`?token=TOKEN`; from then on it shows a cookie that is derived from the token and is gone from the address. Whether the
monitor lives may be asked without: /healthz. The token is compared in constant time and is in no log.
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

OPEN = ("/healthz",)
COOKIE_SECONDS = 30 * 24 * 3600
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
"""What a bearer token may consist of (RFC 6750), and long enough not to be guessed."""

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
    """ASGI: lets through who has the token, and asks the others for it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token
        # Cookies of one host are shown to all its ports: this one opens nothing but this monitor.
        self._cookie = hmac.new(token.encode(), b"sluice monitor", "sha256").hexdigest()
        self._cookie_name = f"sluice-{hashlib.sha256(self._cookie.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self._app(scope, receive, send)
        request = Request(scope)
        if _same(request.query_params.get("token", ""), self._token):
            answer = self._welcome(request)
        elif self._is_known(request):
            return await self._app(scope, receive, send)
        else:
            answer = _ask(request)
        await answer(scope, receive, send)

    def _is_known(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return (scheme.lower() == "bearer" and _same(given.strip(), self._token)) or _same(
            request.cookies.get(self._cookie_name, ""), self._cookie
        )

    def _welcome(self, request: Request) -> Response:
        """Gives the cookie and goes on to the same address without the token.

        A page, not a redirect: where a link of another site leads here, a strict cookie is not sent along a redirect.
        """
        rest = [
            (key, value) for key, value in QueryParams(request.scope["query_string"]).multi_items() if key != "token"
        ]
        # One slash: an address that begins with two would lead to another host.
        address = "/" + quote(request.scope["path"].lstrip("/")) + (f"?{urlencode(rest)}" if rest else "")
        answer = _page(
            f'<meta http-equiv="refresh" content="0;url={escape(address)}"><a href="{escape(address)}">on</a>'
        )
        answer.set_cookie(
            self._cookie_name,
            self._cookie,
            max_age=COOKIE_SECONDS,
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )
        return answer


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _ask(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return _page(
            "<h1>Sluice</h1><p>This monitor asks for its token, which is in the file that its run file names as "
            'monitor.token_file.</p><form><input type="password" name="token" aria-label="token" autofocus required> '
            "<button>Open</button></form>",
            401,
        )
    told = (
        "this monitor asks for its token: send `Authorization: Bearer TOKEN`, or set SLUICE_TOKEN for Sluice's commands"
    )
    return JSONResponse({"error": told}, 401, {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"})


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
