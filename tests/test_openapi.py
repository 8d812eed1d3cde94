"""The description of the JSON API: it names what there is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from monitor.http.openapi import OPERATIONS, openapi_document
from monitor.http.service import make_app
from producer.common.metrics import new_registry
from tests.small_run import publish_snapshot, start_run


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    publish_snapshot(start_run(tmp_path / "run"), 1000)
    return TestClient(make_app(tmp_path / "run", new_registry()))


def test_every_route_is_described(tmp_path: Path):
    """Each address under /v1 with its method, and no other."""
    routes = {
        (re.sub(r":\w+}", "}", route.path), (route.methods - {"HEAD"}).pop().lower())
        for route in make_app(tmp_path, new_registry()).routes
        if isinstance(route, Route) and route.methods and route.path.startswith("/v1/")
    }
    assert routes == {(operation.path, operation.method) for operation in OPERATIONS}


def test_the_document_is_openapi(client: TestClient):
    """Parameters of the path are declared as such, and every operation has its responses."""
    document = client.get("/openapi.json").json()
    assert document == openapi_document() and document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            in_path = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path)) and {"200", "default"} <= operation["responses"].keys()


def test_the_page_asks_nobody_else(client: TestClient):
    """All operations, from this server alone; what it offers to try answers."""
    answer = client.get("/docs")
    assert not re.search(r'(src|href)="(?!/|#|data:)', answer.text)
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    for operation in OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}</code>" in answer.text
        if operation.example:
            assert client.get(operation.example).status_code == 200


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.query], ids=lambda one: one.path)
def test_parameters_are_read(operation):
    """Each name in the description is one that the handlers ask for."""
    sources = "".join(
        Path("monitor/http", name).read_text()
        for name in ("routes.py", "latent_routes.py", "service.py", "requests.py")
    )
    for parameter in operation.query:
        assert f'"{parameter.name}"' in sources, parameter
