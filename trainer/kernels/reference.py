"""The same mathematics in dense autograd: slow, short, and what every sparse step is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def topk_loss(
    params: dict[str, Tensor], x: Tensor, k: int, variance: float, dead: Tensor, k_aux: int, aux_weight: float
) -> Tensor:
    """TopK with AuxK: the loss of `trainer.saes.topk`, differentiable in every parameter."""
    pre_acts = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    x_hat = _keep_best(pre_acts, k) @ params["W_dec"] + params["b_dec"]
    loss = (x_hat - x).square().sum() / (len(x) * variance)
    n_dead = int(dead.sum())
    if n_dead and k_aux:
        error = (x - x_hat).detach()
        latents = _keep_best(pre_acts.masked_fill(~dead, -torch.inf), min(k_aux, n_dead))
        difference = latents @ params["W_dec"] - error
        loss = loss + aux_weight * difference.square().sum() / (error - error.mean(0)).square().sum()
    return loss


def _keep_best(pre_acts: Tensor, k: int) -> Tensor:
    value, index = torch.topk(pre_acts, k)
    return torch.zeros_like(pre_acts).scatter(1, index, value.relu())


class Jump(torch.autograd.Function):
    """z·H(z − θ) with the wide-kernel straight-through derivatives of `trainer.saes.jumprelu`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        return grad * ((z > threshold) + threshold * kernel), -(grad * threshold * kernel).sum(0), None


class Step(torch.autograd.Function):
    """H(z − θ) with ∂/∂z = K/ε and ∂/∂θ = −K/ε."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        return grad * kernel, -(grad * kernel).sum(0), None


def jumprelu_loss(
    params: dict[str, Tensor],
    x: Tensor,
    variance: float,
    bandwidth: float,
    target_l0: float,
    sparsity_weight: float,
    dead: Tensor,
    pre_act_weight: float,
) -> Tensor:
    """JumpReLU with target L0 and pre-act loss: the loss of `trainer.saes.jumprelu`."""
    pre_acts = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    x_hat = Jump.apply(pre_acts, params["threshold"], bandwidth) @ params["W_dec"] + params["b_dec"]
    l0 = Step.apply(pre_acts, params["threshold"], bandwidth).sum() / len(x)
    below = (params["threshold"] - pre_acts).relu()[:, dead]
    return (
        (x_hat - x).square().sum() / (len(x) * variance)
        + sparsity_weight * (l0 / target_l0 - 1).square()
        + pre_act_weight * below.sum() / len(x)
    )
