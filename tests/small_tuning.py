"""A finished run with a small language model and one SAE, as tuning finds it; for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from producer.common.run_file import show_settings
from producer.corpus import open_text
from producer.lm.model import LanguageModel
from producer.settings import CorpusSettings, ModelSettings, RunSettings
from tests.small_model import HOOK, WIDTH, WORDS, load_model, write_model
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.saes.writing import SaeFiles
from trainer.settings import OptimizerSettings, TrainerSettings
from trainer.snapshot import new_snapshot
from trainer.training.sae_trainer import SaeTrainer

CONTEXT, D_SAE, SCALE = 16, 24, 0.5
OPTIMIZER = OptimizerSettings(batch=64, learning_rate=1e-2, warmup_tokens=0, matmul="float32")
FAMILY: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {"target_l0": 4.0},
    "relu": {"sparsity_weight": 0.5},
    "gated": {"sparsity_weight": 0.5},
}
"""An SAE of each architecture that can be tuned."""


def sae_settings(architecture: str, **options: Any) -> SaeSettings:
    fields = {"name": "small", "architecture": architecture, "d_sae": D_SAE} | FAMILY[architecture] | options
    return SaeSettings.of(**fields)


def write_text(folder: Path, files: int = 24, words: int = 160) -> Path:
    """Files of random words, each a shard."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(files):
        ids = torch.randint(WORDS, (words,), generator=generator).tolist()
        (folder / f"{number:02d}.txt").write_text(" ".join(f"w{index}" for index in ids))
    return folder


def finished_run(directory: Path, sae: SaeSettings, steps: int = 30, **metadata: Any) -> tuple[Path, LanguageModel]:
    """(a run directory with one snapshot of an SAE after some steps, the model)"""
    directory.mkdir()
    model = load_model(write_model(directory / "model"))
    run = directory / "run"
    settings = TrainerSettings(
        run=RunSettings(directory=str(run), tokens=1000, threads=1),
        model=ModelSettings(name=str(directory / "model"), hooks=[HOOK], device="cpu", dtype="float32"),
        corpus=CorpusSettings(
            kind="text", paths=[str(write_text(directory / "text"))], context=CONTEXT, shard_bytes=600, held_out=0.2
        ),
        optimizer=OPTIMIZER,
        sae=[sae],
    )
    run.mkdir()
    (run / "settings.toml").write_text(show_settings(settings) + "\n")
    text = open_text(settings.corpus)
    shards = text.parts[0].corpus.training_shards
    ids = torch.cat([torch.from_numpy(text.windows(shard, 0, model.tokenizer).ids) for shard in shards])
    x = model.activations(ids)[0][:, 1:].reshape(-1, WIDTH).clone()
    hooks = SaeHooks((HOOK,), (HOOK,))
    trainer = SaeTrainer(sae, OPTIMIZER, hooks, {HOOK: WIDTH}, torch.device("cpu"), torch.float32)
    scaled = {HOOK: x * SCALE}
    trainer.initialise(scaled, {HOOK: SCALE})
    for step in range(steps):
        trainer.step({HOOK: scaled[HOOK].roll(-64 * step, 0)[:64]})
    trainer.calibrate(trainer.sae, scaled)
    cfg = {
        "hook_name": HOOK,
        "input_scale": SCALE,
        "settings": sae.model_dump(mode="json", exclude_none=True),
        "tokens_trained": trainer.tokens,
        **metadata,
    }
    facts = {"id": "abc", "stream": {"corpus_fingerprint": text.fingerprint, "held_out": 0.2}}
    with new_snapshot(run, trainer.tokens, facts) as draft:
        files = SaeFiles(trainer.sae, trainer.input_transform({HOOK: SCALE}), trainer.statistics.firing_rate(), cfg)
        draft.add(sae.name, {"tokens": trainer.tokens, "hook": HOOK}, files.write(draft.folder / sae.name, x[:200]))
    return run, model
