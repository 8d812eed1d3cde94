"""Routes of the live page, and of the JSON behind it; they only read.

GET /                                    the live page; ?sae= &search= &order= &descending= &offset= of its table
GET /parts, /parts/latents, /parts/fires parts of the live page, as HTML, for its script
GET /scaling                             the page of the scaling law that `python -m trainer fit` has found
GET /v1/scaling                          the same as JSON
GET /static/{name}
GET /v1/history                          curves as columns; with ?generation=, &since= and &evaluated= only newer points
GET /v1/latents                          the SAEs, each with the newest snapshot whose latents can be read
GET /v1/latents/{sae}                    the table, sorted and searched as on the page; ?density=LOW:HIGH, ?limit= up
                                         to 500
GET /v1/latents/{sae}/fires?text=        the latents that fire on a text; with &at= on one of its tokens

Those of single latents are in `latent_routes`.
"""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import cast, get_args
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from monitor.evaluation.latents.views import LatentTable, Order, TextFirings
from monitor.files import read_json
from monitor.history import History
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.html import STATIC
from monitor.http.latent_pages import latent_table, text_firings
from monitor.http.latent_routes import latent_routes
from monitor.http.live_page import MARKS, SNAPSHOTS_SHOWN, LatentSection, RunSnapshots, parts, run_page
from monitor.http.requests import empty, html_response, integer, sae_of, view_response, with_status
from monitor.http.responses import MUTABLE, tagged_json
from monitor.http.scaling_page import scaling_json, scaling_page
from monitor.notes import Notes
from monitor.run_directory import NotFoundError, newest_evaluations, read_page, read_run, saes_with_latents
from producer.common.shell import shell_command
from trainer.scaling.report import FILE as SCALING
from trainer.scaling.report import ScalingReport

SCRIPTS = ("page.js", "charts.js", "live_page.js", "runs.js", "latent.js", "scaling.js", "theme.js")
PLOTLY = "plotly.min.js"
TABLE_ROWS = 50
MOST_TABLE_ROWS = 500
ORDERS = get_args(Order)


def page_routes(run_directory: Path, handle: ExplorerHandle, is_writable: bool) -> list[Route]:
    """The routes; notes are written only where the service asks for a token."""
    notes = Notes(run_directory)
    pages = _Pages(run_directory, handle, notes)
    return [
        Route("/", pages.live_page),
        Route("/latents", _to_table),
        Route("/latents/{sae}", _to_table),
        Route("/parts", pages.parts),
        Route("/parts/latents", pages.table_part),
        Route("/parts/fires", pages.firings_part),
        Route("/scaling", pages.scaling_page),
        Route("/static/{name}", static),
        Route("/v1/scaling", pages.scaling),
        Route("/v1/history", pages.history),
        Route("/v1/latents", pages.saes),
        Route("/v1/latents/{sae}", pages.table),
        Route("/v1/latents/{sae}/fires", pages.firings),
        *latent_routes(notes, handle, is_writable),
    ]


