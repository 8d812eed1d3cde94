"""`python -m monitor evaluate`, and evaluations that end before their text: on a tiny random language model."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import monitor.cli.evaluate_snapshot as command
from monitor.cli.evaluate import main
from monitor.evaluation.evaluator import Baseline, evaluate
from monitor.evaluation.follow import Evaluator
from monitor.evaluation.inputs import load_inputs
from monitor.evaluation.results import read_evaluation
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from producer.corpus import open_corpus
from producer.corpus.held_out import HeldOutText, held_out_windows, spread_order
from producer.corpus.rendering.windows import Windows, select_windows
from producer.lm.passes import MemoryLimits, TimeLimit, spread_passes
from tests.small_model import HOOK, WIDTH, load_model, write_model
from tests.small_run import Export, identity_sae, publish_snapshot, write_text_run
from trainer.saes.inference import load_sae

ONE_WINDOW = MemoryLimits(logits=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run_file(model_folder: Path, tmp_path: Path) -> Path:
    """A run with two snapshots, on shards of text of which a quarter is held out."""
    path = write_text_run(tmp_path, model_folder, "evaluate = false\nevaluation_tokens = 200\nlatents_tokens = 0")
    for tokens, gain in ((1000, 0.25), (2000, 0.5)):
        publish_snapshot(tmp_path / "run", tokens, [sae(gain), sae(1.0, "copy")])
    return path


def sae(gain: float, name: str = "small") -> Export:
    return identity_sae(name, WIDTH, HOOK, gain)


def text_of(run_file: Path) -> Windows:
    settings = read_run_file(MonitorSettings, run_file, [])
    return held_out_windows(open_corpus(settings.corpus), load_inputs(settings).model.tokenizer, settings.corpus, 200)


# The part of the text that there is time for


def test_each_beginning_of_the_order_is_spread() -> None:
    """All numbers once; the first four of 100 are a quarter apart, more or less."""
    order = spread_order(100)
    assert sorted(order) == list(range(100))
    gaps = np.diff(np.sort(order[:4]), append=np.sort(order[:4])[0] + 100)
    assert gaps.min() >= 14 and gaps.max() <= 40


def test_what_was_read_in_time_is_measured_as_if_it_were_all(run_file: Path, model_folder: Path) -> None:
    """Without any time it is one window, by which means and ablations are taken too."""
    model, windows = load_model(model_folder), text_of(run_file)
    saes = [load_sae(run_file.parent / "run" / "snapshots" / "000000002000" / "small", model.device)]
    seen: list[float] = []
    result = evaluate(
        model, windows, saes, Baseline(), memory=ONE_WINDOW, limit=TimeLimit(0.0),
        on_progress=lambda progress: seen.append(progress.share),
    )["small"]  # fmt: skip
    assert seen == [result.text_share] == [1 / len(windows)]
    alone = evaluate(model, select_windows(windows, spread_order(len(windows))[:1]), saes, Baseline())["small"]
    assert alone.text_share is None and alone.rows == result.rows and alone.values == result.values


def test_partial_results_become_the_whole(run_file: Path, model_folder: Path) -> None:
    """After each window there are numbers of what was read; the last are those that come back."""
    model, windows = load_model(model_folder), text_of(run_file)
    saes = [load_sae(run_file.parent / "run" / "snapshots" / "000000002000" / "small", model.device)]
    rows: list[int | None] = []
    last: dict[str, Any] = {}

    def on_progress(progress: Any) -> None:
        last.update(progress.results())
        rows.append(last["small"].rows)

    result = evaluate(model, windows, saes, Baseline(), memory=ONE_WINDOW, on_progress=on_progress)
    assert last == result and rows == np.cumsum(windows.kept[spread_order(len(windows))].sum(1)).tolist()


def test_each_corpus_of_a_mixture_has_its_part() -> None:
    """A third of two corpora, 9 and 3 windows."""
    ids = np.arange(12)[:, None].repeat(2, 1)
    text = HeldOutText(Windows(ids, ids >= 0, ids < 0), {"a": slice(0, 9), "b": slice(9, 12)})
    some = text.beginning(1 / 3)
    assert some.corpora == {"a": slice(0, 3), "b": slice(3, 4)} and some.share == pytest.approx(1 / 3)
    assert (some.windows.ids[:3, 0] < 9).all() and some.windows.ids[3, 0] >= 9
    assert some.beginning(0.1).share == pytest.approx(1 / 6) and len(some.beginning(0.1).windows) == 2


def test_the_corpora_of_a_mixture_take_turns(model_folder: Path) -> None:
    """Two windows of the one for each of the other, from the beginning on."""
    ids = np.zeros((6, 2), np.int64)
    windows = Windows(ids, ids == 0, ids < 0)
    parts = {"a": slice(0, 4), "b": slice(4, 6)}
    order = [corpus for corpus, _ in spread_passes(load_model(model_folder), windows, parts, ONE_WINDOW)]
    assert order == ["a", "b", "a", "a", "b", "a"]


def test_later_snapshots_are_measured_on_what_there_was_time_for(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The monitor says so; numbers of snapshots compare, and say how much of the text they are of."""
    monkeypatch.setattr("producer.lm.passes.windows_in_memory", lambda *_: 1)
    caplog.set_level(logging.INFO)
    settings = read_run_file(
        MonitorSettings, run_file, ["monitor.evaluate=true", "monitor.evaluation_seconds=0.000001"]
    )
    evaluator = Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event())
    evaluator.look()
    first = read_evaluation(run_file.parent / "run" / "snapshots" / "000000002000", "small")
    publish_snapshot(run_file.parent / "run", 3000, [sae(0.75)])
    evaluator.look()
    second = read_evaluation(run_file.parent / "run" / "snapshots" / "000000003000", "small")
    assert first is not None and second is not None
    assert first.text_share == second.text_share is not None and first.rows == second.rows
    assert first.values["ce_clean"] == pytest.approx(second.values["ce_clean"])
    assert "of the held-out text was read in monitor.evaluation_seconds" in caplog.text


