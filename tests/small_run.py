"""A run directory as the trainer leaves it, small enough to check by hand; for the tests of the monitor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from tests.small_model import HOOK, WORDS
from trainer.snapshot import SPARSITY, WEIGHTS, Draft, new_snapshot, snapshot_folder
from trainer.state.durable import replace_text
from trainer.state.format import (
    Checkpoint,
    CheckpointDocument,
    CheckpointTensors,
    LedgerState,
    MemberState,
    OptimizerState,
    RosterState,
    RunState,
    SaeState,
    SaeTensors,
    StatisticsState,
    decode_document,
    encode_document,
)
from trainer.training.run import Run

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


def write_text_run(
    folder: Path, model: Path, monitor: str, model_keys: str = "", run: str = "run", lines: int = 400
) -> Path:
    """A run file, of a started run of a language model on small shards of random text, a quarter of them held out.

    `monitor` and `model_keys` are lines of these tables.
    """
    words = np.random.default_rng(1).integers(0, WORDS, (lines, 10))
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{word}" for word in line) for line in words))
    start_run(folder / run)
    path = folder / "run.toml"
    path.write_text(f'''
[run]
directory = "{folder / run}"
[model]
name = "{model}"
hooks = ["{HOOK}"]
device = "cpu"
{model_keys}
[corpus]
kind = "text"
paths = ["{text}"]
shard_bytes = 1000
held_out = 0.25
context = 8
[monitor]
{monitor}
''')
    return path


@dataclass(frozen=True)
class Export:
    """A published SAE in memory, for snapshots that no trainer wrote."""

    name: str
    cfg: dict[str, Any]
    weights: dict[str, np.ndarray]
    firing_rate: np.ndarray
    """[d_sae], 0 for a latent that never fired."""
    selftest: dict[str, np.ndarray]
    """x [n, d_in], latents [n, d_sae], x_hat [n, d_out]."""
    metrics: dict[str, Any]

    def write(self, draft: Draft) -> None:
        folder = draft.folder / self.name
        folder.mkdir()
        (folder / "cfg.json").write_text(json.dumps(self.cfg, indent=1, allow_nan=False))
        save_file({name: np.ascontiguousarray(array) for name, array in self.weights.items()}, folder / WEIGHTS)
        sparsity = np.log10(np.maximum(self.firing_rate, 1e-10)).astype(np.float32)
        save_file({"sparsity": sparsity}, folder / SPARSITY)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in self.selftest.items()},
            folder / "selftest.safetensors",
        )
        draft.add(self.name, self.metrics)


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
    return publish(directory, tokens, exports or [identity_sae("small")], run)


def publish(directory: Path, tokens: int, exports: list[Export], run: dict[str, Any]) -> Path:
    """A snapshot of SAEs in memory; returns its folder."""
    with new_snapshot(directory, tokens, run) as draft:
        for export in exports:
            export.write(draft)
    return snapshot_folder(directory, tokens)


def finish_run(directory: Path, tokens: int, saes: tuple[str, ...] = ("small",)) -> None:
    """Writes the summary that ends a run."""
    measures = {name: {"architecture": "jumprelu", "fvu": 0.25} for name in saes}
    replace_text(directory / "summary.json", json.dumps({"tokens": tokens, "seconds": 1.0, "saes": measures}))


def small_checkpoint(
    tokens: int = 1000, step: int = 0, parameters: dict[str, Tensor] | None = None, run: str = "run"
) -> Checkpoint:
    """A checkpoint of a run with one SAE, `small`, that has these parameters; `step` tells checkpoints apart."""
    sae = SaeState(
        variance=1.0, skipped_steps=0, tokens=tokens, joined_at=0, cooldown=None, seed=0, matmul="float32",
        planned_tokens=None,
    )  # fmt: skip
    ledger = LedgerState(
        run=run, seed=0, stream=None, norm_bounds=None, epoch=0, cursor=0, next_serial=0, finished_in_epoch=0,
        rows_trained=tokens, rows_discarded=0, rows_set_aside=0, set_aside=[], sessions_lost=0, rejected={}, errors={},
        auth_failures=0, breaches={}, open=[],
    )  # fmt: skip
    roster = RosterState([MemberState({"name": "small"}, number=0)], joined=1)
    counts, sums = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
    statistics = StatisticsState(0, torch.zeros(2), counts, sums, sums + 1, sums + 2, sums + 3)
    tensors = SaeTensors(parameters or {}, OptimizerState(0, {}), statistics, ema={}, whitening=None)
    return Checkpoint(
        CheckpointDocument(RunState(step, 0.0, None, {"small": sae}), roster, ledger, buffer_random=None),
        CheckpointTensors({"small": tensors}, shards={}, buffer_names=None),
    )


def by_key(saes: dict[str, SaeTensors]) -> dict[str, Tensor]:
    """Tensors of all SAEs, with the SAE's name in front of their keys."""
    return {f"{name}/{key}": value for name, sae in saes.items() for key, value in sae.by_key().items()}


def checkpoint_of(run: Run) -> Checkpoint:
    """A run's SAEs and roster, with the ledger of `small_checkpoint`."""
    (state, saes), other = run.state(), small_checkpoint()
    document = replace(other.document, run=state, roster=run.roster.state())
    return Checkpoint(document, replace(other.tensors, saes=saes))


def ledger_through_json(state: LedgerState) -> LedgerState:
    """The books of a ledger as a checkpoint gives them back."""
    document = replace(small_checkpoint().document, ledger=state)
    return decode_document(json.loads(json.dumps(encode_document(document)))).ledger
