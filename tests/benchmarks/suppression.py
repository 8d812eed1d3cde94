"""Feature suppression and its repair: every combination of scale, decoder and encoder, beside the SAE they begin with.

    python -m tests.benchmarks.suppression --activations runs/quality/demo/activations.safetensors

Trains a ReLU SAE with an L1 penalty on activations of the demo LM, as `tests.benchmarks.quality` collects them, then
`repair` in each of its variants on text that comes after, and measures all of them with the language model on held-out
text (Wright & Sharkey 2024).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from monitor.evaluation.evaluator import Baseline, evaluate
from monitor.evaluation.results import Evaluation
from producer.common.addresses import path_argument
from producer.corpus import open_corpus
from producer.corpus.held_out import held_out_windows
from producer.lm.loading import load_language_model
from tests.benchmarks.quality.activations import collect
from tests.benchmarks.quality.rows import read
from tests.benchmarks.quality.subjects import SUBJECTS
from trainer.saes.architectures.repair import TRAINABLE
from trainer.saes.hooks import SaeHooks
from trainer.saes.inference import load_sae
from trainer.saes.settings import SaeSettings
from trainer.saes.start import read_start
from trainer.saes.writing import SaeFiles
from trainer.settings import OptimizerSettings
from trainer.training.run import scale_of
from trainer.training.sae_trainer import SaeTrainer

BATCH = 2048
BEFORE = "before"
DEMO = SUBJECTS["demo"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Table of the variants of repair, on the demo LM.")
    parser.add_argument("--activations", type=path_argument, default=Path("runs/quality/demo/activations.safetensors"))
    parser.add_argument("--tokens", type=int, default=400_000, help="of the ReLU SAE")
    parser.add_argument("--repair-tokens", type=int, default=300_000, help="of each variant")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--sparsity-weight", type=float, default=3.0)
    parser.add_argument("--evaluation-tokens", type=int, default=16_384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    collect(DEMO, options.activations)
    rows = read(options.activations, "train", options.tokens + options.repair_tokens).float()
    before, after = rows.split([options.tokens, options.repair_tokens])
    with tempfile.TemporaryDirectory() as directory:
        folders = {BEFORE: Path(directory) / BEFORE}
        _train(folders[BEFORE], before, {"architecture": "relu", "sparsity_weight": options.sparsity_weight}, options)
        for variant in TRAINABLE:
            folders[variant] = Path(directory) / variant
            settings = {"architecture": "repair", "train": variant, "start_from": str(folders[BEFORE])}
            _train(folders[variant], after, settings, options)
        model = load_language_model(DEMO.model, whole=True)
        windows = held_out_windows(open_corpus(DEMO.corpus), model.tokenizer, DEMO.corpus, options.evaluation_tokens)
        results = evaluate(model, windows, [load_sae(folder) for folder in folders.values()], Baseline())
    _show(results, options.d_sae)


def _train(folder: Path, rows: Tensor, options: dict[str, object], arguments: argparse.Namespace) -> None:
    """Trains an SAE on rows in random order, and writes it."""
    settings = SaeSettings.of(name="sae", d_sae=arguments.d_sae, **options)
    is_repair = settings.start_from is not None
    optimizer = OptimizerSettings(
        batch=BATCH,
        learning_rate=3e-3,  # a scale is about 1, and moves by no more than that in a step
        warmup_tokens=len(rows) // 20,
        cooldown=0.8 if is_repair else 0.3,
    )
    hooks, scale = SaeHooks((DEMO.hook,), (DEMO.hook,)), scale_of(rows[:8192])
    trainer = SaeTrainer(
        settings, optimizer, hooks, {DEMO.hook: rows.shape[1]}, torch.device("cpu"), torch.float32, run_tokens=len(rows)
    )
    trainer.initialise({DEMO.hook: scale * rows[:8192]}, {DEMO.hook: scale}, read_start(settings))
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(BATCH):
        trainer.step({DEMO.hook: scale * rows[index]})
    transform = trainer.input_transform({DEMO.hook: scale})
    files = SaeFiles(trainer.sae, transform, trainer.statistics.firing_rate(), {"hook_name": DEMO.hook})
    files.write(folder, rows[:1024])
    print(f"{folder.name}: {len(rows):,} tokens, L0 {trainer.report({DEMO.hook: scale}).l0:.1f}", flush=True)


def _show(results: dict[str, Evaluation], d_sae: int) -> None:
    """Prints the table in Markdown."""
    print("| train | L0 | density | MSE | ΔCE | perplexity | norm ratio | shrinkage |")
    print("|---|---|---|---|---|---|---|---|")
    numbers = {name: _numbers(evaluation) for name, evaluation in results.items()}
    for name, value in numbers.items():
        mse = value["fvu"] / numbers[BEFORE]["fvu"]
        perplexity = math.exp(value["ce_sae"]) - math.exp(value["ce_clean"])
        print(
            f"| {name} | {value['l0']:.1f} | {100 * value['l0'] / d_sae:.2f} % | {100 * (mse - 1):+.1f} % "
            f"(FVU {value['fvu']:.4f}) | {value['ce_delta']:.4f} | +{perplexity:.3f} | {value['norm_ratio']:.4f} "
            f"| {value['shrinkage']:.4f} |"
        )
    print(f"\nperplexity of the model alone: {math.exp(numbers[BEFORE]['ce_clean']):.3f}")


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    return {name: float(value) for name, value in evaluation.values.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    main()
