"""Routes of the pages, and of the JSON behind them; they only read.

GET /                                    the live page; ?sae= &search= &order= &descending= &offset= of its table
GET /latents/{sae}/{index}               one latent; …/export is the same as a file that stands alone
GET /parts, /parts/latents, /parts/fires parts of the live page, as HTML, for its script
GET /static/{name}
GET /v1/history                          curves as columns; with ?generation=, &since= and &evaluated= only newer points
GET /v1/latents                          the SAEs, each with the newest snapshot whose latents can be read
GET /v1/latents/{sae}                    the table, sorted and searched as on the page; ?density=LOW:HIGH, ?limit= up
                                         to 500
GET /v1/latents/{sae}/fires?text=        the latents that fire on a text; with &at= on one of its tokens
GET /v1/latents/{sae}/{index}            one latent; ?snapshot= in that one
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast, get_args
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from monitor.evaluation.latents.views import Latent, LatentTable, Order, TextFirings, to_json
from monitor.history import History
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.html import STATIC, render
from monitor.http.latent_pages import latent_page, latent_table, text_firings
from monitor.http.live_page import SNAPSHOTS_SHOWN, LatentSection, RunSnapshots, parts, run_page
from monitor.http.responses import MUTABLE, tagged_json
from monitor.run_directory import NotFoundError, newest_evaluations, read_page, read_run, saes_with_latents

if TYPE_CHECKING:
    from monitor.evaluation.latents.explorer import Explorer

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SCRIPTS = ("page.js", "charts.js", "live_page.js", "runs.js", "latent.js", "theme.js")
PLOTLY = "plotly.min.js"
TABLE_ROWS = 50
MOST_TABLE_ROWS = 500
ORDERS = get_args(Order)

View = TypeVar("View", Latent, LatentTable, TextFirings)


def page_routes(run_directory: Path, handle: ExplorerHandle) -> list[Route]:
    pages = _Pages(run_directory, handle)
    return [
        Route("/", pages.live_page),
        Route("/latents", _to_table),
        Route("/latents/{sae}", _to_table),
        Route("/latents/{sae}/{index:int}", pages.latent_page),
        Route("/latents/{sae}/{index:int}/export", pages.export),
        Route("/parts", pages.parts),
        Route("/parts/latents", pages.table_part),
        Route("/parts/fires", pages.firings_part),
        Route("/static/{name}", static),
        Route("/v1/history", pages.history),
        Route("/v1/latents", pages.saes),
        Route("/v1/latents/{sae}", pages.table),
        Route("/v1/latents/{sae}/fires", pages.firings),
        Route("/v1/latents/{sae}/{index:int}", pages.latent),
    ]


class _Pages:
    """Handlers of requests. Starlette runs plain functions in threads, so that reading files holds up nobody."""

    def __init__(self, run_directory: Path, handle: ExplorerHandle) -> None:
        self._directory = run_directory
        self._handle = handle
        self._history = History(run_directory)

    # Pages

    def live_page(self, request: Request) -> Response:
        run = read_run(self._directory)
        return html_response(run_page(run, self._snapshots(), self._latent_section(request), str(request.base_url)))

    def latent_page(self, request: Request) -> Response:
        return html_response(latent_page(self._latent(request)))

    def export(self, request: Request) -> Response:
        latent = self._latent(request)
        response = html_response(latent_page(latent, exported=True))
        name = f"{latent.sae}-{latent.index}-{latent.snapshot}.html"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return response

    # Parts of the live page

    def parts(self, request: Request) -> Response:
        is_ready = self._handle.explorer is not None
        content = {
            **parts(read_run(self._directory), self._snapshots()),
            "latents": saes_with_latents(self._directory),
            "ready": is_ready,
        }
        # The page asks every two seconds, and mostly nothing has changed.
        return tagged_json(request, json.dumps(content, ensure_ascii=False, allow_nan=False).encode(), MUTABLE)

    def table_part(self, request: Request) -> Response:
        return html_response(self._table_or_reason(request, _sae(request) or None))

    def firings_part(self, request: Request) -> Response:
        return html_response(text_firings(self._firings(request)))

    # JSON

    def history(self, request: Request) -> Response:
        generation, evaluated = (_integer(request, name, -1) for name in ("generation", "evaluated"))
        columns = self._history.columns(generation, _integer(request, "since", 0), evaluated)
        return JSONResponse(columns, headers={"Cache-Control": MUTABLE})

    def saes(self, request: Request) -> Response:
        reason = None if self._handle.explorer is not None else self._handle.reason
        content = {"saes": saes_with_latents(self._directory), "why_not": reason}
        return JSONResponse(content, headers={"Cache-Control": MUTABLE})

    def table(self, request: Request) -> Response:
        table = _with_status(lambda: self._table(request, _sae(request)))
        if (asked := _integer(request, "offset", 0, least=0)) >= table.matching:
            table = replace(
                table, offset=asked, latents=[]
            )  # the page shows the last one; a script would go on for ever
        return _json(table)

    def latent(self, request: Request) -> Response:
        return _json(self._latent(request))

    def firings(self, request: Request) -> Response:
        return _json(self._firings(request))

    # Contents

    def _snapshots(self) -> RunSnapshots:
        page = read_page(self._directory, SNAPSHOTS_SHOWN)
        return RunSnapshots(page.entries, page.count, newest_evaluations(self._directory))

    def _latent_section(self, request: Request) -> LatentSection:
        names = [sae["name"] for sae in saes_with_latents(self._directory)]
        requested = request.query_params.get("sae")
        selected = requested if requested in names else names[0] if names else None
        query = request.query_params
        text = query.get("text", "")
        return LatentSection(
            names,
            selected,
            query.get("search", ""),
            query.get("density", ""),
            text,
            table=self._table_or_reason(request, selected),
            firings=self._firings_or_reason(request, selected) if selected and text.strip() else "",
        )

    def _firings_or_reason(self, request: Request, sae: str) -> str:
        """The latents that fire on the text of the address as HTML, or why there are none."""
        try:
            return text_firings(self._firings(request, sae))
        except HTTPException as error:
            return _empty("Not shown", error.detail)

    def _table_or_reason(self, request: Request, sae: str | None) -> str:
        """The table as HTML, or why there is none."""
        if sae is None:
            return _empty("No snapshot yet", "Latents can be read from the first one on.")
        if self._handle.explorer is None:
            return _empty("Not yet" if self._handle.is_expected else "Not here", self._handle.reason)
        try:
            return latent_table(self._table(request, sae))
        except NotFoundError as error:
            if sae in self._handle.incompatible_saes:
                return _empty("Not here", f"{self._handle.incompatible_saes[sae]}.")
            if sae not in [known_sae["name"] for known_sae in saes_with_latents(self._directory)]:
                return _empty("No such SAE", f"{error}.")
            activity = f" Now {self._handle.activity}." if self._handle.activity else ""
            text = f"The language model reads held-out text with this SAE, which mostly takes a minute.{activity}"
            return _empty("Being computed", text)
        except ValueError as error:
            return _empty("Not understood", f"{error}.")

    def _explorer(self) -> Explorer:
        if self._handle.explorer is None:
            raise HTTPException(503, self._handle.reason, {"Retry-After": "5"})
        return self._handle.explorer

    def _table(self, request: Request, sae: str) -> LatentTable:
        query = request.query_params
        order = query.get("order", "strongest")
        if order not in ORDERS:
            raise HTTPException(400, f"order = {order!r}: expected one of {', '.join(ORDERS)}")
        return self._explorer().table(
            sae,
            cast(Order, order),
            descending=_integer(request, "descending", 1) != 0,
            search=query.get("search", ""),
            offset=_integer(request, "offset", 0, least=0),
            limit=min(MOST_TABLE_ROWS, _integer(request, "limit", TABLE_ROWS, least=1)),
            snapshot=query.get("snapshot"),
            density=query.get("density", ""),
        )

    def _latent(self, request: Request) -> Latent:
        index, snapshot = request.path_params["index"], request.query_params.get("snapshot")
        return _with_status(lambda: self._explorer().latent(_sae(request), index, snapshot))

    def _firings(self, request: Request, sae: str = "") -> TextFirings:
        at = _integer(request, "at", -1)
        text = request.query_params.get("text", "")
        return _with_status(lambda: self._explorer().fires(sae or _sae(request), text, None if at < 0 else at))


def _to_table(request: Request) -> Response:
    """Leads people who shorten an address to the table of latents."""
    sae = request.path_params.get("sae")
    return RedirectResponse(f"/?{urlencode({'sae': sae})}#latents" if sae else "/#latents")


def _with_status(answer: Callable[[], View]) -> View:
    """The explorer's answer; its errors with the status of a response."""
    try:
        return answer()
    except NotFoundError as error:
        raise HTTPException(404, str(error)) from None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def _sae(request: Request) -> str:
    return request.path_params.get("sae") or request.query_params.get("sae", "")


