"""One activation of huge norm on the pages of latents: it is marked, and no longer the strongest of every latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from monitor.evaluation.latents.activations import LatentActivations, gather_latents, load_latents
from monitor.evaluation.latents.examples import distinct_examples, histogram, spread_examples, typical_values
from monitor.evaluation.latents.texts import Texts
from monitor.http.latent_pages import latent_page
from producer.corpus.rendering.windows import Windows
from tests.small_reading import HOOK, read_run, small_model

CONTEXT, WINDOWS, LATENTS = 16, 12, 6
HEAVY = 3 * CONTEXT + 7
"""The position of the outlier: the fourth window, token 7."""
SEPARATOR = 1


class HeavySae:
    """Latents that are the first numbers of an activation, above zero."""

    name = "heavy"
    d_sae = LATENTS
    W_enc = torch.zeros(LATENTS, LATENTS)

    class hooks:
        reads = (HOOK,)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


class HeavyModel:
    """Activations between −1 and 1, and one a hundred times as large."""

    device = torch.device("cpu")
    vocabulary = 50

    def __init__(self, factor: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(WINDOWS, CONTEXT, LATENTS, generator=generator) * 2 - 1
        self.x[HEAVY // CONTEXT, HEAVY % CONTEXT] = factor

    @property
    def hooks(self) -> list[Any]:
        return [type("Hook", (), {"name": HOOK})]

    def activations(self, tokens: torch.Tensor, padding: torch.Tensor) -> list[torch.Tensor]:
        return [self.x[: len(tokens)]]


def gather(factor: float = 100.0, model: HeavyModel | None = None) -> LatentActivations:
    ids = np.random.default_rng(0).integers(300, 340, (WINDOWS, CONTEXT))
    ids[:, 0] = SEPARATOR
    everywhere = np.ones(ids.shape, bool)
    return gather_latents(model or HeavyModel(factor), Windows(ids, everywhere, ~everywhere), HeavySae())  # type: ignore[arg-type]


def test_a_position_where_all_latents_are_far_beyond_themselves_is_an_outlier() -> None:
    """Twice the largest other activation is not far enough; a hundred times is."""
    assert np.flatnonzero(gather().outliers).tolist() == [HEAVY]
    assert not gather(2.0).outliers.any()


def test_the_median_latent_decides() -> None:
    """One that fires as usual does not save an outlier, and one that is far beyond itself alone makes none."""
    model = HeavyModel(100.0)
    model.x[HEAVY // CONTEXT, HEAVY % CONTEXT, 0] = 0.5
    model.x[0, 5] = 0.5
    model.x[0, 5, 1] = 100.0
    assert np.flatnonzero(gather(model=model).outliers).tolist() == [HEAVY]


def test_the_strongest_activation_is_not_that_of_an_outlier() -> None:
    """It comes last among the firings of each latent, and scales and histograms are without it."""
    latents = gather()
    for latent in range(LATENTS):
        positions, values = latents.of(latent)
        assert (positions[-1], values[-1]) == (HEAVY, 100.0) and latents.outlier_count(latent) == 1
        assert (np.diff(values[:-1]) <= 0).all() and latents.strongest[latent] == values[0] < 1
        assert histogram(typical_values(latents, latent)).edges[-1] < 1


def test_an_outlier_is_shown_last_and_marked() -> None:
    """Other language models are not shown it."""
    latents, texts = gather(), Texts(small_model().tokenizer)
    *usual, outlier = distinct_examples(latents, texts, 0)
    assert outlier.is_outlier and outlier.value == 100.0
    assert usual and not any(example.is_outlier for example in usual)
    assert max(example.value for example in spread_examples(latents, texts, 0, 8)) < 1


def test_each_document_has_an_example_before_another_has_two() -> None:
    """Two documents in windows 0 to 9, with the 40 strongest firings, and two more with weaker ones."""
    ids = np.arange(300, 300 + WINDOWS * CONTEXT).reshape(WINDOWS, CONTEXT)
    ids[:, 0] = SEPARATOR
    separators = [(4, 15), (9, 15), (10, 15)]
    for place in separators:
        ids[place] = SEPARATOR
    shown = np.ones(ids.shape, bool)
    positions = np.array([*range(1, 16), *range(65, 79), *range(161, 172), 163 + CONTEXT], np.uint32)
    latents = LatentActivations(
        ids=ids.astype(np.uint32), shown=shown, streamed=shown, starts=np.array([0, len(positions)]),
        positions=positions, values=np.linspace(9, 1, len(positions), dtype=np.float32),
        born=np.zeros(1, np.int64), outliers=np.zeros(ids.shape, bool),
    )  # fmt: skip
    documents = latents.documents({SEPARATOR})
    assert [len(np.unique(documents)), documents[0, 0], documents[4, 14], documents[5, 1]] == [4, 0, 0, 1]
    assert documents[4, 15] == 0  # a separator ends its document

    texts = Texts(small_model().tokenizer)
    texts.separators = frozenset({SEPARATOR})
    examples = distinct_examples(latents, texts, 0)
    assert len(examples) == 16 and [one.value for one in examples] == sorted(one.value for one in examples)[::-1]
    assert examples[-1].value == 1.0, "the fourth document's only firing is the weakest of all"


def test_files_of_earlier_releases_have_no_outliers(tmp_path: Path) -> None:
    """They are read as they were."""
    gather().save(tmp_path / "latents.safetensors")
    tensors = load_file(tmp_path / "latents.safetensors")
    del tensors["outliers"]
    save_file(tensors, tmp_path / "latents.safetensors")
    assert not load_latents(tmp_path / "latents.safetensors").outliers.any()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a latent one of whose firings was made an outlier."""
    explorer = read_run(tmp_path_factory.mktemp("run"), small_model())
    latents = explorer.open("planted").latents
    position = int(latents.of(0)[0][-1])
    outliers = np.zeros(latents.outliers.shape, bool)
    outliers.ravel()[position] = True
    vars(latents)["outliers"] = outliers
    return latent_page(explorer.latent("planted", 0))


def test_the_page_marks_the_outlier(page: str) -> None:
    """Beside its text, and below the histogram."""
    assert page.count(">outlier</span>") == 1 and "1 more on outliers" in page