class _Pages:
    """Handlers of requests. Starlette runs plain functions in threads, so that reading files holds up nobody."""

    def __init__(self, run_directory: Path, handle: ExplorerHandle, notes: Notes) -> None:
        self._directory = run_directory
        self._handle = handle
        self._notes = notes
        self._history = History(run_directory)

    # Pages

    def live_page(self, request: Request) -> Response:
        run = read_run(self._directory)
        return html_response(run_page(run, self._snapshots(), self._latent_section(request), str(request.base_url)))

    def scaling_page(self, request: Request) -> Response:
        return html_response(scaling_page(self._directory.name, self._scaling_report()))

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
        return html_response(self._table_or_reason(request, sae_of(request) or None))

    def firings_part(self, request: Request) -> Response:
        return html_response(text_firings(self._firings(request)))

    # JSON

    def history(self, request: Request) -> Response:
        generation, evaluated = (integer(request, name, -1) for name in ("generation", "evaluated"))
        columns = self._history.columns(generation, integer(request, "since", 0), evaluated)
        return JSONResponse(columns, headers={"Cache-Control": MUTABLE})

    def scaling(self, request: Request) -> Response:
        if (report := self._scaling_report()) is None:
            command = shell_command("trainer", "fit", "RUN_DIR")
            raise HTTPException(404, f"no scaling law was fitted to this run; `{command}` fits one")
        return JSONResponse(scaling_json(report), headers={"Cache-Control": MUTABLE})

    def saes(self, request: Request) -> Response:
        reason = None if self._handle.explorer is not None else self._handle.reason
        content = {"saes": saes_with_latents(self._directory), "why_not": reason}
        return JSONResponse(content, headers={"Cache-Control": MUTABLE})

    def table(self, request: Request) -> Response:
        table = with_status(lambda: self._table(request, sae_of(request)))
        if (offset := integer(request, "offset", 0, least=0)) >= table.matching:
            # The page shows the last one; a script would go on for ever.
            table = replace(table, offset=offset, latents=[])
        return view_response(table)

    def firings(self, request: Request) -> Response:
        return view_response(self._firings(request))

    # Contents

    def _scaling_report(self) -> ScalingReport | None:
        """What `python -m trainer fit` has found; None where nothing was fitted, or by another version."""
        document = read_json(self._directory / SCALING, self._directory)
        with suppress(ValueError):
            return None if document is None else ScalingReport.from_json(document)
        return None

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
            query.get("marked", ""),
            text,
            table=self._table_or_reason(request, selected),
            firings=self._firings_or_reason(request, selected) if selected and text.strip() else "",
        )

    def _firings_or_reason(self, request: Request, sae: str) -> str:
        """The latents that fire on the text of the address as HTML, or why there are none."""
        try:
            return text_firings(self._firings(request, sae))
        except HTTPException as error:
            return empty("Not shown", error.detail)

    def _table_or_reason(self, request: Request, sae: str | None) -> str:
        """The table as HTML, or why there is none."""
        if sae is None:
            return empty("No snapshot yet", "Latents can be read from the first one on.")
        if self._handle.explorer is None:
            return empty("Not yet" if self._handle.is_expected else "Not here", self._handle.reason)
        try:
            return latent_table(self._table(request, sae), self._notes.of_sae(sae), self._marked(request))
        except NotFoundError as error:
            if sae in self._handle.incompatible_saes:
                return empty("Not here", f"{self._handle.incompatible_saes[sae]}.")
            if sae not in [known_sae["name"] for known_sae in saes_with_latents(self._directory)]:
                return empty("No such SAE", f"{error}.")
            activity = f" Now {self._handle.activity}." if self._handle.activity else ""
            text = f"The language model reads held-out text with this SAE, which mostly takes a minute.{activity}"
            return empty("Being computed", text)
        except ValueError as error:
            return empty("Not understood", f"{error}.")

    def _table(self, request: Request, sae: str) -> LatentTable:
        query = request.query_params
        order = query.get("order", "strongest")
        if order not in ORDERS:
            raise HTTPException(400, f"order = {order!r}: expected one of {', '.join(ORDERS)}")
        return self._handle.require().table(
            sae,
            cast(Order, order),
            descending=integer(request, "descending", 1) != 0,
            search=query.get("search", ""),
            offset=integer(request, "offset", 0, least=0),
            limit=min(MOST_TABLE_ROWS, integer(request, "limit", TABLE_ROWS, least=1)),
            snapshot=query.get("snapshot"),
            density=query.get("density", ""),
            among=self._notes_that(request, sae),
        )

    def _marked(self, request: Request) -> str:
        """Which latents are asked for: all, or those with a bookmark, a label or a note."""
        marked = request.query_params.get("marked", "")
        if marked not in dict(MARKS):
            raise HTTPException(400, f"marked = {marked[:20]!r}: expected bookmark or note, or nothing")
        return marked

    def _notes_that(self, request: Request, sae: str) -> list[int] | None:
        """The latents with the marks that are asked for; None for all latents."""
        if not (marked := self._marked(request)):
            return None
        notes = self._notes.of_sae(sae).items()
        return [index for index, note in notes if note.is_bookmarked or marked == "note"]

    def _firings(self, request: Request, sae: str = "") -> TextFirings:
        at = integer(request, "at", -1)
        text = request.query_params.get("text", "")
        return with_status(lambda: self._handle.require().fires(sae or sae_of(request), text, None if at < 0 else at))


def _to_table(request: Request) -> Response:
    """Leads people who shorten an address to the table of latents."""
    sae = request.path_params.get("sae")
    return RedirectResponse(f"/?{urlencode({'sae': sae})}#latents" if sae else "/#latents")


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
