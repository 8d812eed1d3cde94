"""A run whose latents are known: each fires on one word of the demo's language model, for the tests of what pages show.

The hook is the model's first, where an activation is the embedding of its token: a latent that reads along one
embedding fires on that token and on no other. Its decoder row writes the token's own unembedding, so that is what it
promotes.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from monitor.evaluation.follow import Evaluator
from monitor.evaluation.latents.explorer import Explorer
from monitor.http.explorer_handle import ExplorerHandle
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.metrics import new_registry
from producer.common.run_file import read_run_file
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import ModelSettings
from tests.small_run import Export, publish_snapshot, start_run

HOOK = "blocks.0.hook_resid_pre"
WORDS = (" import", " return", " class", " self", " socket", " def")
"""Words that latents 0 to 5 fire on; no text contains socket. Latent 6 is dense: it fires on all of them but socket."""
VALUE = 10.0
"""Value of a latent on its word."""
DENSE = len(WORDS)
TEXT = [
    "import os, import sys and import <script>alert(1)</script>",
    "for the class of self we return self",
    "a class that is naïve or has a 🦓 may return nothing",
    "never def a class",
]


def small_model(*hooks: str) -> LanguageModel:
    torch.set_num_threads(1)
    settings = ModelSettings(name="producer/demo_lm", hooks=list(hooks or [HOOK]), device="cpu", dtype="float32")
    return load_language_model(settings, whole=True)


def tokens_of(model: LanguageModel) -> list[int]:
    """The id of each of WORDS: one token each."""
    ids = [model.tokenizer.encode(word, add_special_tokens=False) for word in WORDS]
    assert all(len(tokens) == 1 for tokens in ids), ids
    return [tokens[0] for tokens in ids]


def planted_sae(model: LanguageModel, name: str = "planted", turned: tuple[int, ...] = ()) -> Export:
    """An SAE of len(WORDS) + 1 latents; the decoder rows of those `turned` point the other way."""
    with torch.no_grad():
        E = model.network.module.get_input_embeddings().weight[tokens_of(model)].float()
        unembedding = model.unembedding()
        W_enc = VALUE * E / E.square().sum(1, keepdim=True)
        in_text = [index for index, word in enumerate(WORDS) if word != " socket"]
        W_enc = torch.cat([W_enc, torch.linalg.pinv(E[in_text]).sum(1, keepdim=True).T * VALUE])
        W_dec = torch.nn.functional.normalize(unembedding.W_U[tokens_of(model)].float() / unembedding.gain, dim=1)
        W_dec = torch.cat([W_dec, torch.nn.functional.normalize(W_dec[0] + 0.1 * W_dec[1], dim=0)[None]])
        W_dec[list(turned)] *= -1
    weights = {
        "W_enc": W_enc.T.numpy(),
        "W_dec": W_dec.numpy(),
        "b_enc": np.zeros(len(W_enc), np.float32),
        "b_dec": np.zeros(E.shape[1], np.float32),
        "threshold": np.full(len(W_enc), 0.95 * VALUE, np.float32),
    }
    cfg = {"architecture": "jumprelu", "d_in": E.shape[1], "d_sae": len(W_enc), "metadata": {"hook_name": HOOK}}
    return Export(
        name=name,
        cfg=cfg,
        weights=weights,
        firing_rate=np.full(len(W_enc), 0.5),
        selftest={"x": np.zeros((1, E.shape[1]), np.float32)},
        metrics={"architecture": "jumprelu", "hook": HOOK, "d_sae": len(W_enc), "l0": 1.0, "fvu": 0.5},
    )


def run_file(folder: Path) -> Path:
    """A run on TEXT many times over, half of it held out, without a snapshot."""
    (folder / "text.txt").write_text("\n".join(TEXT[line % len(TEXT)] for line in range(240)), "utf-8")
    start_run(folder / "run")
    path = folder / "run.toml"
    path.write_text(f"""
[run]
directory = "{folder / "run"}"
[model]
name = "producer/demo_lm"
hooks = ["{HOOK}"]
device = "cpu"
dtype = "float32"
[corpus]
kind = "text"
paths = ["{folder / "text.txt"}"]
shard_bytes = 1000
held_out = 0.5
context = 16
[monitor]
port = 0
service_port = 0
poll_seconds = 0.1
evaluation_tokens = 200
latents_tokens = 2000
""")
    return path


def read_run(folder: Path, model: LanguageModel) -> Explorer:
    """A run with two snapshots, in the second of which latent 2 has turned; both are looked at."""
    settings = read_run_file(MonitorSettings, str(run_file(folder)), [])
    handle = ExplorerHandle()
    follower = Evaluator(settings, MonitorMetrics(new_registry()), threading.Event(), handle)
    for tokens, turned in ((1000, ()), (2000, (2,))):
        publish_snapshot(folder / "run", tokens, [planted_sae(model, turned=turned)])
        follower.look()
    assert handle.explorer is not None and not follower.has_failed()
    return handle.explorer
