"""Runs inside the peers' environment: what SAELens makes of a snapshot. Nothing of ours is installed there.

python saelens_encode.py SAE_FOLDER x.safetensors out.safetensors
"""

import json
import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

folder, given, out = sys.argv[1:]
sae = SAE.load_from_disk(folder, device="cpu")
x = load_file(given)["x"]
with torch.no_grad():
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
    sae.fold_W_dec_norm()
    folded = sae.decode(sae.encode(x))
save_file({"latents": latents.contiguous(), "x_hat": x_hat.contiguous(), "folded": folded.contiguous()}, out)
metadata = sae.cfg.metadata
print(json.dumps({"architecture": sae.cfg.architecture(), "hook_name": metadata.hook_name,
                  "model_name": metadata.model_name, "context_size": metadata.context_size,
                  "trained_with": metadata.trained_with}))  # fmt: skip
