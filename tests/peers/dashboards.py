"""Runs inside the dashboards' environment, with nothing of ours installed: what its libraries make of exported latents.

python dashboards.py draw FOLDER TOKENIZER OUT.html    SAEDashboard draws sae_vis_data-0.json
python dashboards.py batch FOLDER                      SAEDashboard reads batch-0.json; prints what it holds
python dashboards.py upload FOLDER URL                 neuronpedia's package uploads batch-0.json to an API at URL
"""

import json
import sys
import types
from pathlib import Path


def draw(folder, tokenizer, out):
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
    from transformers import PreTrainedTokenizerFast  # the class by name: newer transformers name it otherwise

    model = types.SimpleNamespace(tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer))
    data = SaeVisData.load_json(
        Path(folder) / "sae_vis_data-0.json", SaeVisConfig(hook_point="hook", features=[]), model, None
    )
    save_feature_centric_vis(data, out)
    print(json.dumps({"latents": list(data.feature_data_dict), "max": data.feature_stats.aggdata["max"]}))


def batch(folder):
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    document = json.loads((Path(folder) / "batch-0.json").read_text())
    assert NeuronpediaDashboardBatch(**document).to_dict() == document | {
        "features": [feature | {"vector": []} | missing(feature) for feature in document["features"]]
    }
    print(json.dumps({"latents": [feature["feature_index"] for feature in document["features"]]}))


def missing(feature):
    """Lists that only SAEDashboard fills."""
    names = ("correlated_neurons", "correlated_features")
    lists = {f"{name}_{column}": [] for name in names for column in ("indices", "l1", "pearson")}
    return {name: value for name, value in (lists | {"decoder_weights_dist": []}).items() if name not in feature}


def upload(folder, url):
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature, Logit
    from neuronpedia.np_source import Source
    from neuronpedia.requests.base_request import NPRequest

    NPRequest.BASE_URL = url
    document = json.loads((Path(folder) / "batch-0.json").read_text())
    place = {"modelId": document["modelId"], "source": document["source"]}
    features = [
        Feature(
            **place,
            index=feature["index"],
            density=feature["density"],
            top_logits=[Logit(**logit) for logit in feature["topLogits"]],
            bottom_logits=[Logit(**logit) for logit in feature["bottomLogits"]],
            activations=[Activation(**place, index=feature["index"], **one) for one in feature["activations"]],
        )
        for feature in document["features"]
    ]
    Source(id=document["source"], model_id=document["modelId"], set_name="res-me").upload_batch(features)


{"draw": draw, "batch": batch, "upload": upload}[sys.argv[1]](*sys.argv[2:])
