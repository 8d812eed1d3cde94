"""One small SAE of every kind, away from its first weights, and batches for it; for the tests of the SAE family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import dense_reference as reference
from trainer.saes import registry
from trainer.saes.base import Sae
from trainer.saes.folding import InputTransform
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.saes.writing import SaeFiles
from trainer.settings import OptimizerSettings
from trainer.snapshot import new_snapshot, snapshot_folder
from trainer.training.sae_trainer import SaeTrainer

D_IN, D_OUT, D_SAE, BATCH = 12, 9, 32, 20
HOOKS = ("a", "b")
HOOK_WIDTHS = (7, 5)
"""Of a crosscoder's two hooks; together D_IN."""
UNSCALED = {"a": 1.0, "b": 1.0}
DEAD = (1, 5, 9, 20, 21, 25)
NOBODY = torch.zeros(D_SAE, dtype=torch.bool)

JUMPRELU: dict[str, Any] = {
    "architecture": "jumprelu", "target_l0": 5.0, "bandwidth": 0.8, "initial_threshold": 0.3, "pre_act_weight": 0.01,
}  # fmt: skip
TRANSCODER: dict[str, Any] = {"hook": "a", "target": "b"}
CROSSCODER: dict[str, Any] = {"hooks": ["a", "b"]}
FAMILY: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 6, "k_aux": 4},
    "topk abs": {"architecture": "topk", "k": 6, "k_aux": 4, "abs": True},
    "topk multi": {"architecture": "topk", "k": 5, "k_aux": 4, "multi_topk": 0.125},
    "topk matryoshka": {"architecture": "topk", "k": 6, "k_aux": 4, "matryoshka": [4, 16, 32]},
    "topk transcoder": {"architecture": "topk", "k": 6, **TRANSCODER},
    "topk skip transcoder": {"architecture": "topk", "k": 6, "skip": True, **TRANSCODER},
    "topk crosscoder": {"architecture": "topk", "k": 6, **CROSSCODER},
    "batchtopk": {"architecture": "batchtopk", "k": 6, "k_aux": 4},
    "batchtopk matryoshka": {"architecture": "batchtopk", "k": 3, "matryoshka": [8, 32]},
    "batchtopk transcoder": {"architecture": "batchtopk", "k": 4, "skip": True, **TRANSCODER},
    "jumprelu": JUMPRELU,
    "jumprelu log": JUMPRELU | {"threshold": "log", "straight_through": "threshold"},
    "jumprelu matryoshka": JUMPRELU | {"matryoshka": [4, 16, 32]},
    "jumprelu transcoder": JUMPRELU | TRANSCODER,
    "jumprelu skip transcoder": JUMPRELU | TRANSCODER | {"skip": True},
    "jumprelu crosscoder": JUMPRELU | CROSSCODER,
    "relu l1": {"architecture": "relu", "penalty": "l1", "sparsity_weight": 3.0},
    "relu l1_norm": {"architecture": "relu", "sparsity_weight": 3.0},
    "relu tanh": {"architecture": "relu", "penalty": "tanh", "sparsity_weight": 2.0},
    "relu transcoder": {"architecture": "relu", "sparsity_weight": 2.0, "skip": True, **TRANSCODER},
    "relu crosscoder": {"architecture": "relu", "sparsity_weight": 2.0, **CROSSCODER},
    "p_anneal": {"architecture": "p_anneal", "sparsity_weight": 3.0, "anneal_tokens": 400, "p_end": 0.5},
    "tied": {"architecture": "tied", "sparsity_weight": 3.0},
    "gated": {"architecture": "gated", "sparsity_weight": 3.0},
    "matching_pursuit": {"architecture": "matching_pursuit", "k": 6},
    "repair": {"architecture": "repair", "train": "all", "start_from": "somewhere"},
}
"""Every architecture, alone and in the roles it can have."""


def settings_of(kind: str, **options: Any) -> SaeSettings:
    fields: dict[str, Any] = {"name": "s", "d_sae": D_SAE} | FAMILY[kind] | options
    return SaeSettings.of(**fields)


def dead_latents(count: int = len(DEAD)) -> Tensor:
    dead = NOBODY.clone()
    dead[list(DEAD[:count])] = True
    return dead


