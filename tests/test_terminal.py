"""The tables in the terminal: every kind of SAE has its row, and nothing unknown stops them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from monitor.cli.terminal import live, results
from monitor.evaluation.results import Evaluation
from monitor.suite import suite_of

UNKNOWN: dict[str, Any] = {"d_sae": 4096, "hook": "blocks.1.hook_resid_mid", "dead_latents_ratio": None}


def test_results_tell_where_transcoders_and_crosscoders_sit():
    """Below the table, which has no room for it; autoencoders need no such line."""
    saes = {
        "plain": UNKNOWN | {"shrinkage": 0.987, "held_out_l0": 32.0},
        "trans": UNKNOWN | {"target": "blocks.1.hook_mlp_out", "shrinkage": None},
        "cross": UNKNOWN | {"hooks": ["blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid"]},
    }
    lines = _drawn(results({"saes": saes})).splitlines()
    assert any(line.split()[:3] == ["plain", "4,096", "32.0"] for line in lines)
    assert "trans: blocks.1.hook_resid_mid → blocks.1.hook_mlp_out" in lines
    assert "cross: blocks.1.hook_resid_mid + blocks.2.hook_resid_mid" in lines
    assert not any(line.startswith("plain:") for line in lines)


def test_live_shows_averaged_copies_of_the_saes_in_training():
    """Their evaluation alone; an SAE that has left the stream is gone, whatever was measured of it."""
    evaluations = {
        name: Evaluation(values={"ce_delta": loss}) for name, loss in {"topk-ema": 0.125, "detached": 9.0}.items()
    }
    lines = _drawn(live(_report("running"), evaluations, 1.0, ""))
    assert any(line.split()[:3] == ["topk", "-", "0.5000"] for line in lines.splitlines())
    assert any(line.split() == ["topk-ema", "-", "-", "-", "-", "-", "0.1250", "-"] for line in lines.splitlines())
    assert "detached" not in lines


@pytest.mark.parametrize("state", ["filling", "training", "paused"])
def test_live_shows_any_state(state: str):
    """A run without an end, at no speed, and nothing known of its SAEs."""
    assert state in _drawn(live(_report(state), {}, 1.0, "note"))


def test_live_shows_a_suite_as_layers_and_sites():
    """A row for each layer, FVU, ΔCE and dead latents for each site; a place without an SAE is empty."""
    names = [f"{site}.{layer}" for site in ("resid", "mlp") for layer in (0, 1, 10)] + ["attn.0"]
    report = _report("training")
    first = report["saes"][0]
    report["saes"] = [first | {"name": name, "fvu": 0.01 * index} for index, name in enumerate(names)]
    lines = _drawn(live(report, {"mlp.10": Evaluation(values={"ce_delta": 0.125})}, None, "", 120)).splitlines()

    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split() and line.split()[0].isdigit()}
    assert list(rows) == ["0", "1", "10"]
    assert rows["10"] == ["0.0200", "-", "-", "0.0500", "0.1250", "-", "-", "-", "-"]
    assert suite_of(names[:5]) is None and suite_of([*names, "topk"]) is None


def test_a_grid_is_shown_as_sizes_and_sparsities():
    """A row for each number of latents, a column for each k."""
    grid = suite_of([f"topk-{d_sae}-{k}" for d_sae in (1024, 512) for k in (8, 16, 4)])

    assert grid is not None and grid.heading == "latents"
    assert (grid.layers, grid.sites) == ([512, 1024], ["k = 4", "k = 8", "k = 16"])
    assert grid.row(1024) == ["topk-1024-4", "topk-1024-8", "topk-1024-16"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_live_fits_narrow_terminals(width: int):
    """What matters least is left out, and a long name is cut; no line is broken and no number is."""
    report = _report("training")
    report["saes"][0] |= {"name": "a-name-of-some-length-that-people-give", "learning_rate": 3e-4}
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(live(report, {}, None, "note", width))
    lines = console.export_text().splitlines()
    assert len(lines) == 5 and "0.5000" in lines[3] and "a-name" in lines[3] and "…" in lines[3]
    assert ("3.0e-04" in lines[3]) == (width >= 80)


def _report(state: str) -> dict[str, Any]:
    sae = {"name": "topk", "l0": None, "fvu": 0.5, "dead_latents_ratio": None, "shrinkage": None, "learning_rate": 0.0}
    return {
        "tokens": 5,
        "target_tokens": None,
        "tokens_per_second": 0.0,
        "buffer_rows": 3,
        "buffer_capacity_rows": 7,
        "state": state,
        "stream": {"producers": {"working": 1}},
        "saes": [sae],
    }


def _drawn(what: RenderableType) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(what)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


@pytest.mark.parametrize("width", [40, 50, 60, 80, 200])
def test_the_results_fit_any_terminal(width: int):
    """What matters least is left out first, and no number is cut."""
    sae = {"d_sae": 131_072, "dead_latents_ratio": 0.012, "shrinkage": 1.001, "held_out_l0": 32.0}
    sae |= {"held_out_fvu": 0.0406, "ce_delta": 0.0364, "ce_recovered": 0.9951, "kl": 0.0412}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results({"saes": {"jumprelu": sae}}, width))
    output = console.export_text()
    assert "…" not in output and "0.0364" in output and "0.0406" in output
    assert ("0.0412" in output) == (width >= 79)
