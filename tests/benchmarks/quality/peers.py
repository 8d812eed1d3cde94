"""One SAE, trained by another library's own trainer on our batches, and converted to plain weights.

    python peers.py '{"library": "saelens", "architecture": "topk", ...}' ACTIVATIONS FOLDER

Runs in the peers' environment with nothing of ours installed. Writes FOLDER/sae.safetensors (W_enc [d_in, d_sae],
b_enc, W_dec [d_sae, d_in], b_dec, threshold; raw activations in) and FOLDER/training.json. The plain weights are
compared with the library's own encode and decode before they are written: a conversion that differs ends in an error.

What is the library's own: initialisation, forward, losses, gradients, clipping, optimizer, decoder normalisation, dead
latents' revival, input normalisation and its folding. What is set, because the defaults are for runs a hundred times
as long: the learning rate with its warm-up and decay, when a latent counts as dead, and when thresholds are tracked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import BATCH, COOLDOWN, batches, read, warmup_tokens
from safetensors.torch import save_file
from torch import Tensor

SCALE_BATCHES = 16
"""Batches that a norm is estimated from; they are trained on as well."""
CHECKED_ROWS = 256
TOLERANCE = 1e-4

Plain = tuple[dict[str, Tensor], dict[str, Any]]
"""Plain weights, and what InferenceSae's cfg needs: architecture and k."""


def autocast(cell: dict[str, Any]) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=cell["autocast"])


class TopK(NamedTuple):
    values: Tensor
    indices: Tensor


def faster_topk(topk: Callable[..., Any]) -> Callable[..., Any]:
    """torch.topk, which for a whole batch at once (BatchTopK, 8 million numbers) takes most of a step on a CPU.

    There, a sample says which numbers cannot be among the k largest, and topk sees the others: the same k.
    """

    def fast_topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        k = int(k)
        if x.dim() == 1 and len(x) > 20 * k and (enough := _at_least(x.detach(), k)) is not None:
            indices = enough[topk(x.detach()[enough], k, sorted=sorted).indices]
            return TopK(x.gather(0, indices), indices)
        return topk(x, k, dim=dim, largest=largest, sorted=sorted)

    return fast_topk


def _at_least(x: Tensor, k: int) -> Tensor | None:
    """Indices of a few more than the k largest of x [n], or None when the sample misled."""
    sample = x[::61]
    bound = sample.topk(min(len(sample), int(1.3 * k / 61) + 10)).values[-1]
    indices = (x > bound).nonzero().squeeze(1)
    return indices if len(indices) >= k else None


# --- SAELens ---------------------------------------------------------------------------------------------------------


def saelens(cell: dict[str, Any], rows: Iterator[Tensor]) -> tuple[Plain, Any]:
    """Its SAETrainer.fit with TopK-, BatchTopK- or JumpReLUTrainingSAE, and its own export for inference."""
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    first = list(itertools.islice(rows, SCALE_BATCHES))
    common = dict(d_in=first[0].shape[1], d_sae=cell["d_sae"], normalize_activations="expected_average_only_in")
    options = common | cell["options"]
    match cell["architecture"]:
        case "topk":
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(k=cell["k"], **options))
        case "batchtopk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=cell["k"], **options))
        case "jumprelu":
            options = dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=cell["k"]) | options
            sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**options))
    steps = cell["tokens"] // BATCH
    cfg = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=cell["rate"],
        lr_end=cell["rate"] / 10,
        lr_warm_up_steps=warmup_tokens(cell["tokens"]) // BATCH,
        lr_decay_steps=int(COOLDOWN * steps),
        dead_feature_window=cell["dead_tokens"] // BATCH,
        autocast=cell["autocast"],
        n_batches_for_norm_estimate=SCALE_BATCHES,
    )
    sae = SAETrainer(cfg, sae, itertools.chain(first, first, rows)).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        inference_sae = SAE.load_from_disk(folder)
    weights = {name: value.detach().clone() for name, value in inference_sae.state_dict().items()}
    assert inference_sae.cfg.apply_b_dec_to_input and inference_sae.cfg.normalize_activations == "none"
    about = {"architecture": "topk" if cell["architecture"] == "topk" else "jumprelu"}
    return (weights, about), lambda x: inference_sae.decode(inference_sae.encode(x))


# --- dictionary_learning ---------------------------------------------------------------------------------------------