# The command


def measured(run_file: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main([str(run_file), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_are_those_of_the_monitor(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the newest snapshot, or of the one that is named; nothing is written unless it is asked for."""
    newest = run_file.parent / "run" / "snapshots" / "000000002000"
    numbers = measured(run_file, capsys)
    assert list(numbers) == ["small", "copy"] and numbers["copy"]["fvu"] == pytest.approx(0, abs=1e-9)
    assert not list(newest.rglob("evaluation.json"))
    older = measured(run_file, capsys, "--snapshot", str(newest.parent / "000000001000"), "--sae", "small")
    assert list(older) == ["small"] and older["small"]["snapshot"] == "000000001000"
    assert older["small"]["fvu"] > numbers["small"]["fvu"]

    settings = read_run_file(MonitorSettings, run_file, ["monitor.evaluate=true"])
    Evaluator(settings, MonitorMetrics(CollectorRegistry()), threading.Event()).look()
    written = json.loads((newest / "small" / "evaluation.json").read_text())
    assert {name: value for name, value in written.items() if name != "seconds"} == {
        name: value for name, value in numbers["small"].items() if name != "seconds"
    }


def test_what_was_and_was_not_measured_is_said(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of the text that there was time for, and measures that the monitor alone takes."""
    monkeypatch.setattr("producer.lm.passes.windows_in_memory", lambda *_: 1)
    assert main([str(run_file), "--seconds", "0.000001", "--save"]) == 0
    output = capsys.readouterr().out
    assert "ΔCE" in output and "% of the held-out text, spread over it; --seconds gives it more time" in output
    assert "Not measured: " in output and "F1 of n-grams" in output
    saved = read_evaluation(run_file.parent / "run" / "snapshots" / "000000002000", "copy")
    assert saved is not None and saved.text_share is not None and saved.text_share < 1


def test_ctrl_c_shows_what_was_measured(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the text, numbers are of its beginning; before the first, there is nothing to show."""
    monkeypatch.setattr("producer.lm.passes.windows_in_memory", lambda *_: 1)
    passes = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        def between() -> None:
            nonlocal passes
            passes -= 1
            if passes < 0:
                raise KeyboardInterrupt

        return evaluate(*arguments, **options, between=between)

    monkeypatch.setattr(command, "evaluate", interrupted)
    windows = len(text_of(run_file))
    passes = windows + 2 * 5 + 1  # a survey; the clean model, two ablations and two SAEs on each of two windows
    numbers = measured(run_file, capsys)
    assert numbers["small"]["text_share"] == pytest.approx(2 / windows) and numbers["small"]["ce_delta"] > 0
    passes = 1
    assert main([str(run_file)]) == 1
    assert "stopped before anything was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sae", "large"], "--sae large: "),
        (["--snapshot", "/nowhere"], "/nowhere is no snapshot"),
        (["corpus.held_out=0.0"], "held_out is 0"),
        (["corpus.kinds=text"], "corpus.kinds"),
    ],
)
def test_faults_are_told(run_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    """With exit code 2, before the language model is loaded."""
    assert main([str(run_file), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_told(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 1."""
    assert main([str(run_file), "model.name=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err
