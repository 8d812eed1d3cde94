"""Runs inside the peers' environment, with nothing of ours installed: what other libraries make of our files.

    python theirs.py load JOBS.json     each job: library, folder, x, out
    python theirs.py save JOBS.json     each job: library, kind, folder, weights (, k)

Both write safetensors; `load` prints a JSON object per line with what it says of itself.
"""

import json
import sys
import types

import torch
from safetensors.torch import load_file, save_file


def load_sae_lens(folder, x):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, device="cpu")
    latents = sae.encode(x)
    made = {"latents": latents, "x_hat": sae.decode(latents), "forward": sae(x)}
    metadata = sae.cfg.metadata
    told = {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae, "class": type(sae).__name__}
    told |= {
        name: getattr(metadata, name, None) for name in ("hook_name", "model_name", "context_size", "trained_with")
    }
    try:
        sae.fold_W_dec_norm()
        made["folded"] = sae(x)
    except NotImplementedError:
        told["unfoldable"] = True
    return made, told


def load_sparsify(folder, x):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    out = sae.encode(x)
    latents = torch.zeros(len(x), sae.num_latents).scatter_(1, out.top_indices, out.top_acts)
    # forward's second argument is what is reconstructed; a transcoder needs some.
    made = {"latents": latents, "x_hat": sae.decode(out.top_acts, out.top_indices), "forward": sae(x, x).sae_out}
    return made, {"d_in": sae.d_in, "k": sae.cfg.k, "class": type(sae).__name__}


def load_dictionary_learning(folder, x):
    import datasets  # noqa: F401 (before the stand-ins, which it would ask for more)

    # The package imports these for a buffer that runs language models and for a corpus; loading needs neither.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))
    sys.modules.setdefault("zstandard", types.SimpleNamespace())
    from dictionary_learning.utils import load_dictionary

    sae, config = load_dictionary(folder, "cpu")
    latents = sae.encode(x)
    made = {"latents": latents, "x_hat": sae.decode(latents), "forward": sae(x)}
    return made, {"class": type(sae).__name__, "lm_name": config["trainer"]["lm_name"]}


def load_spliced(folder, x):
    """SAELens' splice into TransformerLens finds the place by itself; x is ignored, the model is random."""
    from sae_lens import SAE, HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    sae = SAE.load_from_disk(folder)
    hook, shape = sae.cfg.metadata.hook_name, {"n_layers": 2, "d_model": sae.cfg.d_in, "d_head": 64, "n_ctx": 16}
    model = HookedSAETransformer(HookedTransformerConfig(d_vocab=50, act_fn="gelu", **shape))
    tokens = torch.randint(50, (2, 16))
    _, plain = model.run_with_cache(tokens)
    _, spliced = model.run_with_cache_with_saes(tokens, saes=[sae])
    made = {"spliced": spliced[hook + ".hook_sae_acts_post"], "expected": sae.encode(plain[hook])}
    return made, {"hook_name": hook}


def save_sae_lens(kind, folder, weights, k=None):
    """As SAELens' own runs end: a training SAE, saved for inference."""
    from sae_lens import saes

    names = {"standard": "Standard", "topk": "TopK", "abstopk": "AbsTopK", "batchtopk": "BatchTopK"}
    names |= {"jumprelu": "JumpReLU", "gated": "Gated"}
    d_in, d_sae = weights["W_enc"].shape
    more = {} if k is None else {"k": k}
    cfg = getattr(saes, f"{names[kind]}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, normalize_activations="none", **more)
    sae = getattr(saes, f"{names[kind]}TrainingSAE")(cfg)
    sae.load_state_dict(weights)
    sae.save_inference_model(folder)


def save_sparsify(kind, folder, weights, k=None):
    from sparsify import SparseCoder, SparseCoderConfig

    num_latents, d_in = weights["encoder.weight"].shape
    transcode, skip = "transcoder" in kind, "W_skip" in weights
    cfg = SparseCoderConfig(num_latents=num_latents, k=k, transcode=transcode, skip_connection=skip)
    sae = SparseCoder(d_in, cfg)
    sae.load_state_dict(weights)
    sae.save_to_disk(folder)


LOADERS = {
    "sae_lens": load_sae_lens,
    "sparsify": load_sparsify,
    "dictionary_learning": load_dictionary_learning,
    "transformer_lens": load_spliced,
}
SAVERS = {"sae_lens": save_sae_lens, "sparsify": save_sparsify}


@torch.no_grad()
def main():
    with open(sys.argv[2]) as file:
        jobs = json.load(file)
    for job in jobs:
        if sys.argv[1] == "save":
            SAVERS[job["library"]](job["kind"], job["folder"], load_file(job["weights"]), job.get("k"))
            continue
        made, told = LOADERS[job["library"]](job["folder"], load_file(job["x"])["x"])
        save_file({name: value.contiguous() for name, value in made.items()}, job["out"])
        print("told", json.dumps(told))


main()
