"""The HTTP service: serves the snapshots of a run directory, and changes nothing in it but notes.

    GET / and its parts                         the pages for people, and their JSON: `monitor.http.routes`
    GET /docs, /openapi.json                    the JSON API described: `monitor.http.openapi`
    GET /v1/run                                 settings, newest report, summary
    GET /v1/snapshots                           the newest complete snapshots, oldest first; ?limit= of them, older than
                                                ?before=NAME; `next` is the address of older ones, `count` that of all
    GET /v1/snapshots/latest                    the newest manifest; ?after=NAME&wait=SECONDS waits for a newer one
    GET /v1/snapshots/{name}/manifest.json
    GET /v1/snapshots/{name}/{path}             a file of the manifest (Range, ETag, immutable), or an evaluation.json
    GET /healthz  /readyz  /metrics

Only files that a manifest lists are served, so that no path of a request reaches the file system unchecked, and links
out of a snapshot are not followed. The sha256 of a file stands in the manifest and is its ETag: nothing is hashed to
serve it. A file that is being sent stays whole when its snapshot is retired, since the open file outlives its name.
Errors are JSON: {"error": the problem, and what exists}.

The service runs at the lowest priority and within a budget of CPU time (`monitor.http.throttle`), so that a flood of
requests does not slow the training.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitor.files import is_within
from monitor.http.access import TokenGate
from monitor.http.errors import error_handlers
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.openapi import openapi_routes
from monitor.http.responses import IMMUTABLE, MUTABLE, hashed_file, json_file, tagged_json
from monitor.http.routes import page_routes
from monitor.http.throttle import CpuThrottle
from monitor.run_directory import read_page, read_run, why_not_ready
from monitor.snapshot_index import index_of, manifest_of
from producer.common.server import DEFAULT_LIMITS, ServerLimits, listen, serve
from trainer.snapshot import NAME, Manifest, SnapshotError, describe_names

LONGEST_WAIT_SECONDS = 300.0
POLL_SECONDS = 0.5
"""How often a waiting request looks for a newer snapshot."""
NICE = 19
PATHS = (
    "/, /scaling, /docs, /v1/run, /v1/history, /v1/scaling, /v1/snapshots, /v1/snapshots/latest, /v1/latents, "
    "/v1/notes, /healthz, /readyz, /metrics"
)


@dataclass(frozen=True)
class PageSizes:
    """Snapshots in one response of /v1/snapshots: without `limit`, and at most."""

    default: int = 100
    most: int = 1000


DEFAULT_PAGE_SIZES = PageSizes()


def make_app(
    run_directory: Path,
    registry: CollectorRegistry,
    unhealthy: Callable[[], str | None] = lambda: None,
    token: str | None = None,
    handle: ExplorerHandle | None = None,
    page_sizes: PageSizes = DEFAULT_PAGE_SIZES,
) -> Starlette:
    """The service over one run directory, which need not exist yet; with a `token`, only for clients that have it.

    `unhealthy` returns the problem, if there is one; `handle` holds the explorer that answers questions about latents.
    """
    handle = handle or ExplorerHandle(reason="This monitor does not evaluate.", is_expected=False)
    routes = _Routes(run_directory, registry, unhealthy, page_sizes, handle)
    return Starlette(
        routes=[
            *page_routes(run_directory, handle, is_writable=token is not None),
            *openapi_routes(),
            Route("/v1/run", routes.run),
            Route("/v1/snapshots", routes.snapshots),
            Route("/v1/snapshots/latest", routes.latest),
            Route("/v1/snapshots/{name}/manifest.json", routes.manifest),
            Route("/v1/snapshots/{name}/{path:path}", routes.file),
            Route("/metrics", routes.metrics),
            Route("/healthz", routes.healthz),
            Route("/readyz", routes.readyz),
        ],
        middleware=[Middleware(TokenGate, token=token)] if token else [],
        exception_handlers=error_handlers(PATHS, refusal=" here: this service only reads, but for notes"),
    )


def start_service(
    app: Starlette,
    host: str,
    port: int,
    is_training: Callable[[], bool] = lambda: True,
    allowed_hosts: Collection[str] | None = (),
    limits: ServerLimits = DEFAULT_LIMITS,
) -> tuple[int, Callable[[], None]]:
    """Serves `app` from a thread; returns the port and a function that closes it. Port 0 is any free one.

    While `is_training`, the service keeps to its share of CPU time. `allowed_hosts` is that of
    `producer.common.server`; an app that asks for a token needs none. Raises OSError, naming host and port, when it
    cannot listen there.
    """
    try:
        listener = listen(host, port, limits)
    except OSError as error:
        raise OSError(
            f"cannot serve snapshots on {host}, port {port}: {error.strerror or error}. "
            "Set monitor.service_port to another port, or to 0 for any free one"
        ) from None
    names = None if allowed_hosts is None else {host, *allowed_hosts}
    return listener.getsockname()[1], serve(CpuThrottle(app, is_training), listener, "service", names, NICE, limits)


class _Routes:
    """Handlers of requests for the run and its snapshots.

    Starlette runs plain functions in threads, so that reading files holds up no other request.
    """

    def __init__(
        self,
        run_directory: Path,
        registry: CollectorRegistry,
        unhealthy: Callable[[], str | None],
        page_sizes: PageSizes,
        handle: ExplorerHandle,
    ) -> None:
        self.run_directory = run_directory
        self.registry = registry
        self.unhealthy = unhealthy
        self.page_sizes = page_sizes
        self.handle = handle
        self.index = index_of(run_directory)

    def run(self, request: Request) -> Response:
        content = {**read_run(self.run_directory), "evaluation": self.handle.activity or None}
        return JSONResponse(content, headers={"Cache-Control": MUTABLE})

    def snapshots(self, request: Request) -> Response:
        limit, before = _parse_page(request, self.page_sizes)
        page = read_page(self.run_directory, limit, before)
        names = self.index.names()
        older = None if page.older is None else f"/v1/snapshots?limit={limit}&before={page.older}"
        content = {
            "latest": names[-1] if names else None,
            "count": page.count,
            "snapshots": page.entries,
            "next": older,
        }
        return tagged_json(
            request, json.dumps(content, default=vars, ensure_ascii=False, allow_nan=False).encode(), MUTABLE
        )

    async def latest(self, request: Request) -> Response:
        after, seconds = _parse_wait(request)
        if (name := await self._wait_for_newer(request, after, seconds)) is not None:
            location = {"Content-Location": f"/v1/snapshots/{name}/manifest.json"}
            return await run_in_threadpool(self._manifest_response, request, name, MUTABLE, location)
        if after:
            return Response(status_code=204, headers={"Cache-Control": MUTABLE})
        raise HTTPException(404, f"no snapshot yet in {self.run_directory.name}; ask again with ?wait=SECONDS")

    async def _wait_for_newer(self, request: Request, after: str, seconds: float) -> str | None:
        """The newest snapshot, once it is newer than `after`; None when none comes in time, or the client has left."""
        deadline = time.monotonic() + seconds
        while True:
            names = self.index.names()  # one look at one folder, which is cheaper than a call into another thread
            if names and names[-1] > after:
                return names[-1]
            if time.monotonic() >= deadline or await request.is_disconnected():
                return None
            await asyncio.sleep(POLL_SECONDS)

    def manifest(self, request: Request) -> Response:
        return self._manifest_response(request, request.path_params["name"], IMMUTABLE, {})

    def _manifest_response(self, request: Request, name: str, caching: str, headers: dict[str, str]) -> Response:
        folder = self._folder(name)
        _read_manifest(folder)
        return json_file(request, folder / "manifest.json", caching, _retired(folder), headers)

    def file(self, request: Request) -> Response:
        name, path = request.path_params["name"], request.path_params["path"]
        folder = self._folder(name)
        manifest = _read_manifest(folder)
        digests = {file.path: file.sha256 for file in manifest.files}
        evaluations = [f"{sae}/evaluation.json" for sae in manifest.saes]
        if path not in digests and path not in evaluations:
            raise HTTPException(
                404, f"snapshot {name} has no file {path!r}; it has manifest.json, {', '.join(digests)}"
            )
        target = folder / path
        if not is_within(target, folder):
            raise HTTPException(404, f"{path!r} lies outside of snapshot {name}")
        if path in evaluations and path not in digests:
            return json_file(request, target, MUTABLE, f"snapshot {name} has no {path} yet: it is not evaluated")
        return hashed_file(request, target, digests[path], _retired(folder))

    def _folder(self, name: str) -> Path:
        """The folder of one complete snapshot. Raises HTTPException 404 for any other name."""
        names = self.index.names()
        index = bisect_left(names, name)
        folder = self.run_directory / "snapshots" / name
        if index < len(names) and names[index] == name and (folder / "manifest.json").is_file():
            return folder
        raise HTTPException(404, f"no snapshot {name!r} (retired, or never published); {describe_names(names)}")

    def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"Content-Type": content_type})

    def healthz(self, request: Request) -> Response:
        return _health_response(self.unhealthy())

    def readyz(self, request: Request) -> Response:
        return _health_response(why_not_ready(self.run_directory))


def _health_response(reason: str | None) -> Response:
    body, status = ({"error": reason}, 503) if reason else ({"status": "ok"}, 200)
    return JSONResponse(body, status, {"Cache-Control": "no-store"})


def _read_manifest(folder: Path) -> Manifest:
    try:
        return manifest_of(folder)
    except SnapshotError as error:
        raise HTTPException(404, str(error)) from None


def _retired(folder: Path) -> str:
    return f"snapshot {folder.name} has just been retired"


# --- Requests and errors ---------------------------------------------------------------------------------------------


def _parse_wait(request: Request) -> tuple[str, float]:
    """(the name that the snapshot must follow, seconds to wait) of a request for the latest snapshot."""
    after, wait = request.query_params.get("after", ""), request.query_params.get("wait", "0")
    if after and not _is_name(after):
        raise HTTPException(400, f"after = {after!r}: expected a snapshot's name, such as 000001234567")
    try:
        seconds = float(wait)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise HTTPException(400, f"wait = {wait!r}: expected seconds from 0 to {LONGEST_WAIT_SECONDS:g}")
    return after, seconds


def _parse_page(request: Request, sizes: PageSizes) -> tuple[int, str | None]:
    """(number of snapshots, the name that they must precede) of a request for the list."""
    limit, before = request.query_params.get("limit", str(sizes.default)), request.query_params.get("before")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 10 and int(limit) > 0):
        raise HTTPException(400, f"limit = {limit[:20]!r}: expected a whole number from 1 to {sizes.most:,}")
    if before is not None and not _is_name(before):
        raise HTTPException(400, f"before = {before[:20]!r}: expected a snapshot's name, such as 000001234567")
    return min(int(limit), sizes.most), before


def _is_name(text: str) -> bool:
    return text.isascii() and NAME.fullmatch(text) is not None
