"""The run file: what is accepted, and how each fault is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from producer.settings import ProducerSettings, SettingsError, is_loopback, read_run_file, show_settings
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
    told = faults(run_file, ["optimizer.learning_rat=0.1"])

    assert "optimizer.learning_rat = 0.1: no such key (did you mean learning_rate?)" in told


def test_an_unknown_table_is_refused_by_every_process(run_file: Path) -> None:
    """A misspelt table would otherwise be nobody's."""
    assert "[optimiser]: no such table (did you mean optimizer?)" in faults(
        run_file, ["optimiser.batch=1"], ProducerSettings
    )


def test_a_wrong_type_is_told_with_what_is_expected(run_file: Path) -> None:
    """Name, value, expectation, and what the key means."""
    told = faults(run_file, ["sae.0.d_sae=many"])

    assert "sae.0.d_sae = 'many': expected a valid integer. How many latents." in told


def test_all_faults_are_told_at_once(run_file: Path) -> None:
    """One run of the command shows everything there is to mend."""
    told = faults(run_file, ["sae.0.d_sae=0", "buffer.rows=-1", "optimizer.batch=1.5"])

    assert len(told.splitlines()) == 3


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
        ("sae.0.bandwidth=1.0", "bandwidth belong to jumprelu; remove them"),
    ],
)
def test_values_that_do_not_go_together_are_refused(run_file: Path, override: str, sentence: str) -> None:
    """A conflict names both sides and what to change."""
    assert sentence in faults(run_file, [override])


def test_resolved_settings_can_be_read_back(run_file: Path, tmp_path: Path) -> None:
    """settings.toml of a run directory is a run file."""
    settings = read_run_file(TrainerSettings, run_file, ["optimizer.batch=1024"])
    (tmp_path / "again.toml").write_text(show_settings(settings))

    assert settings == read_run_file(TrainerSettings, tmp_path / "again.toml", [])


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
    """--help comes before torch is imported."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "RUN.toml" in done.stdout
    assert time.monotonic() - began < 5  # a second on an idle machine; importing torch alone takes longer


@pytest.mark.parametrize("package", ["producer", "trainer", "monitor"])
def test_bad_settings_end_with_code_2_and_no_traceback(package: str, tmp_path: Path) -> None:
    """A user's mistake is told in a line."""
    command = [sys.executable, "-m", package, str(tmp_path / "none.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
