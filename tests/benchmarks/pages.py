"""Pages of an SAE of 131,072 latents: how long a person waits for the table, a search, one latent, and a sentence.

The SAE and the language model it reads are random, of the width of GPT-2's small one; what counts is their size. The
service is the real one, over loopback; a first answer, when nothing is mapped or cached yet, is told apart.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
import transformers

from monitor.evaluation.latents.activations import LatentActivations
from monitor.evaluation.latents.explorer import Explorer
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app, start_service
from monitor.run_directory import LATENTS
from producer.common.metrics import new_registry
from producer.lm.loading import load_language_model
from producer.settings import CorpusSettings, ModelSettings
from tests.benchmarks.measure import Figure, Options, Result
from tests.small_run import Export, publish_snapshot, start_run

D_SAE, L0, ROWS, WIDTH, CONTEXT = 131_072, 64, 65_536, 768, 256
HOOK = "blocks.0.hook_resid_post"
ASKED = {
    "the live page": "/",
    "the table, sorted by density": "/parts/latents?sae=wide&order=density",
    "the table, searched": "/parts/latents?sae=wide&search=import",
    "one latent": "/latents/wide/7777",
    "a sentence": "/parts/fires?sae=wide&text=for i in range(10): import this",
}
PATIENCE = 1.0
"""Seconds after which people begin to think of other things (Nielsen)."""


def run(options: Options) -> Iterator[Result]:
    d_sae = D_SAE // 16 if options.quick else D_SAE
    with tempfile.TemporaryDirectory() as folder:
        explorer = _explorer(Path(folder), d_sae)
        before = psutil.Process().memory_info().rss
        app = make_app(Path(folder) / "run", new_registry(), handle=ExplorerHandle(explorer))
        port, close = start_service(app, "127.0.0.1", 0)
        result = Result(f"pages of {d_sae:,} latents", "s")
        try:
            # The first answers map files and fill caches; they are told apart from those that follow.
            result.take_turns(1, {f"{what}, the first time": _asking(port, path) for what, path in ASKED.items()})
            result.take_turns(options.rounds, {what: _asking(port, path) for what, path in ASKED.items()})
        finally:
            close()
        result.figures = [
            Figure(f"{what}, {d_sae:,} latents", result.middle(what), PATIENCE, unit="s") for what in ASKED
        ]
        grown = (psutil.Process().memory_info().rss - before) / 1e9
        result.figures.append(Figure("memory that pages took, mapped files included", grown, unit="GB"))
        yield result


def _asking(port: int, path: str) -> Callable[[], float]:
    """Seconds until the whole answer is there; before it, as long as a person reads."""

    def ask() -> float:
        time.sleep(2.0)
        began = time.perf_counter()
        httpx.get(f"http://127.0.0.1:{port}{path}", timeout=60).raise_for_status()
        return time.perf_counter() - began

    return ask


def _explorer(folder: Path, d_sae: int) -> Explorer:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained("producer/demo_lm")
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = WIDTH, 2, 12
    config.num_key_value_heads, config.head_dim = 12, 64
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "lm")
    transformers.AutoTokenizer.from_pretrained("producer/demo_lm").save_pretrained(folder / "lm")
    model = load_language_model(ModelSettings(name=str(folder / "lm"), hooks=[HOOK]), whole=True)
    random = np.random.default_rng(0)
    start_run(folder / "run")
    snapshot = publish_snapshot(folder / "run", 1000, [_sae(random, d_sae)])
    _activations(random, d_sae, model.vocabulary).save(snapshot / "wide" / LATENTS)
    return Explorer(folder / "run", model, CorpusSettings())


def _sae(random: np.random.Generator, d_sae: int) -> Export:
    W = random.standard_normal((d_sae, WIDTH), np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    return Export(
        name="wide",
        cfg={"architecture": "topk", "k": L0, "d_in": WIDTH, "d_sae": d_sae, "metadata": {"hook_name": HOOK}},
        weights={"W_enc": W.T, "W_dec": W, "b_enc": np.zeros(d_sae, np.float32), "b_dec": np.zeros(WIDTH, np.float32)},
        firing_rate=np.full(d_sae, L0 / d_sae),
        selftest={"x": np.zeros((1, WIDTH), np.float32)},
        metrics={"architecture": "topk", "hook": HOOK, "d_sae": d_sae},
    )


def _activations(random: np.random.Generator, d_sae: int, vocabulary: int) -> LatentActivations:
    """L0 latents on each row, drawn unevenly as in a real SAE: some fire a thousand times as often as others."""
    rates = random.lognormal(0, 1.5, d_sae)
    counts = random.multinomial(ROWS * L0, rates / rates.sum())
    starts = np.concatenate([[0], counts.cumsum()])
    values = random.gamma(2.0, 3.0, ROWS * L0).astype(np.float32)
    for latent in range(d_sae):
        values[starts[latent] : starts[latent + 1]][::-1].sort()
    return LatentActivations(
        ids=random.integers(0, vocabulary, (ROWS // CONTEXT, CONTEXT)).astype(np.uint32),
        shown=np.ones((ROWS // CONTEXT, CONTEXT), bool),
        streamed=np.ones((ROWS // CONTEXT, CONTEXT), bool),
        starts=starts,
        positions=random.integers(0, ROWS, ROWS * L0).astype(np.uint32),
        values=values,
        born=np.zeros(d_sae, np.int64),
        outliers=np.zeros((ROWS // CONTEXT, CONTEXT), bool),
    )