def widths_of(settings: SaeSettings) -> tuple[int, ...]:
    return HOOK_WIDTHS if settings.hooks else (D_IN,)


def build(settings: SaeSettings, dtype: torch.dtype = torch.float64) -> tuple[Sae, Tensor, Tensor]:
    """(SAE, x, y): its parameters moved a little from where they begin, so that nothing is zero or symmetric."""
    torch.manual_seed(0)
    sae = registry.get(settings.architecture)(settings, widths_of(settings), D_OUT if settings.target else None)
    x = torch.randn(BATCH, D_IN, dtype=torch.float64) + 0.3
    y = torch.randn(BATCH, D_OUT, dtype=torch.float64) if settings.target else x
    sae.initialise(x.float(), y.float(), torch.Generator().manual_seed(1))
    sae.parameters = {
        name: (value.double() + 0.05 * torch.randn_like(value.double())).to(dtype)
        for name, value in sae.parameters.items()
    }
    sae.matmul_dtype = dtype
    return sae, x.to(dtype), y.to(dtype)


def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Sae, Tensor, Tensor]:
    """`build` for one of the family."""
    return build(settings_of(kind, **options), dtype)


def dense_loss(sae: Sae, parameters: dict[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, sparsity: float) -> Tensor:
    """The loss by dense autograd."""
    widths = sae.widths if sae.settings.hooks else ()
    return reference.loss(sae.settings, parameters, x, y, sae.variance, dead, sparsity, widths, sae.tokens)


# SAE trainers


def hook_widths(settings: SaeSettings) -> dict[str, int]:
    """Widths of the hooks that the SAE needs: a, and of a transcoder or crosscoder b too."""
    if settings.hooks:
        return dict(zip(HOOKS, HOOK_WIDTHS, strict=True))
    return {"a": D_IN, "b": D_OUT} if settings.target else {"a": D_IN}


def sae_trainer_of(
    settings: SaeSettings,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    run_tokens: int | None = None,
    **options: Any,
) -> SaeTrainer:
    """`options` are those of the optimizer."""
    optimizer = OptimizerSettings(**({"learning_rate": 1e-2, "warmup_tokens": 0} | options))
    hooks, widths = SaeHooks.from_settings(settings, HOOKS), hook_widths(settings)
    return SaeTrainer(settings, optimizer, hooks, widths, torch.device(device), dtype, run_tokens=run_tokens)


def rows_of(settings: SaeSettings, count: int, seed: int) -> dict[str, Tensor]:
    """Activations [count, width] of every hook: sparse sums of fixed directions about a common mean."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(count, 24, generator=generator) * (torch.rand(count, 24, generator=generator) < 0.15)
    rows = {}
    for index, (hook, width) in enumerate(hook_widths(settings).items()):
        directions = torch.randn(24, width, generator=torch.Generator().manual_seed(100 + index))
        rows[hook] = 1.5 * active @ directions + 0.3
    return rows


def train_sae(settings: SaeSettings, steps: int, **optimizer: Any) -> SaeTrainer:
    """Returns an SAE trainer after some steps of 64 tokens."""
    sae_trainer = sae_trainer_of(settings, **optimizer)
    sae_trainer.initialise(rows_of(settings, 512, 0), UNSCALED)
    learn(sae_trainer, [rows_of(settings, 64, seed) for seed in range(1, steps + 1)])
    return sae_trainer


def learn(sae_trainer: SaeTrainer, batches: Sequence[Mapping[str, Tensor]]) -> None:
    for rows in batches:
        sae_trainer.step(rows)


def publish_sae(
    directory: Path,
    sae: Sae,
    transform: InputTransform,
    firing_rate: Tensor,
    x: Tensor,
    metadata: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
    name: str = "s",
) -> Path:
    """Publishes an SAE in a snapshot of its own, tested on raw activations x; returns its folder."""
    directory.mkdir(exist_ok=True)
    with new_snapshot(directory, 1000, {}) as draft:
        weights = SaeFiles(sae, transform, firing_rate, metadata or {}).write(draft.folder / name, x)
        draft.add(name, numbers or {}, weights)
    return snapshot_folder(directory, 1000) / name
