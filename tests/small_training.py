"""A whole training run on activations of known ground truth, in one process: corpus → wire → buffer → SAEs → snapshot.

Everything is the real thing: a producer's thread sends the synthetic corpus over a socket,
`trainer.training.loop.Loop` takes batches from the shuffling buffer, and `judge` measures the snapshot that it
publishes on held-out raw activations.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from producer.corpus.synthetic import SyntheticActivations
from producer.settings import CorpusSettings, ProducerSettings, RunSettings, SyntheticSettings
from producer.sources.synthetic import SyntheticSource
from producer.wire import Hello
from tests.small_stream import Producing, hello_of, new_ledger, stream_settings, wait_for
from trainer.control.commands import handle
from trainer.control.requests import Inbox
from trainer.phases import RunPhase
from trainer.report import StepReport
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.settings import SaeSettings
from trainer.settings import BufferSettings, OptimizerSettings, TrainerSettings
from trainer.snapshot import snapshot_names
from trainer.stream.buffer import ShuffleBuffer
from trainer.stream.intake import Intake
from trainer.stream.payload import TORCH_DTYPE
from trainer.training.loop import Loop
from trainer.training.roster import Member
from trainer.training.run import Run

HELD_OUT = 1 / 16
CONTEXT = 128
SHARD_WINDOWS = 64
BATCH = 512
ROWS = 1_200_000
"""Tokens that suffice for every candidate on every truth."""

SHARKEY = SaeSettings.of(name="topk-sharkey", architecture="topk", d_sae=1024, k=5, dead_tokens=100_000)
AtStart = Callable[[Run], None]

TRUTHS: dict[str, dict[str, Any]] = {
    "equal": {},
    "decay": {"decay": 0.99},
    "correlated": {"decay": 0.99, "correlated": True},
}
"""The variants of Sharkey et al. 2022: features equally frequent, less and less frequent, and coming in company."""


def candidates() -> dict[str, SaeSettings]:
    """SAEs with twice as many latents as there are true features, each with settings that find them all."""
    return {sae.name: sae for sae in map(_candidate, _CANDIDATES)}


_CANDIDATES: list[dict[str, Any]] = [
    {"name": "topk", "architecture": "topk", "k": 3},
    {"name": "batchtopk", "architecture": "batchtopk", "k": 3, "learning_rate": 1e-2},
    {
        "name": "jumprelu",
        "architecture": "jumprelu",
        "target_l0": 2.0,
        "bandwidth": 2.0,
        "initial_threshold": 1.0,
        "revive": "auxk",
        "learning_rate": 1e-2,
    },
    {"name": "matryoshka", "architecture": "topk", "k": 3, "matryoshka": [64, 256]},
    {
        "name": "gated",
        "architecture": "gated",
        "sparsity_weight": 6.0,
        "sparsity_warmup_tokens": 300_000,
        "revive": "none",
        "learning_rate": 5e-3,
    },
]


def _candidate(settings: dict[str, Any]) -> SaeSettings:
    return SaeSettings.of(d_sae=256, dead_tokens=50_000, **settings)


def truth(
    features: int = 128, d_in: int = 64, active: float = 3.0, tokens: int = 1_000_000, **more: Any
) -> CorpusSettings:
    """Sharkey's recipe, with `tokens` to train on and held-out shards beside them."""
    shards = 2 + int(1.15 * tokens / (CONTEXT * SHARD_WINDOWS * (1 - HELD_OUT)))
    synthetic = SyntheticSettings(
        d_in=d_in, features=features, active=active, shards=shards, shard_windows=SHARD_WINDOWS, **more
    )
    return CorpusSettings(kind="synthetic", context=CONTEXT, held_out=HELD_OUT, synthetic=synthetic)


