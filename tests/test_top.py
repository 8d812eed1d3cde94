"""`top`: the live table, of a real service, in a real terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.cli.top import main
from monitor.http.service import make_app, start_service
from producer.common.metrics import new_registry
from tests.small_run import finish_run, publish_snapshot, start_run
from trainer.state.durable import replace_text

ROOT = Path(__file__).parent.parent
TOKEN = "correct-horse-battery-staple"


def report(run_directory: Path, tokens: int, age: float = 0.0, **changes: Any) -> None:
    """A line of metrics.jsonl, of one SAE."""
    sae = {"name": "small", "l0": 4.0, "fvu": 0.25, "dead_latents_ratio": 0.0, "shrinkage": 1.0, "learning_rate": 1e-3}
    line = {
        "time": time.time() - age, "tokens": tokens, "target_tokens": 10_000, "tokens_per_second": 100.0,
        "buffer_rows": 3, "buffer_capacity_rows": 7, "state": "training", "stream": {"producers": {"working": 1}},
        "saes": [sae],
    }  # fmt: skip
    with open(run_directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | changes) + "\n")


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return start_run(tmp_path / "demo")


@pytest.fixture
def url(run_directory: Path) -> Iterator[str]:
    port, close = start_service(make_app(run_directory, new_registry()), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{port}"
    close()


def test_a_pipe_gets_one_frame(run_directory: Path, url: str, capsys: pytest.CaptureFixture[str]):
    """Progress, each SAE with its newest evaluation from whichever snapshot, and the newest snapshot."""
    report(run_directory, 5000)
    first = publish_snapshot(run_directory, 1000)
    replace_text(first / "small" / "evaluation.json", '{"ce_delta": 0.125, "ce_recovered": 0.75}')
    publish_snapshot(run_directory, 2000)
    assert main([url]) == 0
    output = capsys.readouterr().out
    assert "demo · tiny at blocks.0.hook_resid_post" in output and "5,000 of 10,000 · 100/s · 50 s left" in output
    assert "0.2500" in output and "0.1250" in output and "2 snapshots, newest 000000002000" in output


@pytest.mark.parametrize(
    ("age", "expected", "hidden"), [(0, "training", "no report for"), (7200, "no report for 2.0 h", "left")]
)
def test_a_silent_run_is_not_shown_as_training(
    run_directory: Path, url: str, capsys: pytest.CaptureFixture[str], age: float, expected: str, hidden: str
):
    """The last report of a killed trainer says nothing about now, so there is no time left either."""
    report(run_directory, 5000, age)
    assert main([url]) == 0
    out = capsys.readouterr().out
    assert expected in out and hidden not in out


def test_a_buffer_that_is_being_filled_is_shown(run_directory: Path, url: str, capsys: pytest.CaptureFixture[str]):
    """How full it is, before there is any SAE."""
    report(run_directory, 0, state="filling", saes=[], tokens_per_second=0.0)
    assert main([url]) == 0
    output = capsys.readouterr().out
    assert "3 tokens · filling · 1 producer" in output and "left" not in output


def test_before_the_first_report_and_after_the_last(run_directory: Path, url: str, capsys: pytest.CaptureFixture[str]):
    """Waiting says for what; a finished run shows its results."""
    assert main([url]) == 0
    assert "waits for its first producer" in capsys.readouterr().out
    report(run_directory, 1000)
    finish_run(run_directory, 1000)
    summary = json.loads((run_directory / "summary.json").read_text())
    summary["saes"]["small"] |= {"d_sae": 8, "hook": "blocks.0.hook_resid_post", "ce_delta": 0.5}
    replace_text(run_directory / "summary.json", json.dumps(summary))
    assert main([url]) == 0
    output = capsys.readouterr().out
    assert "Results" in output and "0.5000" in output and "finished: 1,000 tokens" in output


def test_the_end_shows_numbers_before_the_last_snapshot_is_measured(
    run_directory: Path, url: str, capsys: pytest.CaptureFixture[str]
):
    """Training's and the last evaluation's, and what is missing; then those of the last snapshot, summary or not."""
    first = publish_snapshot(run_directory, 1000)
    replace_text(first / "small" / "evaluation.json", '{"ce_delta": 0.125}')
    last = publish_snapshot(run_directory, 2000)
    report(run_directory, 2000)
    finish_run(run_directory, 2000)
    assert main([url]) == 0
    output = capsys.readouterr().out
    assert "0.2500" in output and "0.1250" in output and " finished · 0 producers" in output and " left" not in output
    assert (
        "finished: 2,000 tokens" in output
        and "no numbers on held-out text so far" in output
        and "Results" not in output
    )
    replace_text(last / "small" / "evaluation.json", '{"ce_delta": 0.0625, "l0": 7.5, "fvu": 0.0312}')
    assert main([url]) == 0
    output = capsys.readouterr().out
    assert (
        "Results" in output and "0.0625" in output and "7.5" in output and "0.0312" in output and "so far" not in output
    )


@pytest.mark.parametrize(
    ("state", "is_shown"),
    [("training", True), ("starved", True), ("paused", False), ("draining", False), ("filling", False)],
)
def test_the_time_left_is_shown_while_a_run_goes_on(
    run_directory: Path, url: str, capsys: pytest.CaptureFixture[str], state: str, is_shown: bool
):
    """Not of one that a person has paused, nor of one that ends before its target."""
    report(run_directory, 5000, state=state)
    assert main([url]) == 0
    assert (" left" in capsys.readouterr().out) == is_shown


def test_the_token_comes_from_the_environment(
    run_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Or from --token, or from a page's address; without it the refusal says how, and no message shows it."""
    port, close = start_service(make_app(run_directory, new_registry(), token=TOKEN), "127.0.0.1", 0)
    try:
        assert main([f"127.0.0.1:{port}"]) == 1
        assert "SLUICE_TOKEN" in capsys.readouterr().err
        assert main([f"127.0.0.1:{port}", "--token", TOKEN]) == 0
        assert main([f"http://127.0.0.1:{port}/?token={TOKEN}"]) == 0
        monkeypatch.setenv("SLUICE_TOKEN", TOKEN)
        assert main([f"127.0.0.1:{port}"]) == 0
        assert main([f"127.0.0.1:{port}/nothing"]) == 1
        assert TOKEN not in "".join(capsys.readouterr())
    finally:
        close()


def test_wrong_usage_is_2_and_no_server_is_1(capsys: pytest.CaptureFixture[str]):
    """What the operator typed wrongly differs from what is not there."""
    assert main(["ftp://example.org"]) == 2
    assert main(["127.0.0.1:1"]) == 1
    assert "is the monitor running there?" in capsys.readouterr().err


def test_a_terminal_shows_the_run_move_and_q_leaves(run_directory: Path, url: str):
    """Numbers change without a key; after `q` the terminal is as it was and the last frame stays."""
    report(run_directory, 5000)
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "24"}
    command = [sys.executable, "-m", "monitor", "top", url]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        assert "5,000 of 10,000" in _until(ours, "5,000 of")
        report(run_directory, 6000)
        assert "6,000 of 10,000" in _until(ours, "6,000 of")
        os.write(ours, b"q")
        assert "6,000 of 10,000" in _until(ours, "no snapshot yet\r\n")
        assert process.wait(120) == 0
    os.close(ours)


def _until(terminal: int, expected: str) -> str:
    """The terminal's output, without colours, until it holds `expected`."""
    output, deadline = "", time.monotonic() + 60
    while expected not in output and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            output += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(terminal, 65536).decode(errors="replace"))
    return output
