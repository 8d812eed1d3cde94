"""Every SAE that Sluice trains, small, on real activations of the demo LM: published as a run publishes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from producer.corpus import open_corpus
from producer.corpus.rendering.windows import windows_of
from producer.lm.loading import load_language_model
from producer.settings import CorpusSettings, ModelSettings
from trainer.saes.folding import side_by_side
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.settings import SaeSettings
from trainer.saes.start import read_start
from trainer.saes.writing import SaeFiles
from trainer.settings import OptimizerSettings
from trainer.snapshot import new_snapshot, snapshot_folder
from trainer.training.run import scale_of
from trainer.training.sae_trainer import SaeTrainer

ROOT = Path(__file__).parent.parent.parent
HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]
READ, TARGET = HOOKS[1], HOOKS[2]
WIDTH, D_SAE, STEPS, BATCH = 256, 512, 200, 512
TESTED_ROWS = 2000
OPTIMIZER = OptimizerSettings(learning_rate=2e-3, warmup_tokens=10 * BATCH, cooldown=0.0)


@dataclass(frozen=True)
class Rows:
    """Raw activations of every hook, aligned; the first TESTED_ROWS are never trained on."""

    of: dict[str, Tensor]
    scales: dict[str, float]

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scaled rows of every hook."""
        at = TESTED_ROWS + torch.randint(len(self.of[READ]) - TESTED_ROWS, (count,), generator=generator)
        return {hook: x[at] * self.scales[hook] for hook, x in self.of.items()}

    def scaled_by(self, factor: float) -> Rows:
        """The same rows, as a run sees them whose sample had another variance."""
        return Rows(self.of, {hook: scale * factor ** (1 + HOOKS.index(hook)) for hook, scale in self.scales.items()})

    def read_by(self, settings: SaeSettings) -> Tensor:
        """x of the rows for tests."""
        return side_by_side(self.of, hooks_of(settings).reads)[:TESTED_ROWS]

    def wanted_by(self, settings: SaeSettings) -> Tensor:
        """y of the rows for tests."""
        return side_by_side(self.of, hooks_of(settings).writes)[:TESTED_ROWS]


def real_rows() -> Rows:
    """About 16,000 rows of held-out text."""
    settings = CorpusSettings(kind="stdlib")
    model = load_language_model(
        ModelSettings(name=str(ROOT / "producer/demo_lm"), hooks=HOOKS, device="cpu", dtype="float32")
    )
    corpus = open_corpus(settings)
    windows = windows_of(corpus.documents(corpus.held_out_shards[0]), model.tokenizer, settings)
    ids, mask = torch.from_numpy(windows.ids[:72]), torch.from_numpy(windows.kept[:72])
    of = {hook: x[mask].clone() for hook, x in zip(HOOKS, model.activations(ids), strict=True)}
    return Rows(of, {hook: scale_of(x) for hook, x in of.items()})


def hooks_of(settings: SaeSettings) -> SaeHooks:
    return SaeHooks.from_settings(settings, [READ])


def sae(name: str, architecture: str, **options: Any) -> SaeSettings:
    hooks = {} if "hooks" in options else {"hook": READ}
    return SaeSettings.of(name=name, architecture=architecture, d_sae=D_SAE, dead_tokens=20_000, **hooks, **options)


ENDS = [64, 192, D_SAE]
FAMILY = {
    settings.name: settings
    for settings in [
        sae("topk", "topk", k=16, ema_tokens=20_000),
        sae("topk-abs", "topk", k=16, abs=True),
        sae("topk-matryoshka", "topk", k=16, matryoshka=ENDS),
        sae("topk-whitening", "topk", k=16, whitening=True),
        sae("topk-crosscoder", "topk", k=16, hooks=HOOKS[:2]),
        sae("topk-transcoder", "topk", k=16, target=TARGET),
        sae("topk-skip-transcoder", "topk", k=16, target=TARGET, skip=True),
        sae("batchtopk", "batchtopk", k=16, ema_tokens=20_000),
        sae("batchtopk-matryoshka", "batchtopk", k=16, matryoshka=ENDS),
        sae("batchtopk-whitening", "batchtopk", k=16, whitening=True),
        sae("batchtopk-crosscoder", "batchtopk", k=16, hooks=HOOKS[:2]),
        sae("batchtopk-transcoder", "batchtopk", k=16, target=TARGET),
        sae("jumprelu", "jumprelu", target_l0=16.0),
        sae("jumprelu-log", "jumprelu", target_l0=16.0, threshold="log", straight_through="threshold"),
        sae("jumprelu-tanh", "jumprelu", penalty="tanh", sparsity_weight=0.3, bandwidth=2.0, pre_act_on="all"),
        sae("jumprelu-matryoshka", "jumprelu", target_l0=16.0, matryoshka=ENDS),
        sae("jumprelu-crosscoder", "jumprelu", target_l0=16.0, hooks=HOOKS[:2]),
        sae("jumprelu-transcoder", "jumprelu", target_l0=16.0, target=TARGET),
        sae("jumprelu-skip-transcoder", "jumprelu", target_l0=16.0, target=TARGET, skip=True),
        sae("relu-l1", "relu", penalty="l1", sparsity_weight=3.0),
        sae("relu-l1-norm", "relu", penalty="l1_norm", sparsity_weight=3.0),
        sae("relu-tanh", "relu", penalty="tanh", sparsity_weight=3.0),
        sae("relu-crosscoder", "relu", sparsity_weight=3.0, hooks=HOOKS[:2]),
        sae("relu-transcoder", "relu", sparsity_weight=3.0, target=TARGET),
        sae("relu-skip-transcoder", "relu", sparsity_weight=3.0, target=TARGET, skip=True),
        sae("tied", "tied", sparsity_weight=3.0),
        sae("gated", "gated", sparsity_weight=3.0),
        sae("p-anneal", "p_anneal", sparsity_weight=3.0, anneal_tokens=50_000),
        sae("matching-pursuit", "matching_pursuit", k=8),
        sae("gated-whitening", "gated", sparsity_weight=3.0, whitening=True),
    ]
}