def train_on_truth(
    saes: list[SaeSettings],
    corpus: CorpusSettings,
    tokens: int,
    directory: Path,
    *,
    learning_rate: float = 3e-3,
    batch: int = BATCH,
    seed: int = 0,
    at_start: AtStart | None = None,
) -> Run:
    """Trains on `tokens` of the stream and publishes; `at_start` may change the SAEs before the first step."""
    # ipc addresses are short, temporary folders of tests are not.
    with tempfile.TemporaryDirectory() as socket_folder:
        stream = stream_settings(f"ipc://{socket_folder}/s")
        settings = TrainerSettings(
            run=RunSettings(directory=str(directory), tokens=tokens, threads=1, seed=seed),
            stream=stream,
            corpus=corpus,
            buffer=BufferSettings(rows=65_536),
            optimizer=OptimizerSettings(
                batch=batch, device="cpu", matmul="float32", learning_rate=learning_rate, warmup_tokens=100_000
            ),
            sae=saes,
        )

        def make_buffer(hello: Hello) -> ShuffleBuffer:
            widths = [hook.width for hook in hello.hooks]
            return ShuffleBuffer(settings.buffer.rows, widths, TORCH_DTYPE[hello.dtype], seed)

        ledger = new_ledger(stream, settings.buffer.rows)
        source = SyntheticSource(ProducerSettings(stream=stream, corpus=corpus))
        with Intake(stream, ledger, make_buffer) as intake:
            producer = Producing(stream, source, hello_of(source, stream.dtype, held_out=corpus.held_out))
            wait_for(lambda: ledger.identity.hello is not None)
            assert ledger.identity.hello is not None
            run = (Run if at_start is None else _beginning_with(at_start))(settings, ledger.identity.hello)
            loop = Loop(settings, run.roster, intake, Inbox(threading.Event()), Silent(), handle)
            loop.begin(run)
            assert loop.train() is RunPhase.FINISHED
            intake.drain(finished=True)
            assert producer.wait_for_end() is None
            assert ledger.tokens_trained == tokens
        return run


def train_on_sharkey(directory: Path) -> Run:
    """The recipe's own size: 512 features in 256 dimensions, five of them active, 1024 latents."""
    corpus = truth(features=512, d_in=256, active=5.0, tokens=1_500_000)
    return train_on_truth([SHARKEY], corpus, 1_500_000, directory, batch=1024, learning_rate=2e-3)


def _beginning_with(at_start: AtStart) -> type[Run]:
    class Changed(Run):
        def initialise(self, sample: list[Tensor]) -> list[Member]:
            removed = super().initialise(sample)
            at_start(self)
            return removed

    return Changed


class Silent:
    """A listener that ignores every event."""

    def on_fill(self, report: StepReport) -> None: ...
    def on_report(self, report: StepReport) -> None: ...
    def on_publish(self, tokens: int) -> None: ...
    def on_save(self) -> None: ...


@dataclass(frozen=True)
class TruthScores:
    """Measures of a published SAE against the truth, on held-out raw activations."""

    cosine: Tensor
    """Largest cosine of each true direction with a row of the decoder; the mean is MMCS."""
    fvu: float
    l0: float
    dead: float
    """Fraction of latents that fire on no held-out token."""
    sae: InferenceSae

    @property
    def mmcs(self) -> float:
        return float(self.cosine.mean())

    @property
    def worst(self) -> float:
        return float(self.cosine.min())


def judge_newest(run: Run, name: str) -> TruthScores:
    """Judges the run's newest snapshot of one SAE."""
    directory = Path(run.settings.run.directory)
    return judge(load_sae(directory / "snapshots" / snapshot_names(directory)[-1] / name), run.settings.corpus)


def judge(sae: InferenceSae, corpus: CorpusSettings) -> TruthScores:
    """Judges an SAE that takes raw activations."""
    data = SyntheticActivations(corpus)
    x = torch.cat([torch.from_numpy(data.activations(shard)) for shard in data.held_out_shards[:2]])
    latents = sae.encode(x)
    error = (x - sae.decode(latents)).double().square().sum()
    return TruthScores(
        cosine=best_cosines(sae.W_dec, data),
        fvu=float(error / (x - x.mean(0)).double().square().sum()),
        l0=float((latents != 0).sum(1).double().mean()),
        dead=float((latents == 0).all(0).double().mean()),
        sae=sae,
    )


def best_cosines(W_dec: Tensor, truth: SyntheticActivations) -> Tensor:
    """For each true direction, the largest cosine with a row of W_dec [d_sae, d_in]."""
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (torch.from_numpy(truth.directions) @ rows.T).amax(1)
