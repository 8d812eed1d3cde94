"""An architecture that only this file knows: one class, one line in the registry, and everything works with it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from prometheus_client import CollectorRegistry
from pydantic import Field
from torch import Tensor

from monitor.evaluation.follow import Evaluator
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from tests.small_reading import HOOK, run_file, small_model
from tests.small_saes import publish_sae
from tests.test_ctl import Trainer
from trainer.kernels.select import Latents, positive
from trainer.planning import estimate
from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform
from trainer.saes.formats import convert, read_published
from trainer.saes.gradients import Gradients, add
from trainer.saes.inference import load_sae
from trainer.saes.published import ALL_LATENTS, Activation, FormatError
from trainer.saes.selftest import check
from trainer.saes.settings import CostTerms, SaeSettings
from trainer.snapshot import snapshot_names

# The architecture -----------------------------------------------------------------------------------------------------
#
#     latents = z · 1[z > share · max_j z_j],  z = ReLU(pre_acts)      y_hat = latents W_dec + b_dec
#     L = |y − y_hat|² / variance


class PeakSettings(SaeSettings):
    """[[sae]] with architecture peak."""

    architecture: Literal["peak"] = "peak"
    share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """A latent is active above this share of the largest pre-activation."""

    def cost_terms(self) -> CostTerms:
        return CostTerms(active=16.0)


class PeakActivation(Activation):
    """ReLU of the pre-activations above a share of the largest."""

    name = "peak"
    architecture = "peak"

    def encode(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return pre_acts.relu() * (pre_acts > cfg["share"] * pre_acts.amax(-1, keepdim=True))

    def margins(self, pre_acts: Tensor, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Tensor:
        return (pre_acts - cfg["share"] * pre_acts.amax(1, keepdim=True)).abs().amin(1)

    def require_saelens(self, sae: Any) -> None:
        raise FormatError("SAELens has no peak")


class Peak(Sae):
    """See the equations above."""

    Settings = PeakSettings
    activations = (PeakActivation(),)
    settings: PeakSettings

    def gradients(self, x: Tensor, y: Tensor, dead: Tensor, sparsity: float = 1.0) -> Gradients:
        encoded = self.encode(x, self.aux_latents(dead), partial(peaks, share=self.settings.share))
        latents = encoded.latents[0]
        main = self.reconstruct(latents, x, y)
        grads = self.backward(encoded.inputs, latents, main.dlatents * (latents.value > 0), main.dlevels)
        add(grads, self.output_gradients(x, main.dy_hat))
        return Gradients(grads, {"reconstruction": main.loss}, main.y_hat, latents)

    def export(self, latents: slice = ALL_LATENTS) -> tuple[dict[str, object], dict[str, Tensor]]:
        return {"architecture": "peak", "share": self.settings.share}, self.common_weights(latents)


def peaks(pre_acts: Tensor, share: float) -> Latents:
    return positive(pre_acts * (pre_acts > share * pre_acts.amax(1, keepdim=True)))


# ----------------------------------------------------------------------------------------------------------------------

TABLE = {"name": "p", "architecture": "peak", "d_sae": 16, "share": 0.6}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ARCHITECTURES, "peak", Peak)


def peak_sae(d_in: int, rows: Tensor) -> Sae:
    sae = Peak(PeakSettings(name="p", d_sae=16, share=0.6), (d_in,))
    sae.initialise(rows, rows, torch.Generator().manual_seed(0))
    return sae


def test_its_gradients_are_those_of_dense_autograd() -> None:
    """The inherited products give what differentiating the published function gives."""
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    sae = peak_sae(6, x)
    parameters = {name: value.clone().requires_grad_() for name, value in sae.parameters.items()}
    pre_acts = (x - parameters["b_dec"]) @ parameters["W_enc"].T + parameters["b_enc"]
    latents = sae.activations[0].encode(pre_acts, {}, {"share": 0.6})
    error = latents @ parameters["W_dec"] + parameters["b_dec"] - x
    (error.square().sum() / (len(x) * sae.variance)).backward()

    grads = sae.gradients(x, x, torch.zeros(16, dtype=torch.bool)).of

    for name, value in parameters.items():
        torch.testing.assert_close(grads[name], value.grad, rtol=1e-4, atol=1e-6)


def test_it_trains_checkpoints_resumes_and_publishes(tmp_path: Path) -> None:
    """By the real loop over a real stream; a published self-test passes, and `share` was checked as a setting."""
    with Trainer(tmp_path / "run", sae=[TABLE]).at_work() as first:
        first.produce().ask("snapshot")
        tokens = first.ask("status")["saes"][0]["tokens"]
        assert first.loop.save()
    with Trainer(tmp_path / "run", sae=[TABLE]).at_work() as second:
        assert second.produce().ask("snapshot")
        assert second.sae("p")["tokens"] > tokens
        assert second.sae("p")["architecture"] == "peak"

    folder = tmp_path / "run" / "snapshots" / snapshot_names(tmp_path / "run")[-1] / "p"
    check(folder)
    assert load_sae(folder).cfg["share"] == 0.6


def test_a_wrong_key_or_value_of_it_is_refused() -> None:
    """Its own range is checked; keys of other architectures mean nothing for it; its keys nothing for them."""
    with pytest.raises(ValueError, match="less than 1"):
        SaeSettings.of(**TABLE | {"share": 2.0})
    with pytest.raises(ValueError, match="k means nothing for peak; remove"):
        SaeSettings.of(**TABLE, k=3)
    with pytest.raises(ValueError, match="share means nothing for topk; remove"):
        SaeSettings.of(name="s", architecture="topk", d_sae=16, k=3, share=0.5)


@pytest.fixture
def evaluated(tmp_path: Path) -> Iterator[Path]:
    """The folder of one in a snapshot on the demo's language model, evaluated."""
    model = small_model()
    settings = read_run_file(MonitorSettings, run_file(tmp_path), [])
    x = 3 * torch.randn(200, model.hooks[0].width, generator=torch.Generator().manual_seed(0))
    sae = peak_sae(x.shape[1], x)
    every_token = torch.ones(x.shape[1])
    metadata = {"hook_name": HOOK, "settings": TABLE}
    numbers = {"architecture": "peak", "hook": HOOK, "d_sae": 16}
    transform = InputTransform(every_token, every_token)
    published = publish_sae(tmp_path / "run", sae, transform, torch.full((16,), 0.5), x, metadata, numbers, "p")
    follower = Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event())
    follower.look()
    assert not follower.has_failed()
    yield published


def test_it_is_evaluated_and_exported(evaluated: Path) -> None:
    """Against the real language model; a library that has no such SAE is named, and none can take it."""
    evaluation = json.loads((evaluated / "evaluation.json").read_text())

    assert 0 < evaluation["l0"] < 16
    assert evaluation["ce_delta"] > 0
    weights = read_published(evaluated)
    for name, reason in {
        "saelens": "SAELens has no peak",
        "jumprelu": "peak is no threshold per latent",
        "sparsify": "sparsify knows top-k",
        "dictionary_learning": "dictionary_learning has no peak",
    }.items():
        with pytest.raises(FormatError, match=reason):
            convert(weights, name)


def test_it_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cost terms reach the arithmetic."""
    path = tmp_path / "run.toml"
    path.write_text(
        '[corpus]\nkind = "synthetic"\n[corpus.synthetic]\nd_in = 64\nfeatures = 128\n[optimizer]\ndevice = "cpu"\n'
        '[[sae]]\nname = "p"\narchitecture = "peak"\nd_sae = 256\n'
    )
    assert estimate.main([str(path), "--matmul-tflops", "1", "--bandwidth-gbs", "20", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["tokens_per_second"] > 0
