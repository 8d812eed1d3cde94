"""What the monitor makes of a language model that is trained while it is watched: real steps of a tiny one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from prometheus_client import CollectorRegistry

from monitor.comparison import SameWidth, compare
from monitor.evaluation.births import BirthTracker
from monitor.evaluation.follow import Evaluator
from monitor.evaluation.results import read_evaluation
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.revisions import settings_of
from producer.settings import ModelSettings
from tests.small_model import HOOK, WIDTH, WORDS, write_model
from tests.small_run import Export, identity_sae, publish_snapshot, write_text_run

EMBED = "hook_embed"
STEPS = 20


def train(model: Path, folder: Path, words: range) -> Path:
    """Trains the model of a folder on a text of these words, and saves it as a training run does."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    ids = torch.tensor([[word + 2 for word in words]])
    for _ in range(STEPS):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two checkpoints of its training beside it in `out`."""
    folder = write_model(tmp_path_factory.mktemp("training") / "model")
    first = train(folder, folder.parent / "out" / "checkpoint-20", range(10))
    train(first, folder.parent / "out" / "checkpoint-40", range(10, 20))
    return folder


@pytest.fixture
def run_file(model: Path, tmp_path: Path) -> Path:
    watch = f'watch = "{model.parent / "out"}"\ndtype = "float32"'
    monitor = "evaluation_tokens = 100\nlatents_tokens = 100\nablated_latents = 0"
    return write_text_run(tmp_path, model, monitor, watch, lines=200)


def evaluator_of(run_file: Path) -> Evaluator:
    settings = read_run_file(MonitorSettings, run_file, [])
    return Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event())


def own_loss(folder: Path, evaluator: Evaluator) -> float:
    """The loss of plain transformers on the held-out text."""
    assert evaluator._inputs is not None
    windows = evaluator._inputs.text.windows
    labels = torch.from_numpy(np.where(windows.padded, -100, windows.ids))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(network(torch.from_numpy(windows.ids), labels=labels).loss)


# The monitor


def test_each_snapshot_is_evaluated_with_the_checkpoint_that_it_was_trained_on(model: Path, run_file: Path) -> None:
    """There and back again; what was measured of one checkpoint is not taken for another's, and pages follow."""
    evaluator = evaluator_of(run_file)
    folders = {"": model} | {name: model.parent / "out" / name for name in ("checkpoint-20", "checkpoint-40")}
    losses = {}
    for tokens, revision in ((1000, ""), (2000, "checkpoint-20"), (3000, "checkpoint-40"), (4000, "checkpoint-20")):
        snapshot = publish_snapshot(
            run_file.parent / "run", tokens, [identity_sae("half", WIDTH, HOOK, 0.5)], stream={"revision": revision}
        )
        evaluator.look()
        assert evaluator.broken is None and not evaluator.has_failed()
        evaluation = read_evaluation(snapshot, "half")
        assert evaluation is not None
        assert evaluation.values["ce_clean"] == pytest.approx(own_loss(folders[revision], evaluator), rel=1e-5)
        losses[tokens] = evaluation.values["ce_clean"], evaluation.values["ce_zero"]
        assert evaluator._inputs is not None and evaluator._inputs.revision == revision
        explorer = evaluator._handle.explorer
        assert explorer is not None and explorer._model is evaluator._inputs.model
    assert losses[2000] == losses[4000] and len(set(losses.values())) == 3


def test_a_checkpoint_that_is_gone_is_told_and_the_next_is_measured(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The monitor goes on with the model that it has."""
    evaluator = evaluator_of(run_file)
    for tokens, revision in ((1000, "checkpoint-5"), (2000, "checkpoint-40")):
        snapshot = publish_snapshot(
            run_file.parent / "run", tokens, [identity_sae("half", WIDTH, HOOK, 0.5)], stream={"revision": revision}
        )
        evaluator.look()
        assert evaluator.has_failed() == (revision == "checkpoint-5")
        assert (read_evaluation(snapshot, "half") is None) == (revision == "checkpoint-5")
    assert "checkpoint checkpoint-5 is gone or incomplete" in caplog.text


# The latents


def sae_of(model: Path, revision: str, live: range) -> Export:
    """One latent for each word, along its embedding in that revision; those of `live` words fire."""
    settings = ModelSettings(
        name=str(model), watch=str(model.parent / "out"), hooks=[EMBED], device="cpu", dtype="float32"
    )
    try:
        network = load_language_model(settings_of(settings, revision)).network.module
    except ModelError as error:  # its tokenizer is that of the first weights
        raise AssertionError(error) from None
    with torch.no_grad():
        embeddings = network.get_input_embeddings().weight[2:].float()
        directions = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    rates = np.array([0.1 if word in live else 0.0 for word in range(WORDS)])
    return Export(
        name="words",
        cfg={"architecture": "jumprelu", "d_in": WIDTH, "d_sae": WORDS, "metadata": {"hook_name": EMBED}},
        weights={
            "W_enc": directions.T, "W_dec": directions, "b_enc": np.zeros(WORDS, np.float32),
            "b_dec": np.zeros(WIDTH, np.float32), "threshold": np.full(WORDS, 0.5, np.float32),
        },
        firing_rate=rates,
        selftest={"x": np.zeros((1, WIDTH), np.float32)},
        metrics={"architecture": "jumprelu", "hook": EMBED, "d_sae": WORDS},
    )  # fmt: skip


def test_latents_are_born_die_and_turn_with_the_model(model: Path, tmp_path: Path) -> None:
    """Words 0 to 9 are trained first, and turn; latents of words 30 and 31 are born in the second part, 0 dies."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for folder in (model.parent / "out").iterdir():
            (folder / name).write_text((model / name).read_text())
    snapshots = [
        publish_snapshot(tmp_path / "run", tokens, [sae_of(model, revision, live)], stream={"revision": revision})
        for tokens, revision, live in (
            (1000, "", range(30)),
            (2000, "checkpoint-20", range(30)),
            (3000, "checkpoint-40", range(1, 32)),
        )
    ]
    first, second = (compare(*snapshots[place : place + 2]) for place in (0, 1))
    assert first.revisions == ("its first weights", "checkpoint-20")
    assert second.revisions == ("checkpoint-20", "checkpoint-40")
    latents = [one.saes["words"].latents for one in (first, second)]
    assert all(isinstance(one, SameWidth) for one in latents)
    turned = [{one.latent for one in each.turned} for each in latents if isinstance(each, SameWidth)]
    assert turned[0] and turned[0] <= set(range(10)) and turned[1] - set(range(10))
    assert isinstance(latents[1], SameWidth)
    assert list(latents[1].born) == [30, 31] and list(latents[1].died) == [0]

    births = BirthTracker(tmp_path / "run").births(snapshots[-1], "words")
    assert births[35] == 1000, "a word that no text had keeps its direction"
    assert all(births[word] == 3000 for word in turned[1] - {0})
