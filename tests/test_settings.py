"""The run file: what is accepted, and how each fault is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from producer.common.addresses import is_loopback
from producer.common.run_file import read_run_file, show_settings
from producer.common.toml import SettingsError
from producer.settings import ModelSettings, ProducerSettings
from tests.small_saes import FAMILY
from trainer.parallel.placement import world_fault
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent

GOOD = """
[run]
directory = "runs/x"
[model]
name = "gpt2"
hooks = ["blocks.6.hook_resid_post"]
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 4096
k = 32
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    return path


def faults(path: Path, overrides: list[str], kind: type = TrainerSettings) -> str:
    with pytest.raises(SettingsError) as raised:
        read_run_file(kind, path, overrides)
    return str(raised.value)


def test_each_process_reads_its_own_tables(run_file: Path) -> None:
    """The producer does not look at [[sae]], the trainer does."""
    assert read_run_file(ProducerSettings, run_file, []).model.name == "gpt2"
    assert read_run_file(TrainerSettings, run_file, []).sae[0].k == 32


def test_an_override_replaces_one_value(run_file: Path) -> None:
    """section.key=value, entries of a list by name or number; bare words are strings."""
    settings = read_run_file(TrainerSettings, run_file, ["sae.topk.k=64", "sae.0.d_sae=8192", "model.device=cpu"])

    assert (settings.sae[0].k, settings.sae[0].d_sae, settings.model.device) == (64, 8192, "cpu")


def test_an_unknown_key_is_named_with_what_was_meant(run_file: Path) -> None:
    """A misspelt key is refused with its full name, its value and the nearest known one."""
    messages = faults(run_file, ["optimizer.learning_rat=0.1"])

    assert "optimizer.learning_rat = 0.1: no such key (did you mean learning_rate?)" in messages


def test_an_unknown_table_is_refused_by_every_process(run_file: Path) -> None:
    """A misspelt table would otherwise be nobody's."""
    assert "[optimiser]: no such table (did you mean optimizer?)" in faults(
        run_file, ["optimiser.batch=1"], ProducerSettings
    )


def test_a_wrong_type_is_told_with_what_is_expected(run_file: Path) -> None:
    """Name, value, expectation, and what the key means."""
    messages = faults(run_file, ["sae.0.d_sae=many"])

    assert 'sae.0.d_sae = "many": expected a whole number, such as d_sae = 4096. How many latents.' in messages


def test_all_faults_are_told_at_once(run_file: Path) -> None:
    """One run of the command shows everything there is to mend."""
    messages = faults(run_file, ["sae.0.d_sae=0", "buffer.rows=-1", "optimizer.batch=1.5"])

    assert len(messages.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sae.0.k=5000", "k = 5000 exceeds d_sae = 4096; lower k or raise d_sae"),
        ("sae.0.architecture=jumprelu", "architecture jumprelu needs target_l0"),
        ("sae.0.hook=blocks.7.hook_resid_post", "is not streamed; model.hooks has blocks.6.hook_resid_post"),
        ("buffer.rows=5000", "is under two batches (optimizer.batch = 4096)"),
        ("stream.endpoint=tcp://0.0.0.0:5710", "reachable from other machines and stream.keys is not set"),
        ("corpus.kind=jsonl", "needs corpus.paths"),
        ("stream.dead_seconds=1.5", "is under three heartbeats"),
        ("sae.0.name=a/b", "becomes a folder"),
        ("optimizer.device=gpu", "`cpu`, `cuda`, `cuda:1`; auto takes the GPU when there is one"),
        ("sae.0.target=blocks.9.hook_mlp_out", 'hook "blocks.9.hook_mlp_out" is not streamed'),
        ("sae.0.target=blocks.6.hook_resid_post", "target is the hook it reads, blocks.6.hook_resid_post"),
        (
            'sae.0.hooks=["blocks.6.hook_resid_post", "blocks.7.hook_mlp_out"]',
            '"blocks.7.hook_mlp_out" is not streamed',
        ),
        ("parallel.data=2", "data = 2 is not offered: the gradients"),
        ("parallel.intakes=2", "intakes = 2 is not built yet"),
        ("parallel.latents=many", 'parallel.latents = "many" is no number of ranks; expected "auto" or'),
    ],
)
def test_values_that_do_not_go_together_are_refused(run_file: Path, override: str, sentence: str) -> None:
    """A conflict names both sides and what to change."""
    assert sentence in faults(run_file, [override])


