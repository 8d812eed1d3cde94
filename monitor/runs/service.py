"""The service of several runs, and the process behind `python -m monitor serve`. It only reads.

GET /                       the page
GET /parts                  its parts, as HTML, for its script
GET /v1/runs                all runs, with the numbers of their SAEs and the frontiers
GET /v1/runs/{run}          one run, as /v1/run of its own monitor has it
GET /v1/runs/{run}/history  its curves, as /v1/history of its own monitor has them
GET /static/{name}, /healthz
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from monitor.history import History
from monitor.http.access import TokenGate
from monitor.http.errors import error_handlers
from monitor.http.requests import html_response
from monitor.http.responses import MUTABLE, tagged_json
from monitor.http.routes import static
from monitor.http.service import start_service
from monitor.run_directory import is_training, read_run
from monitor.runs.directories import find_runs
from monitor.runs.page import parts, runs_page
from monitor.runs.records import RunRecord, frontiers, read_record

MOST_POINTS = 600
"""Points of one curve: the page draws those of all runs."""
PATHS = "/, /v1/runs, /v1/runs/{run}, /v1/runs/{run}/history, /healthz"

log = logging.getLogger("sluice.monitor")


def make_runs_app(paths: Sequence[Path], token: str | None = None) -> Starlette:
    """The service over the runs in `paths`; with a `token`, only for clients that have it."""
    pages = _Runs(paths)
    return Starlette(
        routes=[
            Route("/", pages.page),
            Route("/parts", pages.parts),
            Route("/static/{name}", static),
            Route("/v1/runs", pages.runs),
            Route("/v1/runs/{run:path}/history", pages.history),
            Route("/v1/runs/{run:path}", pages.run),
            Route("/healthz", lambda request: JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})),
        ],
        middleware=[Middleware(TokenGate, token=token)] if token else [],
        exception_handlers=error_handlers(PATHS, refusal=": this service only reads"),
    )


class _Runs:
    """Handlers of requests. Runs are looked for at each, so that new ones appear."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._histories: dict[Path, History] = {}

    def page(self, request: Request) -> Response:
        return html_response(runs_page(self._records(), [str(path) for path in self._paths]))

    def parts(self, request: Request) -> Response:
        body = json.dumps(parts(self._records()), ensure_ascii=False, allow_nan=False)
        return tagged_json(request, body.encode(), MUTABLE)

    def runs(self, request: Request) -> Response:
        records = self._records()
        content = {"runs": [asdict(record) for record in records], "frontiers": frontiers(records)}
        return tagged_json(request, json.dumps(content, ensure_ascii=False, allow_nan=False).encode(), MUTABLE)

    def run(self, request: Request) -> Response:
        return JSONResponse(read_run(self._directory(request)), headers={"Cache-Control": MUTABLE})

    def history(self, request: Request) -> Response:
        directory = self._directory(request)
        with self._lock:
            history = self._histories.setdefault(directory, History(directory, MOST_POINTS))
        return JSONResponse(history.columns(), headers={"Cache-Control": MUTABLE})

    def _records(self) -> list[RunRecord]:
        return [read_record(name, directory) for name, directory in find_runs(self._paths).items()]

    def _directory(self, request: Request) -> Path:
        name, runs = request.path_params["run"], find_runs(self._paths)
        if name not in runs:
            raise HTTPException(404, f"no run {name!r} here; there are {', '.join(runs) or 'none yet'}")
        return runs[name]


def serve_runs(
    paths: Sequence[Path], host: str, port: int, token: str | None, allowed_hosts: Sequence[str], stop: threading.Event
) -> int:
    """Serves the runs in `paths` until `stop` is set; returns the exit code."""
    try:
        bound_port, close = start_service(
            make_runs_app(paths, token),
            host,
            port,
            lambda: any(map(is_training, find_runs(paths).values())),
            allowed_hosts if token is None else None,
        )
    except OSError as error:
        log.error("%s", str(error).replace("monitor.service_port", "--port"))
        return 1
    log.info("%d run(s) at http://%s:%d/", len(find_runs(paths)), host, bound_port)
    stop.wait()
    close()
    return 0
