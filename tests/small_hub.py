"""A small Hugging Face hub on loopback: what huggingface_hub needs to publish a repository and to load it.

    POST /api/repos/create, /api/validate-yaml, /api/models/REPO/preupload/REV, /api/models/REPO/commit/REV
    POST /REPO.git/info/lfs/objects/batch, PUT /lfs/OID, POST /lfs/OID/verify
    GET, HEAD /REPO/resolve/REV/PATH

Large files go by LFS, as without hf-xet: Xet's own protocol is not spoken here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_small"
COMMIT = "0" * 40


@dataclass
class Hub:
    """What the hub has received."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by the name of the repository."""
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    """Titles of commits."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Files that came by LFS, by sha256."""

    async def create(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid username or password."}, 401)
        body = await request.json()
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        if name.startswith("others/"):
            return JSONResponse({"error": "You don't have the rights to create a model under this namespace"}, 403)
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {})
        if body.get("private") or body.get("visibility") == "private":
            self.private.add(name)
        return JSONResponse({"url": f"{self.url}/{name}", "id": name}, status)

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        """Files that git would hold as text are sent in the commit, others by LFS."""
        files = (await request.json())["files"]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in files
        ]
        return JSONResponse({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    async def batch(self, request: Request) -> Response:
        objects = (await request.json())["objects"]
        actions = {
            one["oid"]: {
                "upload": {"href": f"{self.url}/lfs/{one['oid']}"},
                "verify": {"href": f"{self.url}/lfs/{one['oid']}/verify"},
            }
            for one in objects
        }
        return JSONResponse(
            {"transfer": "basic", "objects": [one | {"actions": actions[one["oid"]]} for one in objects]}
        )

    async def put_blob(self, request: Request) -> Response:
        body = await request.body()
        oid = request.path_params["oid"]
        if hashlib.sha256(body).hexdigest() != oid:
            return Response(status_code=400)
        self.blobs[oid] = body
        return Response()

    async def verify_blob(self, request: Request) -> Response:
        return Response(status_code=200 if request.path_params["oid"] in self.blobs else 404)

    async def commit(self, request: Request) -> Response:
        name = request.path_params["name"]
        files = self.repositories[name]
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value: dict[str, Any] = item["value"]
            if item["key"] == "header":
                self.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        return JSONResponse({"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    async def resolve(self, request: Request) -> Response:
        file = self.repositories.get(request.path_params["name"], {}).get(request.path_params["path"])
        if file is None:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(file).hexdigest()}"'}
        return Response(file, headers=headers, media_type="application/octet-stream")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
                Route("/api/models/{name:path}/preupload/main", self.preupload, methods=["POST"]),
                Route("/api/models/{name:path}/commit/main", self.commit, methods=["POST"]),
                Route("/{name:path}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
                Route("/lfs/{oid}", self.put_blob, methods=["PUT"]),
                Route("/lfs/{oid}/verify", self.verify_blob, methods=["POST"]),
                Route("/{owner}/{repository}/resolve/{revision}/{path:path}", self._resolve, methods=["GET", "HEAD"]),
            ]
        )

    async def _resolve(self, request: Request) -> Response:
        request.path_params["name"] = "{owner}/{repository}".format(**request.path_params)
        return await self.resolve(request)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of loopback, which knows the token TOKEN."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(hub.app(), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the hub does not start")
        hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield hub
    finally:
        server.should_exit = True
        thread.join()
