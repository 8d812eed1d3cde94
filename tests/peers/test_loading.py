"""Other libraries, the real ones, load what we write with their own loaders and agree with us. Run by `make peers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.peers.compare import LIBRARY, NAMES, Comparison, Peers
from tests.peers.family import READ, Zoo, difference

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]

BY_VALUE = [name for name in NAMES if name.startswith("topk") and name != "topk-abs"]
TOPK_TRANSCODERS = ["topk-transcoder", "topk-skip-transcoder"]
SKIP = [name for name in NAMES if "skip" in name]
CAN = {
    "snapshot": [name for name in NAMES if name not in TOPK_TRANSCODERS],
    "saelens": [name for name in NAMES if name not in TOPK_TRANSCODERS],
    "jumprelu": [name for name in NAMES if not name.startswith("topk")],
    "sparsify": BY_VALUE,
    "dictionary_learning": [name for name in NAMES if name not in SKIP and name != "topk-abs"],
}
"""What each format can say."""
DICTIONARY = {
    "topk": "AutoEncoderTopK",
    "topk-transcoder": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "batchtopk-ema": "BatchTopKSAE",
    "batchtopk-matryoshka": "MatryoshkaBatchTopKSAE",
    "batchtopk-whitening": "JumpReluAutoEncoder",
    "batchtopk-transcoder": "JumpReluAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "relu-l1": "AutoEncoder",
    "tied": "AutoEncoder",
    "relu-transcoder": "AutoEncoderNew",
    "repair": "AutoEncoderNew",
    "gated": "GatedAutoEncoder",
}
SAELENS = {
    "topk": "topk",
    "topk-abs": "abstopk",
    "topk-ema": "topk",
    "batchtopk": "jumprelu",
    "batchtopk-transcoder": "jumprelu_transcoder",
    "jumprelu-skip-transcoder": "jumprelu_skip_transcoder",
    "relu-l1": "standard",
    "relu-transcoder": "transcoder",
    "relu-skip-transcoder": "skip_transcoder",
    "tied": "standard",
    "gated": "gated",
    "repair": "standard",
}


@pytest.mark.parametrize("format_name", LIBRARY)
@pytest.mark.parametrize("name", NAMES)
def test_they_encode_and_decode_as_we_do(name: str, format_name: str, comparison: Comparison) -> None:
    """Latents, reconstruction and forward agree to 1e-5 on real activations, or the format is refused in a sentence."""
    verdict = comparison[name, format_name]
    if name in CAN[format_name]:
        assert not verdict.refusal
        assert verdict.worst < 1e-5, verdict.difference
    else:
        assert verdict.refusal
        assert format_name == "snapshot" or "--format" in verdict.refusal


@pytest.mark.parametrize(("name", "architecture"), SAELENS.items())
def test_saelens_knows_what_it_is_and_where_it_is_from(name: str, architecture: str, comparison: Comparison) -> None:
    """Architecture, hook, model and provenance survive, in snapshots and in exports."""
    for format_name in ("snapshot", "saelens"):
        facts = comparison[name, format_name].facts
        assert facts is not None
        assert facts["architecture"] == architecture
        assert facts["hook_name"] == READ
        assert facts["model_name"] == "producer/demo_lm"
        assert facts["context_size"] == 256
        assert facts["trained_with"] == "sluice"


@pytest.mark.parametrize("name", CAN["snapshot"])
def test_saelens_folds_decoder_norms_where_that_is_possible(name: str, comparison: Comparison) -> None:
    """`fold_W_dec_norm` changes nothing; it refuses top-k whose rows whitening or several hooks have made unequal."""
    facts, differences = comparison[name, "snapshot"].facts, comparison[name, "snapshot"].difference
    assert facts is not None and differences is not None
    if name in ("topk-whitening", "topk-crosscoder"):
        assert facts["unfoldable"]
    else:
        assert differences["folded"] < 1e-5


@pytest.mark.parametrize(("name", "class_name"), DICTIONARY.items())
def test_dictionary_learning_gets_its_own_classes(name: str, class_name: str, comparison: Comparison) -> None:
    """Not everything is a JumpReLU: what they have a class for is loaded as that."""
    facts = comparison[name, "dictionary_learning"].facts
    assert facts is not None
    assert facts["class"] == class_name
    assert facts["lm_name"] == "producer/demo_lm"


def test_saelens_splices_it_into_transformer_lens(peers: Peers, zoo: Zoo, tmp_path: Path) -> None:
    """By the hook's name in its metadata, without being told."""
    save_file({"x": zoo.rows.of[READ][:4].contiguous()}, tmp_path / "x")
    job = {"library": "transformer_lens", "folder": str(zoo["topk"].folder), "x": str(tmp_path / "x")}
    (facts,) = peers.load([job | {"out": str(tmp_path / "out")}])
    tensors = load_file(tmp_path / "out")

    assert facts["hook_name"] == READ
    assert tensors["expected"].count_nonzero() > 0
    assert difference(tensors["spliced"], tensors["expected"]) < 1e-5
