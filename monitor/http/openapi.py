"""The JSON API as an OpenAPI 3.1 document (/openapi.json), and as a page (/docs) that asks nobody else for anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitor.http.html import render
from monitor.http.requests import html_response
from monitor.http.responses import MUTABLE
from producer.common.version import VERSION


@dataclass(frozen=True)
class Parameter:
    """A parameter of the query."""

    name: str
    kind: str
    """JSON's type."""
    meaning: str
    is_required: bool = False


@dataclass(frozen=True)
class Operation:
    """What one address answers."""

    path: str
    summary: str
    query: tuple[Parameter, ...] = ()
    method: str = "get"
    media_type: str = "application/json"
    example: str = ""
    """An address to try, without the SAE's name; empty where there is none that any run has."""

    @property
    def path_parameters(self) -> list[str]:
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


SNAPSHOT = Parameter("snapshot", "string", "a snapshot by name; by default the newest with this SAE's latents")
TEXT = Parameter("text", "string", "1 to 4,000 characters", is_required=True)
TABLE = (
    Parameter("order", "string", "index, density, strongest, norm or age"),
    Parameter("descending", "integer", "1 (default) or 0"),
    Parameter("search", "string", 'text, "quoted text", /regular expression/ or number; commas between several'),
    Parameter("density", "string", "LOW:HIGH, shares of tokens, such as 1e-4:0.01"),
    Parameter("marked", "string", "bookmark or note: the latents that people have marked so"),
    Parameter("offset", "integer", "latents to pass over"),
    Parameter("limit", "integer", "up to 500, by default 50"),
    SNAPSHOT,
)
OPERATIONS = (
    Operation("/v1/run", "State, settings, newest report and summary of the run", example="/v1/run"),
    Operation(
        "/v1/history",
        "Curves as columns",
        (
            Parameter("generation", "integer", "of the points that the caller has; others are sent whole"),
            Parameter("since", "integer", "number of points that the caller has"),
            Parameter("evaluated", "integer", "version of the evaluations that the caller has"),
        ),
        example="/v1/history",
    ),
    Operation("/v1/scaling", "The scaling law that `trainer fit` has found; 404 where none was fitted"),
    Operation(
        "/v1/snapshots",
        "Complete snapshots, oldest first",
        (
            Parameter("limit", "integer", "at most 1,000, by default 100"),
            Parameter("before", "string", "only snapshots older than this one"),
        ),
        example="/v1/snapshots",
    ),
    Operation(
        "/v1/snapshots/latest",
        "Manifest of the newest snapshot; 204 where none came in time",
        (
            Parameter("after", "string", "wait for one that is newer than this"),
            Parameter("wait", "number", "seconds, up to 300"),
        ),
        example="/v1/snapshots/latest",
    ),
    Operation("/v1/snapshots/{name}/manifest.json", "Manifest of a snapshot"),
    Operation(
        "/v1/snapshots/{name}/{path}",
        "A file that the manifest lists, or an evaluation.json; Range and If-None-Match are heeded",
        media_type="application/octet-stream",
    ),
    Operation("/v1/latents", "SAEs, each with the newest snapshot whose latents can be read", example="/v1/latents"),
    Operation("/v1/latents/{sae}", "The table of latents", TABLE),
    Operation(
        "/v1/latents/{sae}/fires",
        "The latents that fire on a text",
        (TEXT, Parameter("at", "integer", "on this token of the text alone")),
    ),
    Operation("/v1/latents/{sae}/{index}", "One latent: everything on its page", (SNAPSHOT,)),
    Operation(
        "/v1/latents/{sae}/{index}/try",
        "A latent on a text and, with a mode, its effect on the language model's next token",
        (
            TEXT,
            Parameter("mode", "string", "ablate or steer"),
            Parameter("strength", "number", "of steering, in multiples of the latent's strongest activation"),
            Parameter("at", "integer", "the token after which is predicted, by default the last"),
            SNAPSHOT,
        ),
    ),
    Operation(
        "/v1/latents/{sae}/{index}/examples",
        "Texts in which a latent fires, strongest first, and texts in which it does not",
        (Parameter("limit", "integer", "of each kind, up to 100, by default 20"), SNAPSHOT),
    ),
    Operation("/v1/notes", "Labels, notes and bookmarks of latents", example="/v1/notes"),
    Operation(
        "/v1/notes/{sae}/{index}",
        "Writes a note of a latent; an empty one removes it. Only where the monitor asks for a token",
        method="put",
    ),
)


def openapi_document() -> dict[str, Any]:
    """The OpenAPI description of OPERATIONS."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sluice monitor",
            "version": VERSION,
            "description": 'Reads one run; notes alone can be written. Errors are {"error": what is wrong}.',
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
            },
        },
        "security": [{}, {"token": []}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    in_path = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "integer", "minimum": 0} if name == "index" else {"type": "string"},
        }
        for name in operation.path_parameters
    ]
    in_query = [
        {
            "name": parameter.name,
            "in": "query",
            "required": parameter.is_required,
            "description": parameter.meaning,
            "schema": {"type": parameter.kind},
        }
        for parameter in operation.query
    ]
    schema = {"type": "string", "format": "binary"} if "octet" in operation.media_type else {"type": "object"}
    error = {
        "description": "what is wrong, and what would do",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "parameters": [*in_path, *in_query],
        "responses": {
            "200": {"description": operation.summary, "content": {operation.media_type: {"schema": schema}}},
            "default": error,
        },
    }
    if operation.method == "put":
        properties = {"label": {"type": "string"}, "note": {"type": "string"}, "is_bookmarked": {"type": "boolean"}}
        content = {"application/json": {"schema": {"type": "object", "properties": properties}}}
        described |= {"requestBody": {"required": True, "content": content}, "security": [{"token": []}]}
    return described


def openapi_routes() -> list[Route]:
    return [Route("/docs", _docs), Route("/openapi.json", _openapi)]


def _docs(request: Request) -> Response:
    return html_response(render("docs.html", title="API", operations=OPERATIONS))


def _openapi(request: Request) -> Response:
    return JSONResponse(openapi_document(), headers={"Cache-Control": MUTABLE})
