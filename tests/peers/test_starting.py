"""Runs go on from SAEs that SAELens and sparsify saved themselves, and from our own. Run by `make peers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.peers.compare import Peers, is_clear_cut
from tests.peers.family import (
    D_SAE,
    TARGET,
    TESTED_ROWS,
    Zoo,
    begin,
    difference,
    fvu,
    learn,
    options_of,
    print_snapshot,
    sae,
)
from trainer.saes.export import main as export
from trainer.saes.formats import read_published
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.settings import SaeSettings

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]

STEPS = 200
SAVED_BY_SAELENS = {"standard": "relu-l1", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
SAVED_BY_SAELENS |= {"batchtopk": "batchtopk", "abstopk": "topk-abs"}
SAVED_BY_SPARSIFY = {"topk": "topk", "transcoder": "topk-transcoder", "skip_transcoder": "topk-skip-transcoder"}
GOES_ON_AS: dict[str, dict[str, Any]] = {
    "relu-l1": {"architecture": "relu", "penalty": "l1", "sparsity_weight": 1.0},
    "topk": {"architecture": "topk", "k": 16},
    "topk-abs": {"architecture": "topk", "k": 16, "abs": True},
    "topk-transcoder": {"architecture": "topk", "k": 16, "target": TARGET},
    "topk-skip-transcoder": {"architecture": "topk", "k": 16, "target": TARGET, "skip": True},
    "batchtopk": {"architecture": "batchtopk", "k": 16},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 24.0},
    "gated": {"architecture": "gated", "sparsity_weight": 1.0},
}


@dataclass(frozen=True)
class Foreign:
    """What another library saved, and what it makes of the rows for tests, apart from close calls."""

    folder: Path
    x: Tensor
    x_hat: Tensor
    y: Tensor


@pytest.fixture(scope="session")
def foreign(peers: Peers, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Foreign]:
    """Our weights with decoder rows of any norm, put into their training SAEs, and saved and run by them."""
    directory = tmp_path_factory.mktemp("foreign")
    saves, loads = {}, {}
    for library, kinds in (("sae_lens", SAVED_BY_SAELENS), ("sparsify", SAVED_BY_SPARSIFY)):
        for kind, name in kinds.items():
            weights = _sparsify(zoo[name].published) if library == "sparsify" else _saelens(zoo[name].published, kind)
            folder = directory / f"{library}-{kind}"
            save_file({key: value.contiguous() for key, value in weights.items()}, f"{folder}.weights")
            save_file({"x": zoo.rows.read_by(zoo.settings(name)).contiguous()}, f"{folder}.x")
            saves[library, kind] = {
                "library": library,
                "kind": kind,
                "folder": str(folder),
                "weights": f"{folder}.weights",
                "k": getattr(zoo.settings(name), "k", None),
            }
            loads[library, kind] = {
                "library": library,
                "folder": str(folder),
                "x": f"{folder}.x",
                "out": f"{folder}.out",
            }
    peers.save(list(saves.values()))
    peers.load(list(loads.values()))
    folders = {}
    for (library, kind), job in loads.items():
        name = (SAVED_BY_SAELENS if library == "sae_lens" else SAVED_BY_SPARSIFY)[kind]
        x, x_hat, y = load_file(job["x"])["x"], load_file(job["out"])["forward"], zoo.rows.wanted_by(zoo.settings(name))
        clear = is_clear_cut(zoo[name].published, x)
        folders[library, kind] = Foreign(Path(job["folder"]), x[clear], x_hat[clear], y[clear])
    return folders


def _saelens(ours: InferenceSae, kind: str) -> dict[str, Tensor]:
    """The state of their training SAE that does what ours does, with rows of norms from 1/3 to 3."""
    norm = 3 ** (2 * torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) - 1)
    weights = {"W_enc": ours.W_enc / norm, "W_dec": ours.W_dec * norm[:, None], "b_dec": ours.b_dec}
    if kind == "gated":
        b_mag, r_mag = ours.weights["b_mag"], ours.weights["r_mag"]
        return weights | {"b_gate": ours.b_enc / norm, "b_mag": b_mag / norm, "r_mag": r_mag}
    weights["b_enc"] = ours.b_enc / norm
    if ours.threshold is not None:
        of_rows = {"topk_threshold": ours.threshold.double().mean()}  # they fold the norms in when they save
        weights |= of_rows if kind == "batchtopk" else {"threshold": ours.threshold / norm}
    return weights


def _sparsify(ours: InferenceSae) -> dict[str, Tensor]:
    weights = {"encoder.weight": ours.W_enc.T, "encoder.bias": ours.b_enc, "W_dec": ours.W_dec, "b_dec": ours.b_dec}
    return weights | ({} if ours.W_skip is None else {"W_skip": ours.W_skip})


CASES = [("sae_lens", kind) for kind in SAVED_BY_SAELENS] + [("sparsify", kind) for kind in SAVED_BY_SPARSIFY]


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_a_run_goes_on_where_another_library_ended(
    library: str, kind: str, foreign: dict[tuple[str, str], Foreign], zoo: Zoo, tmp_path: Path
) -> None:
    """Before the first step it reconstructs as the original to 1e-4; after some hundred it is no worse."""
    name = (SAVED_BY_SAELENS if library == "sae_lens" else SAVED_BY_SPARSIFY)[kind]
    theirs = foreign[library, kind]
    sae_trainer = begin(sae("on", start_from=str(theirs.folder), **GOES_ON_AS[name]), zoo.rows)
    adopted = load_sae(print_snapshot(sae_trainer, zoo.rows, tmp_path, calibrated=False) / "on")
    learn(sae_trainer, zoo.rows, STEPS)
    later = load_sae(print_snapshot(sae_trainer, zoo.rows, tmp_path) / "on")

    assert difference(adopted(theirs.x), theirs.x_hat) < 1e-4
    assert fvu(later(theirs.x), theirs.y) <= fvu(theirs.x_hat, theirs.y)


@pytest.mark.parametrize(
    "name", ["topk", "batchtopk-transcoder", "jumprelu-log", "jumprelu-crosscoder", "relu-transcoder", "tied"]
)
def test_a_run_goes_on_from_our_own_snapshot(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """With scales from other rows than those it was trained with."""
    settings, folder = zoo.settings(name), zoo[name].folder
    options = options_of(settings) | {"start_from": str(folder)}
    if name == "tied":
        options |= {"architecture": "relu"}
    rows = zoo.rows.scaled_by(1.003)
    adopted = load_sae(print_snapshot(begin(SaeSettings.of(**options), rows), rows, tmp_path, calibrated=False) / name)
    x = rows.read_by(settings)
    x = x[is_clear_cut(load_sae(folder), x)]

    assert difference(adopted(x), load_sae(folder)(x)) < 1e-4


def test_a_crosscoder_chooses_by_the_new_scales(zoo: Zoo, tmp_path: Path) -> None:
    """Unit rows over several hooks follow the ratio of their scales: another sample moves a few close choices only."""
    settings, folder = zoo.settings("topk-crosscoder"), zoo["topk-crosscoder"].folder
    options = options_of(settings) | {"start_from": str(folder)}
    x = zoo.rows.read_by(settings)
    original = load_sae(folder)(x)
    for factor, tolerance in ((1.0, 1e-6), (1.003, 1e-2)):
        rows = zoo.rows.scaled_by(factor)
        directory = tmp_path / str(factor)
        sae_trainer = begin(SaeSettings.of(**options), rows)
        adopted = load_sae(print_snapshot(sae_trainer, rows, directory, calibrated=False) / settings.name)
        assert difference(adopted(x), original) < tolerance
        assert fvu(adopted(x), x) == pytest.approx(fvu(original, x), rel=tolerance)


def test_repair_goes_on_from_saelens(foreign: dict[tuple[str, str], Foreign], zoo: Zoo, tmp_path: Path) -> None:
    """A penalised ReLU SAE of another library gets its suppressed activations back; its active latents stay."""
    theirs = foreign["sae_lens", "standard"]
    sae_trainer = begin(sae("on", "repair", start_from=str(theirs.folder), train="scale"), zoo.rows)
    before = load_sae(print_snapshot(sae_trainer, zoo.rows, tmp_path) / "on")
    learn(sae_trainer, zoo.rows, STEPS)
    after = load_sae(print_snapshot(sae_trainer, zoo.rows, tmp_path) / "on")

    assert difference(before(theirs.x), theirs.x_hat) < 1e-4
    assert fvu(after(theirs.x), theirs.y) < fvu(theirs.x_hat, theirs.y)
    changed = (after.encode(theirs.x) > 0) != (before.encode(theirs.x) > 0)
    assert changed.sum() <= TESTED_ROWS * D_SAE * 1e-6


@pytest.mark.parametrize("name", ["topk", "topk-transcoder", "topk-skip-transcoder"])
def test_there_and_back_is_where_it_was(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """Ours → sparsify → a run that starts from it."""
    assert export([str(zoo[name].folder), "--format", "sparsify", "--to", str(tmp_path / "there")]) == 0
    sae_trainer = begin(sae("back", start_from=str(tmp_path / "there"), **GOES_ON_AS[name]), zoo.rows)
    back = load_sae(print_snapshot(sae_trainer, zoo.rows, tmp_path, calibrated=False) / "back")
    x = zoo.rows.read_by(zoo.settings(name))
    x = x[is_clear_cut(zoo[name].published, x)]

    assert difference(back(x), zoo[name].published(x)) < 1e-5


def test_sparsify_files_become_saelens_files(
    foreign: dict[tuple[str, str], Foreign], peers: Peers, tmp_path: Path
) -> None:
    """What SAELens' own converter gets wrong (it transposes W_dec): sparsify → export → SAELens."""
    theirs = foreign["sparsify", "topk"]
    assert export([str(theirs.folder), "--format", "saelens", "--to", str(tmp_path / "made")]) == 0
    save_file({"x": theirs.x}, tmp_path / "x")
    job = {
        "library": "sae_lens",
        "folder": str(tmp_path / "made"),
        "x": str(tmp_path / "x"),
        "out": str(tmp_path / "o"),
    }
    (facts,) = peers.load([job])

    assert facts["architecture"] == "topk"
    assert difference(load_file(tmp_path / "o")["forward"], theirs.x_hat) < 1e-5
    assert read_published(tmp_path / "made").metadata["sparsify"]["k"] == 16
