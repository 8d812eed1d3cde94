"""One SAE trained by our trainer's own step on the same batches as the peers'.

    python -m tests.benchmarks.quality.ours '{"architecture": "topk", ...}' ACTIVATIONS FOLDER

The stream, the buffer and the ledger are left out: the shuffled batches that the peers get go straight to `SaeTrainer`,
set up as `trainer.training.run.Run` does it, and the SAE comes out of the trainer's own export.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.quality.rows import BATCH, COOLDOWN, batches, warmup_tokens
from tests.benchmarks.quality.subjects import SUBJECTS
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.saes.writing import SaeFiles
from trainer.settings import OptimizerSettings
from trainer.snapshot import WEIGHTS
from trainer.training.run import scale_of
from trainer.training.sae_trainer import SaeTrainer

SAMPLE_BATCHES = 16
"""Rows that scale, centre and thresholds are estimated from; they are trained on as well."""
CALIBRATION_BATCHES = 4
"""Newest rows that a threshold for inference is estimated from."""


def main() -> None:
    cell, activations, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    began = time.monotonic()
    hook = SUBJECTS[cell["subject"]].hook
    sparsity = {"target_l0": float(cell["k"])} if cell["architecture"] == "jumprelu" else {"k": cell["k"]}
    of_optimizer = {name: value for name, value in cell["options"].items() if name in OptimizerSettings.model_fields}
    of_sae = {name: value for name, value in cell["options"].items() if name not in of_optimizer}
    settings = SaeSettings.model_validate(
        dict(name="sae", architecture=cell["architecture"], d_sae=cell["d_sae"], **sparsity)
        | dict(dead_tokens=500_000, revive_tokens=cell["dead_tokens"])
        | of_sae
    )
    optimizer = OptimizerSettings.model_validate(
        dict(batch=BATCH, learning_rate=cell["rate"], warmup_tokens=warmup_tokens(cell["tokens"]), cooldown=COOLDOWN)
        | of_optimizer
    )
    rows = batches(activations, cell["tokens"], cell["seed"])
    first = list(itertools.islice(rows, SAMPLE_BATCHES))
    sample = torch.cat(first)
    scale = scale_of(sample)
    dtype = torch.bfloat16 if cell["autocast"] else torch.float32
    target = cell["tokens"] // BATCH * BATCH
    hooks, widths, cpu = SaeHooks((hook,), (hook,)), {hook: sample.shape[1]}, torch.device("cpu")
    sae_trainer = SaeTrainer(settings, optimizer, hooks, widths, cpu, dtype, cell["seed"], run_tokens=target)
    sae_trainer.initialise({hook: sample * scale}, {hook: scale})
    newest = first[-CALIBRATION_BATCHES:]
    for batch in itertools.chain(first, rows):
        sae_trainer.step({hook: batch * scale})
        newest = [*newest[1:], batch]
    x = torch.cat(newest)
    sae_trainer.calibrate(sae_trainer.sae, {hook: x * scale})
    rate = sae_trainer.statistics.firing_rate()
    files = SaeFiles(sae_trainer.sae, sae_trainer.input_transform({hook: scale}), rate, {"hook_name": hook})
    assert files.cfg["apply_b_dec_to_input"]
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "published", x[:1024])
    (folder / "published" / WEIGHTS).replace(folder / "sae.safetensors")
    seconds = time.monotonic() - began
    report = {"architecture": files.cfg["architecture"], "k": cell["k"], "seconds": seconds}
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
