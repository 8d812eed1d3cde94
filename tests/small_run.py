"""A run directory as the trainer leaves it, small enough to check by hand; for the tests of the monitor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer.snapshot import Export, publish
from trainer.state.durable import replace_text

D_IN, D_SAE = 4, 8


def start_run(directory: Path) -> Path:
    """What a trainer writes at once: the folder and its settings."""
    directory.mkdir(parents=True)
    settings = f'''
[run]
directory = "{directory}"
[model]
name = "tiny"
hooks = ["blocks.0.hook_resid_post"]
'''
    replace_text(directory / "settings.toml", settings)
    return directory


def identity_sae(name: str, d_in: int = D_IN, hook: str = "blocks.0.hook_resid_post", gain: float = 1.0) -> Export:
    """An SAE whose latents are the positive and the negative part of x: x_hat = gain · x."""
    one = np.eye(d_in, dtype=np.float32)
    weights = {
        "W_enc": np.concatenate([one, -one], axis=1),
        "W_dec": gain * np.concatenate([one, -one]),
        "b_enc": np.zeros(2 * d_in, np.float32),
        "b_dec": np.zeros(d_in, np.float32),
        "threshold": np.zeros(2 * d_in, np.float32),
    }
    cfg: dict[str, Any] = {"architecture": "jumprelu", "d_in": d_in, "d_sae": 2 * d_in, "metadata": {"hook_name": hook}}
    x = np.arange(2 * d_in, dtype=np.float32).reshape(2, d_in)
    latents = np.maximum(x @ weights["W_enc"], 0)
    return Export(
        name=name,
        cfg=cfg,
        weights=weights,
        firing_rate=np.full(2 * d_in, 0.5),
        selftest={"x": x, "latents": latents, "x_hat": latents @ weights["W_dec"]},
        metrics={"l0": 4.0, "fvu": 0.25, "dead_latents_ratio": None},
    )


def publish_snapshot(directory: Path, tokens: int, exports: list[Export] | None = None, **run: Any) -> Path:
    """One snapshot of an SAE called `small`, or of `exports`; `run` goes into the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    return publish(directory, tokens, exports or [identity_sae("small")], run, check=lambda folder: None)


def finish_run(directory: Path, tokens: int, saes: tuple[str, ...] = ("small",)) -> None:
    """The summary that ends a run."""
    told = {name: {"architecture": "jumprelu", "fvu": 0.25} for name in saes}
    replace_text(directory / "summary.json", json.dumps({"tokens": tokens, "seconds": 1.0, "saes": told}))
