"""Routes of single latents: their pages, texts tried on them, and the notes that people leave.

GET /latents/{sae}/{index}          the page; ?snapshot= in that one, &text= &mode= &strength= &at= with a text tried
GET /latents/{sae}/{index}/export   the same as a file that stands alone
GET /parts/try                      the part of the page about a text
GET /v1/latents/{sae}/{index}       the latent
GET /v1/latents/{sae}/{index}/try   ?text= on the latent; with &mode=ablate or steer (&strength=) the token after &at=
GET /v1/latents/{sae}/{index}/examples  texts in which it fires, and in which it does not; ?limit= up to 100 of each
GET /v1/notes                       all notes of the run
PUT /v1/notes/{sae}/{index}         writes one, {"label", "note", "is_bookmarked"}, where the monitor asks for a token
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitor.evaluation.latents.views import Latent, TriedText
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.latent_pages import NoteView, latent_page, tried_text
from monitor.http.requests import empty, html_response, integer, real, sae_of, view_response, with_status
from monitor.http.responses import MUTABLE
from monitor.notes import NoteError, Notes, parse_note
from producer.common.parsing import ParseError, parse_object

if TYPE_CHECKING:
    from monitor.evaluation.latents.explorer import Explorer

EXAMPLES = 20
MOST_EXAMPLES = 100
LARGEST_BODY = 1 << 16
"""Bytes of a note in a request."""


def latent_routes(notes: Notes, handle: ExplorerHandle, is_writable: bool) -> list[Route]:
    pages = _Latents(notes, handle, is_writable)
    return [
        Route("/latents/{sae}/{index:int}", pages.page),
        Route("/latents/{sae}/{index:int}/export", pages.export),
        Route("/parts/try", pages.try_part),
        Route("/v1/latents/{sae}/{index:int}", pages.latent),
        Route("/v1/latents/{sae}/{index:int}/try", pages.try_text),
        Route("/v1/latents/{sae}/{index:int}/examples", pages.examples),
        Route("/v1/notes", pages.all_notes),
        Route("/v1/notes/{sae}/{index:int}", pages.write_note, methods=["PUT"]),
    ]


class _Latents:
    """Handlers of requests."""

    def __init__(self, notes: Notes, handle: ExplorerHandle, is_writable: bool) -> None:
        self._notes = notes
        self._handle = handle
        self._is_writable = is_writable

    def page(self, request: Request) -> Response:
        latent = self._latent(request)
        text = request.query_params.get("text", "")
        tried = self._tried_or_reason(request) if text.strip() else ""
        return html_response(latent_page(latent, self._note(latent), text=text, tried=tried))

    def export(self, request: Request) -> Response:
        latent = self._latent(request)
        response = html_response(latent_page(latent, self._note(latent), exported=True))
        name = f"{latent.sae}-{latent.index}-{latent.snapshot}.html"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return response

    def latent(self, request: Request) -> Response:
        return view_response(self._latent(request))

    def try_part(self, request: Request) -> Response:
        return html_response(tried_text(self._try(request)))

    def try_text(self, request: Request) -> Response:
        return view_response(self._try(request))

    def examples(self, request: Request) -> Response:
        count = min(MOST_EXAMPLES, integer(request, "limit", EXAMPLES, 1))
        index, snapshot = request.path_params["index"], request.query_params.get("snapshot")
        return view_response(with_status(lambda: self._explorer().examples(sae_of(request), index, count, snapshot)))

    def all_notes(self, request: Request) -> Response:
        content = {"notes": self._notes.all(), "is_writable": self._is_writable}
        return JSONResponse(content, headers={"Cache-Control": MUTABLE})

    async def write_note(self, request: Request) -> Response:
        """Writes a note, for those who have shown the token: `TokenGate` has let them in."""
        if not self._is_writable:
            message = "notes are read only here: set monitor.token_file, so that the monitor knows who may write"
            raise HTTPException(403, message)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise HTTPException(413, f"a note of over {LARGEST_BODY:,} bytes; shorten it")
        return await run_in_threadpool(self._write_note, request, bytes(body))

    def _write_note(self, request: Request, body: bytes) -> Response:
        sae, index = sae_of(request), request.path_params["index"]
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "expected Content-Type: application/json")
        try:
            source = with_status(lambda: self._explorer().latent(sae, index))
            self._notes.write(sae, index, parse_note(parse_object(body), source.snapshot))
        except (ParseError, NoteError) as error:
            raise HTTPException(400, str(error)) from None
        except OSError as error:
            raise HTTPException(503, f"the note could not be written: {error.strerror or error}") from None
        return JSONResponse({"note": self._notes.all().get(sae, {}).get(str(index))})

    def _note(self, latent: Latent) -> NoteView:
        return NoteView(self._notes.of_sae(latent.sae).get(latent.index), self._is_writable)

    def _explorer(self) -> Explorer:
        return self._handle.require()

    def _latent(self, request: Request) -> Latent:
        index, snapshot = request.path_params["index"], request.query_params.get("snapshot")
        return with_status(lambda: self._explorer().latent(sae_of(request), index, snapshot))

    def _tried_or_reason(self, request: Request) -> str:
        try:
            return tried_text(self._try(request))
        except HTTPException as error:
            return empty("Not shown", error.detail)

    def _try(self, request: Request) -> TriedText:
        from monitor.evaluation.latents.intervention import parse_mode  # imports torch, as the explorer does

        query, at = request.query_params, integer(request, "at", -1)
        index = request.path_params["index"] if "index" in request.path_params else integer(request, "latent", 0, 0)
        strength = real(request, "strength", 1.0)
        return with_status(
            lambda: self._explorer().try_text(
                sae_of(request),
                index,
                query.get("text", ""),
                parse_mode(query.get("mode", "")),
                strength,
                None if at < 0 else at,
                query.get("snapshot"),
            )
        )
