"""A whole training step per architecture, beside the physical limit and the peers' own steps at the same size.

The limit is one bfloat16 product of the encoder, and the optimizer's bytes at the bandwidth of a plain copy, both
measured here in the same rounds. Nothing is dead in so short a run, so that nobody's auxiliary loss is at work.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from mmap import mmap
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks.measure import WITHOUT_PEERS, Figure, Options, Peers, Result, copying, milliseconds
from tests.benchmarks.subject import BATCHES, HOOK, Size, correlated_rows, sae_trainer, size_for
from trainer.training.sae_trainer import SaeTrainer

TITLES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
LIBRARIES = {
    "topk": ("saelens", "dictionary_learning", "sparsify"),
    "batchtopk": ("saelens", "dictionary_learning"),
    "jumprelu": ("saelens", "dictionary_learning"),
}
NAMES = {"saelens": "SAELens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
PRODUCT, WRITTEN, BYTES = "encoder product, bf16", "the same into memory that is there", "optimizer's bytes, copied"
"""The result is a hundred megabytes; to touch so much fresh memory takes as long as the product itself."""


def run(architecture: str, options: Options) -> Iterator[Result]:
    size, device = size_for(options.device, options.quick), options.device
    rows = correlated_rows(BATCHES * size.batch, size.d_in)
    subject = sae_trainer(architecture, size, device, rows)
    contenders = {"Sluice": stepping(subject, rows.to(device), size.batch), **limit(size, rows, device)}
    result = Result(f"Training step, {TITLES[architecture]}: {size}", "ms")
    with ExitStack() as stack:
        theirs = {}
        if options.peers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peers = stack.enter_context(Peers(options.peers))
            theirs = _peers_steps(architecture, size, rows, device, peers, folder)
        else:
            result.notes.append(WITHOUT_PEERS)
        result.take_turns(options.rounds, contenders | theirs)
    result.notes.append(f"L0 of ours as measured: {subject.report({HOOK: 1.0}).l0:.1f}")
    result.figures += _figures(result, architecture, device, list(theirs))
    yield result


def stepping(sae_trainer: SaeTrainer, rows: Tensor, batch: int) -> Callable[[], float]:
    """Milliseconds of a step on batches of `rows` that take turns; the first two steps are not counted."""
    batches = itertools.cycle(rows.split(batch))
    for _ in range(2):
        sae_trainer.step({HOOK: next(batches)})
    return milliseconds(lambda: sae_trainer.step({HOOK: next(batches)}), rows.device.type, at_least=1.5)


def limit(size: Size, rows: Tensor, device: str) -> dict[str, Callable[[], float]]:
    """What a step cannot do without, in milliseconds."""
    x = rows[: size.batch].to(device, torch.bfloat16)
    W = torch.randn(size.d_sae, size.d_in, device=device).to(torch.bfloat16)
    there = torch.zeros(size.batch, size.d_sae, dtype=torch.bfloat16, device=device)
    acts: dict[str, Callable[[], object]] = {
        PRODUCT: lambda: torch.mm(x, W.T, out=_fresh(size, device)),
        WRITTEN: lambda: torch.mm(x, W.T, out=there),
        BYTES: copying(size.optimizer_bytes, device),
    }
    return {name: milliseconds(act, device) for name, act in acts.items()}


def _fresh(size: Size, device: str) -> Tensor:
    """Memory for pre-activations that comes from the system, whatever the C library keeps of what was freed."""
    shape = size.batch, size.d_sae
    if device != "cpu":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    return torch.frombuffer(mmap(-1, 2 * size.batch * size.d_sae), dtype=torch.bfloat16).view(shape)


def _peers_steps(
    architecture: str, size: Size, rows: Tensor, device: str, peers: Peers, folder: Path
) -> dict[str, Callable[[], float]]:
    path = folder / "rows.safetensors"
    save_file({"rows": rows}, path)

    def step(library: str, autocast: bool) -> float:
        cell = {"library": library, "architecture": architecture, "autocast": autocast}
        more = {"k": size.k, "d_sae": size.d_sae, "batch": size.batch}
        return 1e3 * peers.ask("step", rows=str(path), device=device, **cell, **more)["seconds"]

    return {
        f"{NAMES[library]}, {'bf16 autocast' if autocast else 'float32'}": partial(step, library, autocast)
        for library in LIBRARIES[architecture]
        for autocast in (False, True)
    }


def _figures(result: Result, architecture: str, device: str, theirs: list[str]) -> list[Figure]:
    name = TITLES[architecture]
    fastest = result.least(theirs, "the fastest peer")
    times_faster = result.ratio(fastest, "Sluice")
    if device == "cpu":
        goal = 1.8 if name == "TopK" else 2.5
        return [
            Figure(f"{name} step / encoder product", result.ratio("Sluice", PRODUCT), goal),
            Figure(f"{name} step / encoder product into memory that is there", result.ratio("Sluice", WRITTEN)),
            Figure(f"{fastest} / {name} step", times_faster, 6.0, at_least=True),
        ]
    result.measured["lower bound"] = [
        product + copy for product, copy in zip(result.measured[PRODUCT], result.measured[BYTES], strict=True)
    ]
    return [
        Figure(f"{name} step / lower bound", result.ratio("Sluice", "lower bound"), 1.6),
        Figure(f"{fastest} / {name} step", times_faster, 2.0, at_least=True),
    ]
