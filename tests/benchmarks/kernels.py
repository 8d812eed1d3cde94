"""The parts of a step, each beside the plain operation that it replaces or cannot beat.

selection   which latents are active, beside torch.topk on the same pre-activations
products    everything sparse after the encoder, beside the dense product that it replaces, in bfloat16
optimizer   one whole update, beside a copy that moves as many bytes
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.benchmarks.measure import Figure, Options, Result, copying, milliseconds
from tests.benchmarks.subject import Size, correlated_rows, sae_trainer, size_for
from trainer.kernels import select
from trainer.kernels.sparse import Entries
from trainer.settings import OptimizerSettings
from trainer.training.optimizers.adam import Adam


def run(options: Options) -> Iterator[Result]:
    size = size_for(options.device, options.quick)
    x = correlated_rows(size.batch, size.d_in).to(options.device)
    sae = sae_trainer("topk", size, options.device, x).sae
    narrow = x.to(torch.bfloat16)
    pre_acts = torch.addmm(sae.b_enc.to(torch.bfloat16), narrow, sae.W_enc.to(torch.bfloat16).T)
    yield _selection(size, pre_acts, options)
    yield _products(size, x, pre_acts, sae.W_enc, sae.W_dec, options)
    yield _optimizer(size, sae.parameters, options)


def _selection(size: Size, pre_acts: Tensor, options: Options) -> Result:
    count, value = size.k * size.batch, pre_acts.float().flatten()
    threshold = float(value.kthvalue(len(value) - count).values)
    above_threshold = pre_acts - threshold
    contenders = {
        "top-k": lambda: select.topk(pre_acts, size.k),
        "torch.topk": lambda: torch.topk(pre_acts, size.k, sorted=False),
        "BatchTopK's choice": lambda: select.largest_of(select.exceeding(pre_acts, 0.8 * threshold), count),
        "torch.topk of the whole batch": lambda: torch.topk(pre_acts.flatten(), count, sorted=False),
        "JumpReLU's choice": lambda: select.positive(above_threshold),
    }
    result = Result(f"Selection: {size}, bfloat16", "ms").take_turns(
        options.rounds, {name: milliseconds(act, options.device) for name, act in contenders.items()}
    )
    result.figures = [
        Figure("top-k / torch.topk", result.ratio("top-k", "torch.topk")),
        Figure("BatchTopK / torch.topk", result.ratio("BatchTopK's choice", "torch.topk")),
        Figure("JumpReLU / torch.topk", result.ratio("JumpReLU's choice", "torch.topk")),
    ]
    return result


def _products(size: Size, x: Tensor, pre_acts: Tensor, W_enc: Tensor, W_dec: Tensor, options: Options) -> Result:
    entries = select.largest(pre_acts, size.k)
    assert isinstance(entries, Entries), "so many of so few latents are active that they are held densely"
    rows, narrow, W = x * 1e-3, x.to(torch.bfloat16), W_enc.to(torch.bfloat16)
    by_latent = entries.transpose()
    dense = "dense product, bf16"
    contenders = {
        dense: lambda: narrow @ W.T,
        "decode": lambda: entries.multiply(W_dec),
        "gradient of the latents": lambda: entries.sample(rows, W_dec),
        "sorting by latent": entries.transpose,
        "gradient of one weight matrix": lambda: by_latent.multiply(entries.value, x),
    }
    result = Result(f"Sparse products in float32: {size}", "ms").take_turns(
        options.rounds, {name: milliseconds(act, options.device) for name, act in contenders.items()}
    )
    result.figures = [Figure(f"{name} / {dense}", result.ratio(name, dense)) for name in contenders if name != dense]
    return result


def _optimizer(size: Size, parameters: dict[str, Tensor], options: Options) -> Result:
    adam = Adam(parameters, OptimizerSettings(device=options.device))
    gradients = {name: torch.randn_like(value) for name, value in parameters.items()}
    result = Result(f"Optimizer: {size}", "ms").take_turns(
        options.rounds,
        {
            "update": milliseconds(lambda: adam.step(gradients, 1e-5), options.device),
            "its bytes, copied": milliseconds(copying(size.optimizer_bytes, options.device), options.device),
        },
    )
    result.figures = [Figure("update / its bytes, copied", result.ratio("update", "its bytes, copied"))]
    return result