@pytest.mark.parametrize(
    ("parallel", "ranks", "sentence"),
    [
        ({"latents": 4}, 2, "make 4 ranks, and 2 were started"),
        ({"blocks": 8}, 3, "parallel.blocks = 8 is no multiple of the 3 ranks"),
        ({}, 8, 'sae "wide": d_sae = 4096 is too small for 8 ranks, which take 1024 latents each at least'),
        ({"blocks": 8}, 1, "too small for parallel.blocks = 8"),
    ],
)
def test_ranks_that_cannot_share_the_saes_are_refused(parallel: dict[str, Any], ranks: int, sentence: str) -> None:
    """The number that was started, and what to change."""
    model = {"name": "gpt2", "hooks": ["blocks.6.hook_resid_post"]}
    run = {"model": model, "sae": [{"name": "wide", "architecture": "topk", "d_sae": 4096, "k": 4}]}
    assert sentence in (world_fault(TrainerSettings.model_validate(run | {"parallel": parallel}), ranks) or "")
    assert world_fault(TrainerSettings.model_validate(run), 4) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"architecture": "topk"}, "architecture topk needs k, such as k = 32"),
        ({"architecture": "batchtopk"}, "architecture batchtopk needs k, such as k = 32"),
        ({"k": 5000}, "k = 5000 exceeds d_sae = 4096; lower k or raise d_sae"),
        (
            {"k": 2000, "multi_topk": 0.125},
            "multi_topk uses 4 k = 8000 latents, more than d_sae = 4096; lower k or raise",
        ),
        ({"name": ".x", "k": 8}, 'name ".x" becomes a folder: use letters, digits, dot, dash, underscore'),
        ({"architecture": "jumprelu"}, "architecture jumprelu needs target_l0, such as target_l0 = 32"),
        ({"architecture": "jumprelu", "target_l0": 5000.0}, "target_l0 = 5000 exceeds d_sae = 4096; lower target_l0"),
        ({"architecture": "jumprelu", "penalty": "l1"}, "Input should be 'target_l0', 'l0' or 'tanh'"),
        ({"architecture": "relu", "penalty": "l0"}, "Input should be 'l1', 'l1_norm' or 'tanh'"),
        ({"architecture": "relu"}, "penalty l1_norm needs sparsity_weight, such as 5"),
        ({"architecture": "jumprelu", "penalty": "tanh"}, "penalty tanh needs sparsity_weight, such as 1"),
        ({"architecture": "tied"}, "penalty l1 needs sparsity_weight, such as 5"),
        ({"architecture": "gated"}, "penalty l1 needs sparsity_weight, such as 5"),
        ({"k": 8, "matryoshka": [512, 1024]}, "matryoshka = [512, 1024] must rise and end at d_sae = 4096"),
        ({"k": 8, "matryoshka": [1024, 512, 4096]}, "matryoshka = [1024, 512, 4096] must rise and end at d_sae = 4096"),
        ({"k": 8, "matryoshka": []}, "matryoshka = [] must rise and end at d_sae = 4096"),
        (
            {"k": 8, "revive": "pre_act"},
            "revive = pre_act needs a threshold, which topk has not: use auxk, resample or",
        ),
        ({"architecture": "tied", "revive": "auxk"}, "nothing revives the latents of tied: remove revive and"),
        ({"architecture": "tied", "reinitialise_tokens": 9}, "nothing revives the latents of tied: remove revive and"),
        ({"architecture": "repair", "revive": "resample"}, "nothing revives the latents of repair: remove revive and"),
        ({"architecture": "repair"}, "architecture repair needs start_from, the folder of a trained relu or tied SAE"),
        ({"architecture": "tied", "start_from": "x"}, "start_from is not for tied: no file says that two matrices are"),
        ({"k": 8, "hook": "a", "hooks": ["a", "b"]}, "hook and hooks are both set: hooks alone names those of"),
        ({"k": 8, "hooks": ["a"]}, 'hooks = ["a"] must name two or more different hooks; for one use hook'),
        ({"k": 8, "hooks": ["a", "a"]}, 'hooks = ["a", "a"] must name two or more different hooks'),
        ({"k": 8, "hooks": ["a", "b"], "target": "c"}, "hooks and target are both set: a crosscoder reconstructs what"),
        ({"k": 8, "hook": "a", "target": "a"}, "target is the hook it reads, a: remove target, or name another hook"),
        ({"architecture": "gated", "target": "b"}, "target is not for gated: use topk, batchtopk, jumprelu or relu"),
        (
            {"architecture": "relu", "penalty": "l1", "sparsity_weight": 5.0, "target": "b"},
            "penalty l1 needs decoder rows of unit norm, which a transcoder has not: use l1_norm or tanh",
        ),
        (
            {"architecture": "jumprelu", "penalty": "tanh", "sparsity_weight": 1.0, "target": "b"},
            "penalty tanh needs decoder rows of unit norm, which a transcoder has not: use target_l0 or l0",
        ),
        ({"k": 8, "whitening": True, "target": "b"}, "whitening is for autoencoders of one hook: remove whitening, or"),
        ({"k": 8, "whitening": True, "hooks": ["a", "b"]}, "whitening is for autoencoders of one hook"),
        (
            {"k": 8, "whitening": True, "start_from": "x"},
            "whitening would change the space that start_from was trained",
        ),
        ({"k": 8, "bandwidth": 1.0}, "bandwidth means nothing for topk; remove"),
        ({"k": 8, "skip": True}, "skip needs target, the hook that a transcoder reconstructs"),
        ({"k": 8, "penalty": "target_l0"}, "penalty means nothing for topk; remove"),
        ({"k": 8, "penalty": "l1", "sparsity_weight": 1.0}, "penalty, sparsity_weight mean nothing for topk; remove"),
        ({"k": 8, "revive": "none", "k_aux": 4}, "k_aux means nothing for topk; remove"),
        (
            {"architecture": "jumprelu", "target_l0": 8.0, "tanh_scale": 2.0, "sparsity_weight": 1.0},
            "sparsity_weight, tanh_scale mean nothing for jumprelu with penalty target_l0; remove",
        ),
        (
            {"architecture": "relu", "sparsity_weight": 5.0, "matryoshka": [4096], "k": 3},
            "matryoshka, k mean nothing for relu with penalty l1_norm; remove",
        ),
        (
            {"architecture": "relu", "penalty": "l1", "sparsity_weight": 5.0, "initial_norm": 0.2},
            "initial_norm means nothing for relu with penalty l1; remove",
        ),
        ({"architecture": "batchtopk", "k": 8, "abs": True}, "abs means nothing for batchtopk; remove"),
        ({"k": 8, "train": "all"}, "train means nothing for topk; remove"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_sae_that_does_not_fit_together_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Each fault is a sentence with what to change."""
    common: dict[str, Any] = {"name": "s", "architecture": "topk", "d_sae": 4096}
    with pytest.raises(ValidationError) as raised:
        SaeSettings.of(**(common | options))

    assert sentence in str(raised.value)


def test_faults_of_one_sae_are_told_together() -> None:
    """And no sentence about a key that means nothing asks for more of its kind."""
    with pytest.raises(ValidationError) as raised:
        SaeSettings.of(name="s", architecture="topk", d_sae=64, penalty="l1", bandwidth=1.0)

    assert (
        'sae "s": architecture topk needs k, such as k = 32; penalty, bandwidth mean nothing for topk; remove'
        in str(raised.value)
    )


@pytest.mark.parametrize(
    ("saes", "sentence"),
    [
        ([{"name": "a"}, {"name": "a"}], "sae.name: a is used more than once; each SAE needs its own name"),
        ([{"name": "a", "ema_tokens": 5}, {"name": "a-ema"}], "sae.name: a-ema is also the name of an EMA copy"),
        ([{"name": "a", "hook": None}], "names no hook and model.hooks has 2; choose one of h0, h1"),
        ([{"name": "a", "hook": None, "target": "h1"}], "names no hook and model.hooks has 2; choose one of h0, h1"),
        ([{"name": "a", "hook": "h2"}], 'hook "h2" is not streamed; model.hooks has h0, h1'),
    ],
)
def test_saes_that_do_not_fit_the_run_are_refused(saes: list[dict[str, Any]], sentence: str) -> None:
    """Names and hooks are checked against each other and against the stream."""
    common: dict[str, Any] = {"architecture": "topk", "d_sae": 64, "k": 4, "hook": "h0"}
    with pytest.raises(ValidationError) as raised:
        TrainerSettings(
            model=ModelSettings(name="m", hooks=["h0", "h1"]), sae=[SaeSettings.of(**(common | s)) for s in saes]
        )

    assert sentence in str(raised.value)


def test_resolved_settings_can_be_read_back(run_file: Path, tmp_path: Path) -> None:
    """settings.toml of a run directory is a run file."""
    settings = read_run_file(TrainerSettings, run_file, ["optimizer.batch=1024"])
    (tmp_path / "again.toml").write_text(show_settings(settings))

    assert settings == read_run_file(TrainerSettings, tmp_path / "again.toml", [])


@pytest.mark.parametrize("kind", FAMILY)
def test_settings_of_every_architecture_can_be_read_back(kind: str, tmp_path: Path) -> None:
    """Through TOML and back: every default that applies is written, none that does not, and all mean the same."""
    role: dict[str, Any] = {} if "hooks" in FAMILY[kind] else {"hook": "a"}
    sae = SaeSettings.of(**(role | FAMILY[kind] | {"name": "s", "d_sae": 32, "ema_tokens": 5, "tokens": 10**7}))
    settings = TrainerSettings(model=ModelSettings(name="m", hooks=["a", "b"]), sae=[sae])
    toml = show_settings(settings)
    (tmp_path / "again.toml").write_text(toml)
    again = read_run_file(TrainerSettings, tmp_path / "again.toml", []).sae[0]
    table = toml[toml.index("[[sae]]") : toml.index("[snapshots]")]

    assert again.model_dump() == sae.model_dump()
    assert (again.sparsity_warmup(7), again.revival) == (sae.sparsity_warmup(7), sae.revival)
    assert settings.hooks_of(again) == settings.hooks_of(sae)
    assert ("bandwidth" in table) == (sae.architecture == "jumprelu")
    assert ("aux_weight" in table) == (sae.revival == "auxk")


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5710", True),
        ("tcp://127.8.9.1:5710", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:5710", True),
        ("ipc:///tmp/x", True),
        ("tcp://0.0.0.0:5710", False),
        ("tcp://*:5710", False),
        ("tcp://10.0.0.1:5710", False),
        ("tcp://trainer.example:5710", False),
    ],
)
def test_loopback_is_told_from_the_rest(endpoint: str, expected: bool) -> None:
    """When in doubt an endpoint counts as open to others."""
    assert expected == is_loopback(endpoint)


@pytest.mark.parametrize("package", ["producer", "trainer", "monitor"])
def test_help_answers_at_once(package: str) -> None:
    """--help comes without an import of torch, which alone takes longer than all the rest."""
    command = [sys.executable, "-X", "importtime", "-m", package, "--help"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert "RUN.toml" in process.stdout
    assert not re.search(r"\| +torch$", process.stderr, re.MULTILINE)


@pytest.mark.parametrize("package", ["producer", "trainer", "monitor"])
def test_bad_settings_end_with_code_2_and_no_traceback(package: str, tmp_path: Path) -> None:
    """A user's mistake is told in a line."""
    command = [sys.executable, "-m", package, str(tmp_path / "none.toml")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert process.returncode == 2
    assert "does not exist" in process.stderr
    assert "Traceback" not in process.stderr


def test_print_settings_can_be_read_back_whatever_they_hold(run_file: Path) -> None:
    """Text with quotes and controls, inf, lists: written as TOML that gives the same values again."""
    overrides = [
        "stream.patience_seconds=inf",
        'corpus.column="a\\"b\\u007f\\n"',
        "optimizer.eps=1e-30",
        "run.tokens=1e6",
    ]
    settings = read_run_file(TrainerSettings, run_file, overrides)
    run_file.write_text(show_settings(settings))

    assert read_run_file(TrainerSettings, run_file, []) == settings
    assert "inf" in show_settings(settings) and settings.run.tokens == 1_000_000