def dictionary_learning(cell: dict[str, Any], rows: Iterator[Tensor]) -> tuple[Plain, Any]:
    """`update(step, x)` of its TopKTrainer, BatchTopKTrainer or JumpReluTrainer, as its trainSAE calls it.

    Rows are divided by the root of their mean square norm and biases scaled back, as with normalize_activations=True.
    """
    # The package imports nnsight for a buffer that runs language models; nothing here uses it.
    sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=None)  # type: ignore[assignment]
    from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer

    first = list(itertools.islice(rows, SCALE_BATCHES))
    norm = float(torch.stack([batch.square().sum(1).mean() for batch in first]).mean().sqrt())
    steps = cell["tokens"] // BATCH
    common = dict(
        steps=steps,
        activation_dim=first[0].shape[1],
        dict_size=cell["d_sae"],
        layer=1,
        lm_name=cell["subject"],
        lr=cell["rate"],
        warmup_steps=warmup_tokens(cell["tokens"]) // BATCH,
        decay_start=steps - int(COOLDOWN * steps),
        seed=cell["seed"],
        device="cpu",
    )
    # The threshold's average spans 100 steps instead of 1000, and starts when a quarter of the run is over.
    threshold = dict(threshold_beta=0.99, threshold_start_step=steps // 4)
    match cell["architecture"]:
        case "topk":
            trainer: Any = TopKTrainer(k=cell["k"], **threshold | common | cell["options"])
        case "batchtopk":
            trainer = BatchTopKTrainer(k=cell["k"], **threshold | common | cell["options"])
        case "jumprelu":
            sparsity = dict(target_l0=cell["k"], sparsity_warmup_steps=warmup_tokens(cell["tokens"]) // BATCH)
            trainer = JumpReluTrainer(**sparsity | common | cell["options"])
    trainer.dead_feature_threshold = cell["dead_tokens"]
    loss = trainer.loss

    def loss_in_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with autocast(cell):
            return loss(*args, **kwargs)

    trainer.loss = loss_in_autocast
    for step, batch in enumerate(itertools.chain(first, rows)):
        trainer.update(step, batch / norm)
    sae = trainer.ae
    sae.scale_biases(norm)
    if cell["architecture"] == "jumprelu":
        # It does not subtract b_dec from its input; ours does, so b_enc takes it back.
        b_enc = sae.b_enc + sae.b_dec @ sae.W_enc
        weights = dict(W_enc=sae.W_enc, b_enc=b_enc, W_dec=sae.W_dec, b_dec=sae.b_dec, threshold=sae.threshold)
        about = {"architecture": "jumprelu"}
    else:
        weights = dict(W_enc=sae.encoder.weight.T, b_enc=sae.encoder.bias, W_dec=sae.decoder.weight.T, b_dec=sae.b_dec)
        about = {"architecture": "topk"}
        if cell["architecture"] == "batchtopk":
            weights["threshold"] = sae.threshold.expand(cell["d_sae"])
            about = {"architecture": "jumprelu"}
    return (weights, about), lambda x: sae.decode(sae.encode(x))


# --- sparsify --------------------------------------------------------------------------------------------------------


def sparsify(cell: dict[str, Any], rows: Iterator[Tensor]) -> tuple[Plain, Any]:
    """Its SparseCoder, and the loop of its Trainer, which only runs with a language model inside, line by line."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    assert cell["architecture"] == "topk"
    options = dict(optimizer="adam", auxk_alpha=1 / 32) | cell["options"]
    first = next(rows)
    steps = cell["tokens"] // BATCH
    torch.manual_seed(cell["seed"])
    sae = SparseCoder(first.shape[1], SparseCoderConfig(num_latents=cell["d_sae"], k=cell["k"]))
    sae.b_dec.data = first.mean(0)
    if options["optimizer"] == "adam":
        optimizer: Any = torch.optim.Adam(sae.parameters(), lr=cell["rate"])
        schedulers = [get_linear_schedule_with_warmup(optimizer, warmup_tokens(cell["tokens"]) // BATCH, steps)]
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=cell["rate"]), momentum=0.95)
        optimizer.train()
        schedulers = []
    tokens_since_fired = torch.zeros(cell["d_sae"], dtype=torch.long)
    for batch in itertools.chain([first], rows):
        sae.set_decoder_norm_to_unit_norm()
        dead = tokens_since_fired > cell["dead_tokens"] if options["auxk_alpha"] > 0 else None
        with autocast(cell):
            out = sae(batch, dead_mask=dead)
        (out.fvu + options["auxk_alpha"] * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        tokens_since_fired += len(batch)
        tokens_since_fired[out.latent_indices.flatten()] = 0
    if not schedulers:
        optimizer.eval()
    weights = dict(W_enc=sae.encoder.weight.T, b_enc=sae.encoder.bias, W_dec=sae.W_dec, b_dec=sae.b_dec)

    def reconstruct(x: Tensor) -> Tensor:
        top_acts, top_indices, _ = sae.encode(x)
        return sae.decode(top_acts, top_indices)

    return (weights, {"architecture": "topk"}), reconstruct


# --- Any of them -----------------------------------------------------------------------------------------------------


def plain_reconstruction(weights: dict[str, Tensor], k: int, x: Tensor) -> Tensor:
    """x [rows, d_in] through the plain weights, written out."""
    pre_acts = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    if "threshold" in weights:
        latents = pre_acts.relu() * (pre_acts > weights["threshold"])
    else:
        value, index = pre_acts.topk(k)
        latents = torch.zeros_like(pre_acts).scatter_(1, index, value.relu())
    return latents @ weights["W_dec"] + weights["b_dec"]


def main() -> None:
    cell, activations, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(cell["seed"])
    torch.topk = torch.Tensor.topk = faster_topk(torch.topk)  # type: ignore[assignment,method-assign]
    began = time.monotonic()
    train = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}[cell["library"]]
    (weights, about), reconstruct = train(cell, batches(activations, cell["tokens"], cell["seed"]))
    seconds = time.monotonic() - began
    weights = {name: value.detach().float().contiguous() for name, value in weights.items()}
    x = read(activations, "validation", CHECKED_ROWS).float()
    with torch.no_grad():
        theirs, plain = reconstruct(x), plain_reconstruction(weights, cell["k"], x)
    # Rows, not elements: where a pre-activation lies on a threshold, rounding may choose either way in one of them.
    difference = float(((theirs - plain).norm(dim=1) / theirs.norm(dim=1)).quantile(0.99))
    if not difference <= TOLERANCE:
        raise SystemExit(f"the plain weights reconstruct otherwise than the library: {difference:.2g} relative")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae.safetensors")
    report = {**about, "k": cell["k"], "seconds": seconds, "conversion_difference": difference}
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
