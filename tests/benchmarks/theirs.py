"""The peers' own training steps and activation paths, timed in their own environment with nothing of ours installed.

Reads one JSON object per line from standard input and answers each with one on standard output: `do` names a function
below, the rest are its arguments. What a request sets up is kept for the next one like it.

What is the peers' own: initialisation, forward, losses, gradients, clipping, optimizer, decoder normalisation, the
count of dead latents, and in the activation paths tokenisation, batching, hooks, buffers and shuffling.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "" if os.path.exists("/dev/nvidiactl") else "1")

import torch
from safetensors.torch import load_file
from torch import Tensor

Step = Callable[[Tensor], object]
LONG = 10**9
"""Samples or steps of a run that is never finished: schedules stay where they begin."""


def step(rows: str, device: str, **cell: Any) -> dict[str, float]:
    """Seconds of one training step; the first call of a cell takes a step more, which is not counted."""
    batches = _batches(rows, cell["batch"], device)
    learn, count = _learner(json.dumps(cell, sort_keys=True), rows, device)
    if not count:
        learn(batches[0])
        count.append(1)
    batch = batches[len(count) % len(batches)]
    count.append(1)
    _synchronise(device)
    began = time.perf_counter()
    learn(batch)
    _synchronise(device)
    return {"seconds": time.perf_counter() - began}


@cache
def _batches(rows: str, batch: int, device: str) -> tuple[Tensor, ...]:
    return tuple(load_file(rows)["rows"].float().to(device).split(batch))


@cache
def _learner(cell: str, rows: str, device: str) -> tuple[Step, list[int]]:
    """(one training step, a list as long as the steps done)"""
    given = json.loads(cell)
    d_in = _batches(rows, given["batch"], device)[0].shape[1]
    make = {"saelens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
    return make[given["library"]](given, d_in, device), []


def _saelens(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """SAETrainer.step, which its `fit` calls."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[cell["architecture"]]
    options = {"k": cell["k"]}
    if cell["architecture"] == "jumprelu":
        options = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": cell["k"]}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=cell["d_sae"], device=device, **options)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=LONG,
            train_batch_size_samples=cell["batch"],
            lr=3e-4,
            lr_end=3e-5,
            device=device,
            autocast=cell["autocast"],
        ),
        sae,
        iter(()),
    )

    def learn(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return learn


def _dictionary_learning(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """`update` of its trainers, which trainSAE calls."""
    _without_nnsight()
    from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer

    common = dict(
        steps=LONG, activation_dim=d_in, dict_size=cell["d_sae"], layer=1, lm_name="-", device=device, warmup_steps=0
    )
    match cell["architecture"]:
        case "topk":
            trainer: Any = TopKTrainer(k=cell["k"], **common)
        case "batchtopk":
            trainer = BatchTopKTrainer(k=cell["k"], **common)
        case "jumprelu":
            trainer = JumpReluTrainer(target_l0=cell["k"], **common)
    loss, steps = trainer.loss, [0]

    def loss_in_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cell["autocast"]):
            return loss(*args, **kwargs)

    trainer.loss = loss_in_autocast

    def learn(x: Tensor) -> None:
        trainer.update(steps[0], x)
        steps[0] += 1

    return learn


def _sparsify(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """SparseCoder and the loop of its Trainer, which only runs with a language model inside, line by line."""
    from sparsify import SparseCoder, SparseCoderConfig

    assert cell["architecture"] == "topk"
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=cell["d_sae"], k=cell["k"]), device=device)
    optimizer = torch.optim.Adam(sae.parameters())
    tokens_since_fired = torch.zeros(cell["d_sae"], dtype=torch.long, device=device)

    def learn(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cell["autocast"]):
            out = sae(x, dead_mask=None)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[out.latent_indices.flatten()] = 0

    return learn


def _without_nnsight() -> None:
    """dictionary_learning imports nnsight for its buffer; its trainers need none."""
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))  # type: ignore[arg-type]


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    # Libraries print what they like; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"step": step}[request.pop("do")](**request)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__} in {place.name}, {place.line}: {error}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
