"""Export and starts without other libraries (tests/peers has the real ones): conversions, refusals, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.small_run import identity_sae, publish_snapshot, start_run
from trainer.saes.export import LOADED_BY, main
from trainer.saes.folding import recentre
from trainer.saes.formats import FORMATS, convert, read_published
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.published import FormatError, SaeWeights
from trainer.saes.settings import SaeSettings
from trainer.saes.start import check_starts, read_start, require_widths
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError

D_IN, D_SAE = 6, 16
PER_LATENT = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


def random_sae(architecture: str, d_out: int = D_IN, seed: int = 0, **cfg: Any) -> SaeWeights:
    """An SAE of random weights with a bias that matters."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(random(D_SAE, d_out))
    weights = {"W_enc": random(D_SAE, D_IN), "W_dec": W_dec, "b_dec": 3 * random(d_out)}
    kind = architecture.split("_")[0] if architecture.split("_")[0] in PER_LATENT else ""
    weights |= {name: random(D_SAE) for name in PER_LATENT.get(kind, ("b_enc",))}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].abs()
    if "skip" in architecture:
        weights["W_skip"] = random(d_out, D_IN)
    transcoder = architecture.endswith("transcoder")
    more: dict[str, Any] = {"k": 4} if "topk" in architecture else {}
    plain = {"architecture": architecture, "apply_b_dec_to_input": not transcoder, "metadata": {}}
    return SaeWeights(plain | more | cfg, weights)


def inference(sae: SaeWeights) -> InferenceSae:
    return InferenceSae(sae.cfg, sae.weights | {"W_enc": sae.weights["W_enc"].T})


def rows(count: int = 500) -> Tensor:
    return 2 * torch.randn(count, D_IN, generator=torch.Generator().manual_seed(9)) + 1


def write_sae(folder: Path, sae: SaeWeights, format_name: str = "saelens") -> Path:
    from trainer.saes.formats import write

    folder.mkdir(parents=True)
    write(folder, convert(sae, format_name))
    return folder


@pytest.mark.parametrize("architecture", ["gated", "standard", "transcoder", "skip_transcoder", "jumprelu"])
def test_what_is_a_threshold_at_inference_is_written_as_one(architecture: str) -> None:
    """Gated and ReLU as JumpReLU: the same latents on every row, with biases and scales of every sign."""
    sae, x = random_sae(architecture), rows()
    converted = sae.activation.as_jumprelu(sae)
    expected = inference(sae).encode(x)

    assert "jumprelu" in converted.architecture
    assert torch.equal(inference(converted).encode(x) > 0, expected > 0)
    torch.testing.assert_close(inference(converted).encode(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inference(converted)(x), inference(sae)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gated", "standard", "jumprelu", "topk"])
def test_b_dec_moves_in_and_out_of_the_encoder(architecture: str) -> None:
    """A gated SAE's magnitude gets exp(r_mag) times the shift."""
    sae, x = random_sae(architecture), rows()
    recentred = recentre(sae.weights, True, False)
    back = recentre(recentred, False, True)
    plain = InferenceSae(sae.cfg | {"apply_b_dec_to_input": False}, recentred | {"W_enc": recentred["W_enc"].T})

    torch.testing.assert_close(plain.encode(x), inference(sae).encode(x), rtol=1e-4, atol=1e-5)
    for name, value in sae.weights.items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "refused_by"),
    [
        ("topk", {"jumprelu"}),
        ("abstopk", {"jumprelu", "sparsify", "dictionary_learning"}),
        ("standard", {"sparsify"}),
        ("gated", {"sparsify"}),
        ("jumprelu", {"sparsify"}),
        ("transcoder", {"sparsify"}),
        ("jumprelu_skip_transcoder", {"sparsify", "dictionary_learning"}),
        ("topk_transcoder", {"saelens", "jumprelu"}),
        ("topk_skip_transcoder", {"saelens", "jumprelu", "dictionary_learning"}),
    ],
)
def test_a_format_says_no_and_which_would_do(architecture: str, refused_by: set[str]) -> None:
    """The sentence names the architecture and the formats that can, and those really can."""
    sae = random_sae(architecture)
    for name in FORMATS:
        if name not in refused_by:
            convert(sae, name)
            continue
        with pytest.raises(FormatError) as error:
            convert(sae, name)
        assert f"architecture {architecture}" in str(error.value)
        assert all(other in str(error.value) for other in FORMATS.keys() - refused_by)


