"""The page of a scaling law, and its JSON: what `trainer fit` found, or what to do for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from monitor.http.service import make_app
from producer.common.metrics import new_registry
from tests.small_grid import SIZES, write_run
from trainer.scaling.fit import main

pytest.importorskip("scipy", reason="the extra scaling is not installed")


def client(directory: Path) -> TestClient:
    return TestClient(make_app(directory, new_registry()))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("scaling") / "run", (*SIZES, 4096))
    assert main([str(directory), "--hold-out", "4096", "--predict", "8192", "--json"]) == 0
    return directory


def test_the_page_has_its_numbers_as_it_is_sent(fitted: Path) -> None:
    """The law, each SAE beside it, and predictions with what was measured; without any script."""
    page = client(fitted).get("/scaling").text

    assert '<th scope="row">β_n</th><td class="n">-0.1700</td>' in page
    assert "topk-256-8" in page and 'topk-4096-64 <span class="dim">held out</span>' in page
    assert page.count("8,192") == 4 and "+0.0%" in page


def test_the_curves_are_served_with_their_colours(fitted: Path) -> None:
    answer = client(fitted).get("/v1/scaling").json()

    assert [curve["k"] for curve in answer["curves"]] == [8, 16, 32, 64] == [int(k) for k in answer["colours"]]
    assert answer["curves"][0]["d_sae"][0] == 256 and answer["curves"][0]["d_sae"][-1] == 8192


def test_a_run_that_was_not_fitted_says_what_to_do(tmp_path: Path) -> None:
    write_run(tmp_path)

    assert "trainer fit RUN_DIR" in client(tmp_path).get("/scaling").text
    assert client(tmp_path).get("/v1/scaling").status_code == 404


def test_what_another_version_wrote_counts_as_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "scaling.json").write_text('{"format": 99}')

    assert client(tmp_path).get("/v1/scaling").status_code == 404


def test_the_page_of_a_run_leads_to_it_where_there_is_a_grid(fitted: Path) -> None:
    settings = "".join(f'[[sae]]\nname = "s{n}"\nd_sae = {n}\n' for n in SIZES)
    (fitted / "settings.toml").write_text(settings)
    with_grid = client(fitted).get("/").text
    (fitted / "settings.toml").write_text('[[sae]]\nname = "s"\nd_sae = 64\n')

    assert '<a href="/scaling">Scaling</a>' in with_grid
    assert "/scaling" not in client(fitted).get("/").text
