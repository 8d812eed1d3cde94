"""Scrape settings, recording rules and alerts. What a running Prometheus makes of them: test_watch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor.metrics import all_metrics
from producer.settings import MetricsSettings

FOLDER = Path(__file__).parent.parent / "monitor" / "prometheus"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed, so no rule is tested here: apt-get install prometheus"
)


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in load(name)["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")


@needs_promtool
@pytest.mark.parametrize("command", [["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]])
def test_promtool_finds_no_fault(command: list[str]) -> None:
    """Every alert fires when it should and is silent when it should not: the cases stand in tests.yml."""
    assert PROMTOOL is not None
    process = subprocess.run([PROMTOOL, *command], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    """What is wrong, how one sees it, and what a person does now; and there are a firing and a silent case of it."""
    assert set(alert["annotations"]) == {"summary", "description", "action", "runbook_url"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    cases = [test["name"] for test in load("tests.yml")["tests"]]
    assert f"{alert['alert']} fires" in cases and f"{alert['alert']} is silent" in cases


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_its_section_of_the_runbook(alert: dict[str, Any]) -> None:
    """What it means, how to look, what to do and what is safe, behind the link that the alert carries."""
    base, path, anchor = re.fullmatch(r"(.*}})?(.*)#(.*)", alert["annotations"]["runbook_url"]).groups()
    assert base == "{{ with $externalLabels.repository }}{{ . }}/{{ end }}"
    sections = re.split(r"(?m)^## ", (FOLDER.parent.parent / path).read_text())
    (section,) = [one for one in sections if one.splitlines()[0].lower() == anchor]
    assert section.splitlines()[0] == alert["alert"]
    for part in ("Means", "Look", "Do", "Safe"):
        assert f"- **{part}.** " in section


def test_rules_name_only_what_exists() -> None:
    """A metric that is renamed takes its alerts along; so does a recording rule."""
    existing_names = {f"{metric.name}{part}" for metric in all_metrics() for part in ("", "_sum", "_count")}
    recorded = {rule["record"] for rule in rules("recording.yml")}
    for rule in ALERTS + rules("recording.yml"):
        for name in re.findall(r"[\w:]*sluice_[\w:]+", rule["expr"]):
            assert name in recorded if ":" in name else name in existing_names, name


def test_every_recording_rule_is_tested() -> None:
    tested = [case for test in load("tests.yml")["tests"] for case in test.get("promql_expr_test", [])]
    assert {rule["record"] for rule in rules("recording.yml")} <= {case["expr"] for case in tested}


def test_scraped_are_the_ports_that_processes_have_by_default() -> None:
    """One target each, and all carry the name of their run."""
    ports = MetricsSettings()
    jobs = {job["job_name"]: job for job in load("prometheus.yml")["scrape_configs"]}
    assert jobs["sluice-trainer"]["static_configs"][0]["targets"] == [f"{ports.host}:{ports.trainer_port}"]
    assert jobs["sluice-monitor"]["static_configs"][0]["targets"] == [f"{ports.host}:{ports.port}"]
    assert jobs["sluice-producer"]["file_sd_configs"][0]["files"] == ["producers.yml"]
    assert load("producers.yml") == [{"targets": [f"{ports.host}:{ports.producer_port}"], "labels": {"run": "demo"}}]