def test_two_widths_fit_saelens_only() -> None:
    """sparsify and dictionary_learning have one width; a top-k transcoder of two has no format at all."""
    convert(random_sae("jumprelu_transcoder", d_out=4), "saelens")
    with pytest.raises(FormatError, match=r"6 and 4; use --format saelens or jumprelu$"):
        convert(random_sae("jumprelu_transcoder", d_out=4), "dictionary_learning")
    with pytest.raises(FormatError, match="no other format"):
        convert(random_sae("topk_transcoder", d_out=4), "sparsify")


@pytest.mark.parametrize("architecture", ["topk", "topk_transcoder", "topk_skip_transcoder"])
def test_sparsify_and_back(architecture: str, tmp_path: Path) -> None:
    """Bit for bit the same weights."""
    sae = random_sae(architecture)
    back = read_published(write_sae(tmp_path / "s", sae, "sparsify"))

    assert back.architecture == architecture
    assert back.cfg["k"] == 4
    assert all(torch.equal(back.weights[name], value) for name, value in sae.weights.items())


def test_batchtopk_keeps_its_class_where_one_threshold_says_it_all() -> None:
    """dictionary_learning's BatchTopKSAE has a scalar; thresholds that differ make it a JumpReLU."""
    metadata = {"settings": {"architecture": "batchtopk", "k": 4}}
    sae = random_sae("jumprelu", metadata=metadata)
    same = SaeWeights(sae.cfg, sae.weights | {"threshold": torch.full((D_SAE,), 0.7)})
    nested = SaeWeights(
        sae.cfg | {"metadata": {"settings": {**metadata["settings"], "matryoshka": [4, 10, D_SAE]}}}, same.weights
    )

    assert convert(sae, "dictionary_learning")["config.json"]["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    files = convert(same, "dictionary_learning")
    assert files["config.json"]["trainer"] | {"dict_class": "BatchTopKSAE", "k": 4} == files["config.json"]["trainer"]
    assert float(files["ae.pt"]["threshold"]) == pytest.approx(0.7)
    assert convert(nested, "dictionary_learning")["ae.pt"]["group_sizes"].tolist() == [4, 6, 6]


def test_rows_that_saelens_rescales_are_read_as_it_reads_them(tmp_path: Path) -> None:
    """rescale_acts_by_decoder_norm with rows of any norm: norms go into the encoder, before top-k chooses."""
    sae = random_sae("topk", rescale_acts_by_decoder_norm=True)
    norm = torch.linspace(0.3, 3, D_SAE)
    free = SaeWeights(sae.cfg, sae.weights | {"W_dec": sae.weights["W_dec"] * norm[:, None]})
    read = read_published(write_sae(tmp_path / "s", free))
    x = rows()
    pre_acts = ((x - free.weights["b_dec"]) @ free.weights["W_enc"].T + free.weights["b_enc"]) * norm
    best = pre_acts.topk(4)
    expected = torch.zeros_like(pre_acts).scatter_(1, best.indices, best.values.relu())

    torch.testing.assert_close(inference(read).encode(x), expected)
    torch.testing.assert_close(read.weights["W_dec"], sae.weights["W_dec"])


# The command


def test_help_needs_no_torch() -> None:
    """Arguments are read before anything heavy is imported, and both lists of formats agree."""
    program = "import sys, trainer.saes.export; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert LOADED_BY.keys() == FORMATS.keys()


def test_a_run_a_snapshot_or_one_sae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest snapshot of a run, every SAE in a folder of its own; one alone goes into DIR itself."""
    run = start_run(tmp_path / "run")
    publish_snapshot(run, 1000)
    snapshot = publish_snapshot(run, 2000, [identity_sae("a"), identity_sae("b", gain=0.5)])

    def export(*arguments: str | Path) -> int:
        return main([*map(str, arguments), "--format", "dictionary_learning"])

    assert export(run, "--to", tmp_path / "1") == 0
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["a", "b"]
    assert f'load_dictionary("{tmp_path}/1/a", device="cpu")' in capsys.readouterr().out
    assert export(snapshot, "--sae", "b", "--to", tmp_path / "2") == 0
    assert sorted(path.name for path in (tmp_path / "2").iterdir()) == ["ae.pt", "config.json", "provenance.json"]
    assert export(snapshot / "b", "--to", tmp_path / "3") == 0
    state = torch.load(tmp_path / "3" / "ae.pt", weights_only=True)
    assert all(torch.equal(state[n], v) for n, v in torch.load(tmp_path / "2" / "ae.pt", weights_only=True).items())
    torch.testing.assert_close(state["W_dec"], load_sae(snapshot / "b").W_dec)


def test_a_copy_keeps_its_self_test_and_passes_it(tmp_path: Path) -> None:
    """In SAELens' layout everything beside the weights comes along."""
    snapshot = publish_snapshot(start_run(tmp_path / "run"), 1000)

    assert main([str(snapshot), "--sae", "small", "--format", "saelens", "--to", str(tmp_path / "copy")]) == 0
    for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "selftest.safetensors"):
        assert (tmp_path / "copy" / name).is_file()
    copy, original = (
        load_file(tmp_path / "copy/sae_weights.safetensors"),
        load_file(snapshot / "small/sae_weights.safetensors"),
    )
    assert all(torch.equal(copy[name], value) for name, value in original.items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--format", "sparsify", "--to", "new"], 2, "architecture jumprelu: sparsify knows top-k"),
        (["run", "--format", "saelens", "--to", "full"], 2, "choose another --to"),
        (["run", "--format", "saelens", "--to", "full/file"], 2, "choose another --to"),
        (["run", "--sae", "strange", "--format", "saelens", "--to", "new"], 1, "no sae 'strange'; it has small"),
        (["full", "--format", "saelens", "--to", "new"], 1, "is no snapshot"),
        (["nowhere", "--format", "saelens", "--to", "new"], 1, "is no snapshot"),
        (["unborn", "--format", "saelens", "--to", "new"], 1, "no complete snapshot yet"),
        (["broken", "--format", "saelens", "--to", "new"], 1, "differs from the manifest"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence, an exit code, and no folder."""
    monkeypatch.chdir(tmp_path)
    publish_snapshot(start_run(tmp_path / "run"), 1000)
    broken = publish_snapshot(start_run(tmp_path / "broken"), 1000)
    (broken / "small/cfg.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "unborn/snapshots").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    assert main(arguments) == code
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output
    assert sorted(tmp_path.rglob("*")) == before


# Starts


def settings(path: Path, **changes: Any) -> SaeSettings:
    """A TopK that goes on from `path`; None takes a key away."""
    fields = {"name": "on", "architecture": "topk", "d_sae": D_SAE, "k": 4, "start_from": str(path)} | changes
    return SaeSettings.of(**{key: value for key, value in fields.items() if value is not None})


class Bomb:
    """Unpickled, it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def hostile(folder: Path, how: str) -> None:
    """Spoils a start."""
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    data, config = weights.read_bytes(), json.loads(cfg.read_text())
    tensors = load_file(weights)
    spoilt: dict[str, Any] = {
        "pickle": lambda: weights.write_bytes(pickle.dumps(Bomb())),
        "torch file": lambda: (folder / "ae.pt").write_bytes(pickle.dumps(Bomb())),
        "truncated": lambda: weights.write_bytes(data[: len(data) // 2]),
        "empty": lambda: weights.write_bytes(b""),
        "header of 2^60 bytes": lambda: weights.write_bytes((1 << 60).to_bytes(8, "little") + data[8:]),
        "no weights": weights.unlink,
        "no cfg": cfg.unlink,
        "cfg no JSON": lambda: cfg.write_text("{'a': "),
        "cfg no text": lambda: cfg.write_bytes(b"\xff\xfe\x00"),
        "cfg too deep": lambda: cfg.write_text("[" * 1_000_000),
        "cfg a list": lambda: cfg.write_text("[]"),
        "architecture a list": lambda: cfg.write_text(json.dumps(config | {"architecture": ["topk"]})),
        "unknown architecture": lambda: cfg.write_text(json.dumps(config | {"architecture": "temporal"})),
        "k a word": lambda: cfg.write_text(json.dumps(config | {"k": "4"})),
        "k too large": lambda: cfg.write_text(json.dumps(config | {"k": 10_000})),
        "normalised": lambda: cfg.write_text(json.dumps(config | {"normalize_activations": "layer_norm"})),
        "top-k of SAELens 5": lambda: cfg.write_text(
            json.dumps(config | {"architecture": "standard", "activation_fn_str": "topk"})
        ),
        "checkpoint": lambda: save_file(tensors | {"topk_threshold": torch.zeros(())}, weights),
        "nan": lambda: save_file(tensors | {"b_enc": torch.full((D_SAE,), float("nan"))}, weights),
        "no b_enc": lambda: save_file({n: v for n, v in tensors.items() if n != "b_enc"}, weights),
        "transposed": lambda: save_file(tensors | {"W_dec": tensors["W_dec"].T.contiguous()}, weights),
        "a vector": lambda: save_file(tensors | {"W_enc": torch.zeros(D_SAE)}, weights),
        "strange tensor": lambda: save_file(tensors | {"act_freq": torch.zeros(D_SAE)}, weights),
    }
    spoilt[how]()


HOSTILE = [
    "pickle", "torch file", "truncated", "empty", "header of 2^60 bytes", "no weights", "no cfg", "cfg no JSON",
    "cfg no text", "cfg too deep", "cfg a list", "architecture a list", "unknown architecture", "k a word",
    "k too large", "normalised", "top-k of SAELens 5", "checkpoint", "nan", "no b_enc", "transposed", "a vector",
    "strange tensor",
]  # fmt: skip


def test_a_start_of_other_widths_is_refused(tmp_path: Path) -> None:
    """With both widths: what the folder is for, and what the hooks have."""
    start = read_start(settings(write_sae(tmp_path / "start", random_sae("topk"))))
    assert start is not None
    width = start.d_in
    for d_in, d_out in ((width + 1, width), (width, width + 1)):
        sae = SimpleNamespace(settings=SimpleNamespace(name="on", start_from="start"), d_in=d_in, d_out=d_out)
        with pytest.raises(SnapshotError, match=f"rows of {width} numbers, its hooks have {d_in} → {d_out}"):
            require_widths(start, sae)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", HOSTILE)
def test_a_start_of_no_use_is_one_sentence(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged, foreign or hostile: SnapshotError with SAE and folder in it, and nothing is executed."""
    monkeypatch.chdir(tmp_path)
    folder = write_sae(tmp_path / "start", random_sae("topk"))
    hostile(folder, how)
    with pytest.raises(SnapshotError) as error:
        read_start(settings(folder))

    assert str(error.value).startswith(f"sae 'on': start_from = {folder}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("topk", {"d_sae": 32}, "set d_sae = 16"),
        ("topk", {"k": 8}, "set k = 4"),
        ("topk", {"abs": True}, "topk with abs goes on from abstopk"),
        ("topk", {"architecture": "jumprelu", "k": None, "target_l0": 4.0}, "jumprelu goes on from jumprelu"),
        ("gated", {"architecture": "relu", "k": None, "sparsity_weight": 1.0}, "relu goes on from relu"),
        ("standard", {}, "topk goes on from topk"),
        ("topk", {"target": "b"}, "remove target"),
        ("topk_transcoder", {}, "set target"),
        ("topk_skip_transcoder", {"target": "b"}, "set skip = true"),
    ],
)
def test_settings_that_do_not_fit_the_start_are_told_what_to_set(
    architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Nothing is bent into shape."""
    format_name = "sparsify" if architecture.startswith("topk_") else "saelens"
    folder = write_sae(tmp_path / "start", random_sae(architecture), format_name)
    with pytest.raises(SnapshotError, match=message):
        read_start(settings(folder, **changes))


def test_all_starts_of_a_run_are_read_before_anyone_waits(tmp_path: Path) -> None:
    """`check_starts` looks at every SAE of the file."""
    good = write_sae(tmp_path / "good", random_sae("topk"))
    saes = [settings(good), settings(tmp_path / "absent", name="second")]
    synthetic = {"kind": "synthetic", "synthetic": {"d_in": D_IN, "features": 8, "shards": 4}}
    tables = [sae.model_dump(exclude_unset=True) for sae in saes]
    with pytest.raises(SnapshotError, match=r"sae 'second'.*holds no cfg.json; name the folder of one SAE"):
        check_starts(TrainerSettings(corpus=synthetic, sae=tables))
    check_starts(TrainerSettings(corpus=synthetic, sae=tables[:1]))


def test_a_trainer_with_a_bad_start_ends_at_once(tmp_path: Path) -> None:
    """One line and exit code 1, though no producer is there to wait for."""
    start = write_sae(tmp_path / "start", random_sae("topk"))
    (tmp_path / "run.toml").write_text(
        f"""
[run]
directory = "run"
[stream]
endpoint = "ipc://door"
[corpus]
kind = "synthetic"
synthetic = {{d_in = {D_IN}, features = 8, shards = 4}}
[[sae]]
name = "on"
architecture = "topk"
d_sae = {D_SAE}
k = 8
start_from = "{start}"
"""
    )
    command = [sys.executable, "-m", "trainer", "run.toml"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    assert process.returncode == 1
    assert process.stderr.strip().endswith(f"sae 'on': start_from = {start} is a topk SAE; set k = 4")
    assert "Traceback" not in process.stderr
