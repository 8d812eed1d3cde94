"""The same mathematics in dense autograd: slow, short, and what every step by hand is tested against.

`loss` is the whole loss of an architecture, differentiable in every parameter. It is written from the equations at the
head of each architecture's file and shares no code with them; `s` are its settings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def loss(
    s: Any,
    params: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    variance: float,
    dead: Tensor,
    sparsity: float = 1.0,
    widths: tuple[int, ...] = (),
    tokens: int = 0,
) -> Tensor:
    """The loss of one batch x [batch, d_in], y [batch, d_out]; `widths` of a crosscoder's hooks.

    `tokens` that the SAE has trained on.
    """
    batch, is_transcoder = len(x), s.target is not None
    W_dec, W_enc = params["W_dec"], params.get("W_enc", params["W_dec"])
    b_dec = params.get("b_dec", torch.zeros_like(y[0]))
    centred = not is_transcoder and s.architecture != "repair"
    read = x - b_dec if centred else x
    pre_acts = read @ W_enc.T + params.get("b_gate", params.get("b_enc", 0.0))
    skipped = x @ params["W_skip"].T if s.skip else 0.0

    def fidelity(latents: Tensor, W_dec: Tensor = W_dec, b_dec: Tensor = b_dec) -> Tensor:
        levels = [latents[:, :end] @ W_dec[:end] + b_dec + skipped for end in s.levels]
        return torch.stack([(y - y_hat).square().sum() / (batch * variance) for y_hat in levels]).mean()

    weight = sparsity * (getattr(s, "sparsity_weight", None) or 0.0) / (batch * variance)
    if s.architecture == "topk":
        latents = keep_largest(pre_acts, s.k, s.abs)
        total = fidelity(latents)
        if s.multi_topk:
            total = total + s.multi_topk * fidelity(keep_largest(pre_acts, 4 * (s.k or 0), s.abs))
    elif s.architecture == "batchtopk":
        assert s.k is not None
        flat = pre_acts.relu().flatten()
        index = flat.topk(batch * s.k).indices
        latents = torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(pre_acts)
        total = fidelity(latents)
    elif s.architecture == "jumprelu":
        latents, total = _jumprelu(s, params, pre_acts, dead, sparsity, weight)
        total = total + fidelity(latents)
    elif s.architecture == "gated":
        gate = pre_acts.relu()
        magnitude = (read @ W_enc.T) * params["r_mag"].exp() + params["b_mag"]
        latents = (pre_acts > 0) * magnitude.relu()
        total = fidelity(latents) + weight * gate.sum() + fidelity(gate, W_dec.detach(), b_dec.detach())
    elif s.architecture == "matching_pursuit":
        latents, rest = torch.zeros_like(pre_acts), read
        for _ in range(s.k):
            index = (rest @ W_dec.T).argmax(1)
            value = (rest * W_dec[index]).sum(1, keepdim=True).relu()
            rest = rest - value * W_dec[index]
            latents = latents.scatter_add(1, index[:, None], value)
        total = fidelity(latents)
    elif s.architecture == "p_anneal":
        latents = pre_acts.relu()
        power = (latents + 0.01) ** s.p(tokens) - 0.01 ** s.p(tokens)
        total = fidelity(latents) + weight * (latents.sum() / power.sum()).detach() * power.sum()
    else:
        latents = pre_acts.relu() * params.get("scale", torch.ones_like(pre_acts[0]))
        total = fidelity(latents)
        blocks = W_dec.split(list(widths) if widths else W_dec.shape[1], 1)
        norms = torch.stack([block.norm(dim=1) for block in blocks]).sum(0)
        sparsity_kind = getattr(s, "sparsity", None)
        if sparsity_kind == "l1":
            total = total + weight * latents.sum()
        elif sparsity_kind == "l1_norm":
            total = total + weight * (latents * norms).sum()
        elif sparsity_kind == "tanh":
            total = total + weight * (s.tanh_scale * latents * norms).tanh().sum()
    n_dead = int(dead.sum())
    if s.revival == "auxk" and n_dead:
        y_hat = latents @ W_dec + b_dec + skipped
        error = (y - y_hat).detach()
        magnitude = getattr(s, "abs", False)
        of_dead = pre_acts.masked_fill(~dead, 0.0 if magnitude else -torch.inf)
        helpers = keep_largest(of_dead, min(s.k_aux or x.shape[1] // 2, n_dead), magnitude)
        difference = helpers @ W_dec - error
        total = total + s.aux_weight * difference.square().sum() / (error - error.mean(0)).square().sum()
    return total


def keep_largest(pre_acts: Tensor, k: int | None, magnitude: bool = False) -> Tensor:
    """All but the k largest of each row set to zero; ReLU, or for magnitudes the signs kept."""
    assert k is not None
    index = (pre_acts.abs() if magnitude else pre_acts).topk(k).indices
    value = pre_acts.gather(1, index)
    return torch.zeros_like(pre_acts).scatter(1, index, value if magnitude else value.relu())


def _jumprelu(
    s: Any, params: dict[str, Tensor], z: Tensor, dead: Tensor, sparsity: float, weight: float
) -> tuple[Tensor, Tensor]:
    """(latents, loss beside the reconstruction)"""
    theta = params["log_threshold"].exp() if s.threshold == "log" else params["threshold"]
    to_encoder = s.straight_through == "encoder"
    latents = Jump.apply(z, theta, s.bandwidth, to_encoder)
    l0 = Step.apply(z, theta, s.bandwidth, to_encoder).sum()
    if s.sparsity == "target_l0":
        extra = sparsity * s.l0_weight * (l0 / (len(z) * (s.target_l0 or 0.0)) - 1).square()
    elif s.sparsity == "l0":
        extra = weight * l0
    else:
        extra = weight * (s.tanh_scale * latents).tanh().sum()
    if s.revival == "pre_act":
        lifted = dead if s.pre_act_on == "dead" else torch.ones_like(dead)
        extra = extra + s.pre_act_weight * (theta - z).relu()[:, lifted].sum() / len(z)
    return latents, extra


class Jump(torch.autograd.Function):
    """z·H(z − θ) with the straight-through derivatives of `trainer.saes.architectures.jumprelu`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_encoder: bool = True) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_encoder = bandwidth, to_encoder
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        through = threshold * kernel
        return grad * ((z > threshold) + through * ctx.to_encoder), -(grad * through).sum(0), None, None


class Step(torch.autograd.Function):
    """H(z − θ) with ∂/∂z = K/ε (or nothing) and ∂/∂θ = −K/ε."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_encoder: bool = True) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_encoder = bandwidth, to_encoder
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        return grad * kernel * ctx.to_encoder, -(grad * kernel).sum(0), None, None
