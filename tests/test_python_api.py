"""The page for analysts and the example notebook: every block and cell runs, on a run whose latents are planted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.small_reading import WORDS, read_run, small_model
from trainer.snapshot import SAELENS_LAYOUT

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/python-api.md"
NOTEBOOK = ROOT / "docs/example.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two snapshots, measured; two reports; the settings that a trainer would have written."""
    folder = tmp_path_factory.mktemp("analysts")
    read_run(folder, small_model())
    shutil.copyfile(folder / "run.toml", folder / "run/settings.toml")
    for tokens in (1000, 2000):
        sae = {"name": "planted", "fvu": 500 / tokens, "l0": 1.0}
        report = {"time": 1.0, "tokens": tokens, "tokens_per_second": 9.0, "saes": [sae]}
        with open(folder / "run/metrics.jsonl", "a") as file:
            file.write(json.dumps(report) + "\n")
    return folder / "run"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(pieces: list[str], run: Path) -> dict[str, Any]:
    """Runs the pieces one after the other in one namespace, on this run and its SAE `planted`."""
    namespace: dict[str, Any] = {}
    for piece in pieces:
        code = piece.replace('"runs/demo"', repr(str(run))).replace('"topk"', '"planted"')
        exec(compile(code, "block", "exec"), namespace)
    return namespace


def test_the_blocks_of_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order; the one with SAELens is run by `make peers`."""
    pieces = [block for block in blocks() if "sae_lens" not in block]
    assert len(pieces) == len(blocks()) - 1
    namespace = execute(pieces, run)

    output = capsys.readouterr().out
    assert "2000 tokens trained" in output and "[(1000, 0.5), (2000, 0.25)]" in output
    latents = namespace["latents"][0]
    text = [namespace["model"].tokenizer.decode(token) for token in namespace["ids"][0]]
    assert latents[text.index(" return"), WORDS.index(" return")] > 0
    assert latents[text.index(" return"), WORDS.index(" class")] == 0


def test_the_cells_of_the_notebook(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without SAELens, which is not installed here; outputs are not part of the file."""
    namespace = execute(cells(), run)

    assert "2,000 tokens trained" in capsys.readouterr().out
    assert [list(curve.y) for curve in namespace["figure"].data] == [[0.5, 0.25]]
    assert all(not cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])


@pytest.mark.peers
@pytest.mark.timeout(600)
def test_the_block_with_saelens(run: Path, tmp_path: Path) -> None:
    """And the cell of the notebook: in SAELens' own environment, with nothing of ours installed."""
    python = os.environ.get("SLUICE_PEERS_PYTHON")
    if python is None:
        pytest.skip("SLUICE_PEERS_PYTHON names no environment; run `make peers`")
    (block,) = [block for block in blocks() if "sae_lens" in block]
    snapshot = tmp_path / "snapshot"
    shutil.copytree(run / "snapshots/000000002000", snapshot)
    cfg = json.loads((snapshot / "planted/cfg.json").read_text())
    metadata = cfg["metadata"] | {"sae_lens_version": SAELENS_LAYOUT}
    cfg |= {"dtype": "float32", "device": "cpu", "metadata": metadata, "apply_b_dec_to_input": True}  # as a trainer's
    cfg |= {"normalize_activations": "none", "reshape_activations": "none"}
    (snapshot / "planted/cfg.json").write_text(json.dumps(cfg))
    (cell,) = [cell for cell in cells() if "sae_lens" in cell]
    code = f"""
from pathlib import Path
import torch
snapshot, name, activations = Path({str(snapshot)!r}), "planted", torch.zeros(1, 3, 256)
{block}
latents = latents[0]
{cell}"""
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)

    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.splitlines()[-2:] == [
        f"blocks.0.hook_resid_pre torch.Size([1, 3, {len(WORDS) + 1}])",
        "largest difference: 0.0",
    ]
