"""The routes of the pages for people, and of the JSON behind them; they only read.

GET /                                    the live page; ?sae= &search= &order= &descending= &offset= of its table
GET /latents/{sae}/{index}               one latent; …/export is the same as a file that stands alone
GET /parts, /parts/latents, /parts/fires what the script puts into the live page, as HTML
GET /static/{name}
GET /v1/history                          curves as columns; with ?generation=, &since= and &evaluated= what is new
GET /v1/latents                          the SAEs, and the snapshot in which the latents of each are shown
GET /v1/latents/{sae}                    the table, sorted and searched as on the page; ?limit= up to 500
GET /v1/latents/{sae}/fires?text=        the latents that fire on a text; ?at= on one of its tokens
GET /v1/latents/{sae}/{index}            everything known of one latent; ?snapshot= of that one
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from monitor.history import History
from monitor.http.answers import MUTABLE, json_unless_known
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.html import STATIC, render
from monitor.http.latent_pages import COLUMNS, fires, latent_page, table
from monitor.http.live_page import SNAPSHOTS_SHOWN, Published, parts, run_page
from monitor.run_directory import NotThere, explained_saes, newest_evaluations, read_page, read_run

if TYPE_CHECKING:
    from monitor.evaluation.latents.explorer import Explorer

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SCRIPTS = ("page.js", "latent.js", "theme.js")
PLOTLY = "plotly.min.js"
ROWS = 50
MOST_ROWS = 500


def page_routes(run_directory: Path, handle: ExplorerHandle) -> list[Route]:
    pages = _Pages(run_directory, handle)
    return [
        Route("/", pages.run),
        Route("/latents/{sae}/{index:int}", pages.latent),
        Route("/latents/{sae}/{index:int}/export", pages.export),
        Route("/parts", pages.parts),
        Route("/parts/latents", pages.table_part),
        Route("/parts/fires", pages.fires_part),
        Route("/static/{name}", static),
        Route("/v1/history", pages.history),
        Route("/v1/latents", pages.saes),
        Route("/v1/latents/{sae}", pages.table),
        Route("/v1/latents/{sae}/fires", pages.fires),
        Route("/v1/latents/{sae}/{index:int}", pages.one),
    ]


class _Pages:
    def __init__(self, run_directory: Path, handle: ExplorerHandle) -> None:
        self._directory = run_directory
        self._handle = handle
        self._history = History(run_directory)

    # Starlette runs plain functions in threads, so that reading files here does not hold up other requests.

    # Pages

    def run(self, request: Request) -> Response:
        run = read_run(self._directory)
        return _page(run_page(run, self._snapshots(), self._latents(request), str(request.base_url)))

    def latent(self, request: Request) -> Response:
        return _page(latent_page(self._one(request)))

    def export(self, request: Request) -> Response:
        found = self._one(request)
        name = f"{found['sae']}-{found['index']}-{found['snapshot']}.html"
        answer = _page(latent_page(found, exported=True))
        answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return answer

    # Parts of the live page

    def parts(self, request: Request) -> Response:
        run = read_run(self._directory)
        ready = self._handle.explorer is not None
        told = parts(run, self._snapshots()) | {"latents": explained_saes(self._directory), "ready": ready}
        # The page asks every two seconds, and mostly nothing has changed.
        return json_unless_known(request, bytes(_json(told).body), MUTABLE)

    def table_part(self, request: Request) -> Response:
        return _page(self._table_or_why_not(request, _sae(request) or None))

    def fires_part(self, request: Request) -> Response:
        return _page(fires(self._fires(request, _sae(request))))

    # JSON

    def history(self, request: Request) -> Response:
        generation, evaluated = (_integer(request, name, -1) for name in ("generation", "evaluated"))
        return _json(self._history.columns(generation, _integer(request, "since", 0), evaluated))

    def saes(self, request: Request) -> Response:
        why_not = None if self._handle.explorer is not None else self._handle.reason
        return _json({"saes": explained_saes(self._directory), "why_not": why_not})

    def table(self, request: Request) -> Response:
        return _json(_asked(lambda: self._table(request, _sae(request))))

    def one(self, request: Request) -> Response:
        return _json(self._one(request))

    def fires(self, request: Request) -> Response:
        return _json(self._fires(request, _sae(request)))

    # What they are made of

    def _snapshots(self) -> Published:
        page = read_page(self._directory, SNAPSHOTS_SHOWN)
        return Published(page.entries, page.count, newest_evaluations(self._directory))

    def _latents(self, request: Request) -> dict[str, Any]:
        """What the live page needs for its section about latents."""
        saes = explained_saes(self._directory)
        names = [sae["name"] for sae in saes]
        wanted = request.query_params.get("sae")
        chosen = wanted if wanted in names else names[0] if names else None
        return {
            "saes": saes,
            "chosen": chosen,
            "search": request.query_params.get("search", ""),
            "table": self._table_or_why_not(request, chosen),
        }

    def _table_or_why_not(self, request: Request, sae: str | None) -> str:
        if sae is None:
            return _empty("No snapshot yet", "Latents can be read from the first one on.")
        if self._handle.explorer is None:
            return _empty("Not yet" if self._handle.is_expected else "Not here", self._handle.reason)
        try:
            return table(self._table(request, sae))
        except NotThere as error:
            if sae in self._handle.incompatible_saes:
                return _empty("Not here", f"{self._handle.incompatible_saes[sae]}.")
            if sae not in [known["name"] for known in explained_saes(self._directory)]:
                return _empty("No such SAE", f"{error}.")
            return _empty("Being looked at", "The language model reads held-out text with this SAE; a minute, mostly.")

    def _explorer(self) -> Explorer:
        if self._handle.explorer is None:
            raise HTTPException(503, self._handle.reason, {"Retry-After": "5"})
        return self._handle.explorer

    def _table(self, request: Request, sae: str) -> dict[str, Any]:
        query = request.query_params
        order = query.get("order", "strongest")
        if order not in COLUMNS:
            raise HTTPException(400, f"order = {order!r}: expected one of {', '.join(COLUMNS)}")
        return self._explorer().table(
            sae,
            order,  # type: ignore[arg-type]
            descending=_integer(request, "descending", 1) != 0,
            search=query.get("search", ""),
            offset=_integer(request, "offset", 0, least=0),
            limit=min(MOST_ROWS, _integer(request, "limit", ROWS, least=1)),
            snapshot=query.get("snapshot"),
        )

    def _one(self, request: Request) -> dict[str, Any]:
        path = request.path_params
        return _asked(lambda: self._explorer().latent(path["sae"], path["index"], request.query_params.get("snapshot")))

    def _fires(self, request: Request, sae: str) -> dict[str, Any]:
        at = _integer(request, "at", -1)
        text = request.query_params.get("text", "")
        return _asked(lambda: self._explorer().fires(sae, text, None if at < 0 else at))


def _asked(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except NotThere as error:
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
    """For people, what programs are told as JSON."""
    title = "Not yet" if error.status_code == 503 else "Not here"
    told = render("error.html", title=title, told=message[:1].upper() + message[1:])
    return _page(told, error.status_code)


def _page(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, {"Content-Security-Policy": POLICY, "Cache-Control": MUTABLE})


def _json(content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"Cache-Control": MUTABLE})


def _empty(title: str, told: str) -> str:
    return render("empty.html", title=title, told=told)


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
    """The library as the Python package carries it, a third as long: it is asked for through tunnels too."""
    return gzip.compress((files("plotly") / "package_data" / PLOTLY).read_bytes(), 6)