def _integer(request: Request, name: str, default: int, least: int = -1) -> int:
    text = request.query_params.get(name, str(default))[:20]
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise HTTPException(400, f"{name} = {text!r}: expected a whole number, at least {least}")
    return value


def error_page(message: str, error: HTTPException) -> Response:
    """A page for people with what programs get as JSON."""
    title = "Not yet" if error.status_code == 503 else "Not here"
    html = render("error.html", title=title, text=f"{message[:1].upper()}{message[1:]}.")
    return html_response(html, error.status_code)


def html_response(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, {"Content-Security-Policy": POLICY, "Cache-Control": MUTABLE})


def _json(view: View) -> Response:
    return Response(to_json(view), media_type="application/json", headers={"Cache-Control": MUTABLE})


def _empty(title: str, text: str) -> str:
    return render("empty.html", title=title, text=text)


# --- Scripts ---------------------------------------------------------------------------------------------------------


def static(request: Request) -> Response:
    name = request.path_params["name"]
    if name == PLOTLY:
        headers = {"Content-Encoding": "gzip", "Cache-Control": "public, max-age=86400"}
        return Response(_plotly(), media_type="text/javascript", headers=headers)
    if name not in SCRIPTS:
        raise HTTPException(404, f"no {name!r} here; there are {', '.join((*SCRIPTS, PLOTLY))}")
    return Response((STATIC / name).read_bytes(), media_type="text/javascript", headers={"Cache-Control": MUTABLE})


@lru_cache
def _plotly() -> bytes:
    """The library of the Python package, compressed to a third: it also goes through SSH tunnels."""
    return gzip.compress((files("plotly") / "package_data" / PLOTLY).read_bytes(), 6)
