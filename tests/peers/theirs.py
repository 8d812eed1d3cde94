"""Runs inside the peers' environment, with nothing of ours installed: what other libraries make of our files.

    python theirs.py load JOBS.json     each job: library, folder, x, out
    python theirs.py save JOBS.json     each job: library, kind, folder, weights (, k)
    python theirs.py evaluate JOBS.json each job: folder, model, tokens, special, out
    python theirs.py optimize JOBS.json each job: optimizer, rate, tensors (W, b and gradients W.0, b.0, W.1 …), out

All write safetensors; `load` and `evaluate` print a JSON object per line with what they say.
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
    tensors = {"latents": latents, "x_hat": sae.decode(latents), "forward": sae(x)}
    metadata = sae.cfg.metadata
    facts = {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae, "class": type(sae).__name__}
    facts |= {
        name: getattr(metadata, name, None) for name in ("hook_name", "model_name", "context_size", "trained_with")
    }
    try:
        sae.fold_W_dec_norm()
        tensors["folded"] = sae(x)
    except NotImplementedError:
        facts["unfoldable"] = True
    return tensors, facts


def load_sparsify(folder, x):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    out = sae.encode(x)
    latents = torch.zeros(len(x), sae.num_latents).scatter_(1, out.top_indices, out.top_acts)
    # forward's second argument is what is reconstructed; a transcoder needs some.
    tensors = {"latents": latents, "x_hat": sae.decode(out.top_acts, out.top_indices), "forward": sae(x, x).sae_out}
    return tensors, {"d_in": sae.d_in, "k": sae.cfg.k, "class": type(sae).__name__}


def load_dictionary_learning(folder, x):
    import datasets  # noqa: F401 (before the stand-ins, which it would ask for more)

    # The package imports these for a buffer that runs language models and for a corpus; loading needs neither.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))
    sys.modules.setdefault("zstandard", types.SimpleNamespace())
    from dictionary_learning.utils import load_dictionary

    sae, config = load_dictionary(folder, "cpu")
    latents = sae.encode(x)
    tensors = {"latents": latents, "x_hat": sae.decode(latents), "forward": sae(x)}
    return tensors, {"class": type(sae).__name__, "lm_name": config["trainer"]["lm_name"]}


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
    tensors = {"spliced": spliced[hook + ".hook_sae_acts_post"], "expected": sae.encode(plain[hook])}
    return tensors, {"hook_name": hook}


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


def in_transformer_lens(folder):
    """A Llama of a local folder, in float32."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = theirs.config
    assert config.num_key_value_heads == config.num_attention_heads
    ours = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        eps=config.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    model = HookedTransformer(ours, tokenizer=AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    model.load_state_dict(convert_llama_weights(theirs, ours), strict=False)
    return model


def evaluate_sae_lens(folder, model, tokens, special):
    """(by position, told): SAELens' own evaluation; `special` tells whether special tokens are replaced like others."""
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, get_recons_loss, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.util import get_special_token_ids

    sae, model, scaler = SAE.load_from_disk(folder), in_transformer_lens(model), ActivationScaler()
    windows, context = tokens.shape
    store = types.SimpleNamespace(
        get_batch_tokens=lambda count: tokens,
        reset_input_dataset=lambda: None,
        store_batch_size_prompts=windows,
        context_size=context,
    )
    config = get_eval_everything_config(n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1)
    report, by_latent = run_evals(sae, store, model, scaler, config, exclude_special_tokens=not special)
    ignored = None if special else list(get_special_token_ids(model.tokenizer))
    tensors = get_recons_loss(sae, model, scaler, tokens, compute_kl=True, compute_ce_loss=True, ignore_tokens=ignored)
    tensors["feature_density"] = torch.tensor(by_latent["feature_density"])
    return tensors, {name: value for group in report.values() for name, value in group.items()}


def optimize_sparsify(optimizer, rate, tensors):
    """The weights after each step, W.0 and so on, of what sparsify's Trainer builds for an optimizer."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.muon import Muon
    from sparsify.sign_sgd import SignSGD

    parameters = {name: torch.nn.Parameter(tensors[name]) for name in ("W", "b")}
    if optimizer == "signum":
        optimizers = [ScheduleFreeWrapper(SignSGD(parameters.values(), lr=rate), momentum=0.95)]
        optimizers[0].train()
    else:
        optimizers = [Muon([parameters["W"]], lr=rate, ddp=False), torch.optim.Adam([parameters["b"]], lr=rate)]
    after = {}
    for step in range((len(tensors) - 2) // 2):
        for name, parameter in parameters.items():
            parameter.grad = tensors[f"{name}.{step}"].clone()
        for one in optimizers:
            one.step()
        after |= {f"{name}.{step}": parameter.detach().clone() for name, parameter in parameters.items()}
    return after


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
        if sys.argv[1] == "optimize":
            with torch.enable_grad():
                tensors = optimize_sparsify(job["optimizer"], job["rate"], load_file(job["tensors"]))
            save_file(tensors, job["out"])
            continue
        if sys.argv[1] == "evaluate":
            tokens = load_file(job["tokens"])["tokens"]
            tensors, facts = evaluate_sae_lens(job["folder"], job["model"], tokens, job["special"])
        else:
            tensors, facts = LOADERS[job["library"]](job["folder"], load_file(job["x"])["x"])
        save_file({name: value.contiguous() for name, value in tensors.items()}, job["out"])
        print("told", json.dumps(facts))


main()
