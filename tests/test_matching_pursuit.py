"""Matching pursuit: choices on paper, what it is for, its files, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import normalize

from tests.small_saes import UNSCALED, learn, publish_sae, rows_of, sae_trainer_of, settings_of, train_sae
from trainer.parallel.placement import sae_fault
from trainer.saes.formats import convert, read_published
from trainer.saes.inference import load_sae
from trainer.saes.published import FormatError
from trainer.saes.selftest import check
from trainer.saes.settings import SaeSettings
from trainer.saes.start import read_start
from trainer.settings import ParallelSettings
from trainer.snapshot import WEIGHTS
from trainer.training.sae_trainer import SaeTrainer


def test_each_choice_takes_its_part_away() -> None:
    """x = (3, 4, 0) with directions (0.6, 0.8, 0), (0, 1, 0), (1, 0, 0): 5 of the first, and nothing is left."""
    W_dec = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    cfg = {"max_iterations": 2, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    settings = SaeSettings.of(name="s", architecture="matching_pursuit", d_sae=3, k=2)
    activation = type(sae_trainer_of(settings).sae).activations[0]

    x = torch.tensor([[3.0, 4.0, 0.0], [1.0, 2.0, 0.0]])
    latents = activation.encode(x @ W_dec.T, {"W_dec": W_dec}, cfg)

    # Of (1, 2): 2.2 of the first leave (−0.32, 0.24), of which the second takes 0.24.
    torch.testing.assert_close(latents, torch.tensor([[5.0, 0.0, 0.0], [2.2, 0.24, 0.0]]))


def test_it_finds_children_that_hide_behind_their_parent() -> None:
    """A parent of size 4 and one child of size 1 with a cosine of 0.5 to it: after the parent, the right child is best.

    By one product with the directions, another child of that parent may win, since all point along it.
    """
    torch.manual_seed(0)
    parent = normalize(torch.randn(1, 16))
    children = torch.randn(6, 16)
    children = normalize(0.5 * parent + 0.75**0.5 * normalize(children - (children @ parent.T) * parent))
    W_dec = torch.cat([parent, children])
    child = torch.arange(6)
    x = 4 * parent + children[child]
    settings = SaeSettings.of(name="s", architecture="matching_pursuit", d_sae=7, k=2)
    activation = type(sae_trainer_of(settings).sae).activations[0]

    latents = activation.encode(x @ W_dec.T, {"W_dec": W_dec}, {"max_iterations": 2})
    assert (latents[:, 1:].argmax(1) == child).all()
    assert (latents > 0).sum(1).tolist() == [2] * 6


def published(tmp_path: Path) -> tuple[SaeTrainer, Path]:
    sae_trainer = train_sae(settings_of("matching_pursuit"), steps=20)
    x = rows_of(sae_trainer.settings, 300, 9)["a"]
    transform, rate = sae_trainer.input_transform({"a": 1.7, "b": 1.0}), sae_trainer.statistics.firing_rate()
    return sae_trainer, publish_sae(tmp_path / "run", sae_trainer.sae, transform, rate, x, {"hook_name": "a"})


def test_a_snapshot_holds_one_matrix_and_passes_its_self_test(tmp_path: Path) -> None:
    """As SAELens stores it: W_dec and b_dec alone."""
    _, folder = published(tmp_path)
    check(folder)
    sae = load_sae(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == {"W_dec", "b_dec"}

    x = rows_of(settings_of("matching_pursuit"), 50, 10)["a"]
    assert (sae.encode(x) > 0).sum(1).max() <= 6
    assert (sae(x) - x).square().sum() < (x - x.mean(0)).square().sum()


def test_training_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    """The same directions, in the scale of the new run; another k is refused."""
    first, folder = published(tmp_path)
    settings = settings_of("matching_pursuit", start_from=str(folder))
    start = read_start(settings)
    second = sae_trainer_of(settings)
    second.initialise(rows_of(settings, 512, 0), UNSCALED, start)
    torch.testing.assert_close(second.sae.W_dec, first.sae.W_dec, rtol=1e-5, atol=1e-6)
    learn(second, [rows_of(settings, 64, 3)])

    with pytest.raises(Exception, match="set k = 6"):
        read_start(settings_of("matching_pursuit", start_from=str(folder), k=5))


def test_saelens_alone_can_take_it(tmp_path: Path) -> None:
    _, folder = published(tmp_path)
    weights = read_published(folder)
    assert set(convert(weights, "saelens")["sae_weights.safetensors"]) == {"W_dec", "b_dec"}
    for name in ("jumprelu", "sparsify", "dictionary_learning"):
        with pytest.raises(FormatError, match="use --format saelens"):
            convert(weights, name)


@pytest.mark.parametrize("option", [{"whitening": True}, {"hooks": ["a", "b"]}])
def test_what_would_untie_it_is_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="would make encoder and decoder of a published SAE differ"):
        settings_of("matching_pursuit", **option)


def test_ranks_are_refused_in_a_sentence() -> None:
    """And blocks of latents, for which it would be trained on one rank."""
    settings = settings_of("matching_pursuit", d_sae=8192)
    assert sae_fault(settings, ParallelSettings(), 1) is None
    for parallel, ranks in ((ParallelSettings(), 2), (ParallelSettings(blocks=8), 1)):
        fault = sae_fault(settings, parallel, ranks)
        assert fault is not None and "matching_pursuit compares all latents again" in fault