@dataclass(frozen=True)
class Trained:
    """One SAE in training and in print."""

    sae_trainer: SaeTrainer
    folder: Path

    @property
    def published(self) -> InferenceSae:
        return load_sae(self.folder)


@dataclass
class Zoo:
    """Trains each SAE of the family when it is first asked for."""

    rows: Rows
    directory: Path
    _trained: dict[str, Trained] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Trained:
        if name not in self._trained:
            settings = self.settings(name)
            sae_trainer = begin(settings, self.rows)
            learn(sae_trainer, self.rows, STEPS)
            self._trained[name] = Trained(
                sae_trainer, print_snapshot(sae_trainer, self.rows, self.directory / name) / name
            )
        return self._trained[name]

    def settings(self, name: str) -> SaeSettings:
        if name == "repair":
            return sae("repair", "repair", start_from=str(self["relu-l1"].folder), train="scale")
        return FAMILY[name]

    def folder(self, name: str) -> Path:
        """Where it is published; NAME-ema is the averaged copy of NAME."""
        if name.endswith("-ema"):
            return self[name.removesuffix("-ema")].folder.with_name(name)
        return self[name].folder


def options_of(settings: SaeSettings) -> dict[str, Any]:
    """The [[sae]] table that gives these settings."""
    changed = settings.model_dump(exclude_none=True, exclude_defaults=True)
    return changed | {"architecture": settings.architecture}


def begin(settings: SaeSettings, rows: Rows) -> SaeTrainer:
    """An SAE before its first step."""
    sae_trainer = SaeTrainer(
        settings, OPTIMIZER, hooks_of(settings), dict.fromkeys(HOOKS, WIDTH), torch.device("cpu"), torch.float32
    )
    sample = rows.sample(8192, torch.Generator().manual_seed(1))
    sae_trainer.initialise(sample, rows.scales, read_start(settings))
    return sae_trainer


def learn(sae_trainer: SaeTrainer, rows: Rows, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        sae_trainer.step(rows.sample(BATCH, generator))


def print_snapshot(sae_trainer: SaeTrainer, rows: Rows, directory: Path, calibrated: bool = True) -> Path:
    """Publishes it, and its averaged copy beside it."""
    settings, scaled = sae_trainer.settings, rows.sample(4096, torch.Generator().manual_seed(3))
    x = side_by_side(rows.of, hooks_of(settings).reads)[TESTED_ROWS:][:1024]
    metadata = {
        "hook_name": READ,
        "hf_hook_name": "model.layers.1",
        "model_name": "producer/demo_lm",
        "context_size": 256,
        "trained_with": "sluice",
        "settings": settings.model_dump(mode="json", exclude_none=True),
    }
    copies = {settings.name: sae_trainer.sae} | (
        {f"{settings.name}-ema": twin} if (twin := sae_trainer.ema_sae) else {}
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokens = 1 + sae_trainer.tokens
    with new_snapshot(directory, tokens, {"id": "peers"}) as draft:
        for name, copy in copies.items():
            if calibrated:
                sae_trainer.calibrate(copy, scaled)
            rate, transform = sae_trainer.statistics.firing_rate(), sae_trainer.input_transform(rows.scales)
            draft.add(name, {}, SaeFiles(copy, transform, rate, metadata).write(draft.folder / name, x))
    return snapshot_folder(directory, tokens)


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, over all rows."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def fvu(y_hat: Tensor, y: Tensor) -> float:
    return float((y - y_hat).double().square().sum() / (y - y.mean(0)).double().square().sum())
