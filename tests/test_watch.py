"""The demo under a real Prometheus: every query of every dashboard and rule is asked, and every panel is drawn.

`make watch`; some three minutes. The configuration is ours, with other ports. Panels are drawn by Grafana's own
packages in Chromium, without a Grafana server. Afterwards runs/queries.md has what each query returned,
runs/grafana-NAME.png how each dashboard looks, and runs/recorded.json.gz the answers that were drawn.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.demo import COMMANDS, RUN_FILE
from monitor.grafana.generate import DASHBOARDS, FOLDER
from tests.grafana.drawing import CHROMIUM, draw, faults, missing_packages
from tests.grafana.recording import RECORDED, is_recorded, read, record, substitute, write

pytestmark = [pytest.mark.watch, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parent.parent
RULES = ROOT / "monitor" / "prometheus"
RUN, SAES = "demo", ["jumprelu", "topk"]
SCRAPE_SECONDS = 5
PATIENCE_SECONDS = 1500
PAUSE_SECONDS = 4 * SCRAPE_SECONDS
"""So long tokens stand still before the panels are drawn."""
NOW = 0.0
"""Asks for this moment only, as the numbers at the top of a dashboard do."""

EMPTY_IN_A_HEALTHY_RUN = {
    'sum by (run, reason) (increase(sluice_rows_rejected_total{run=~"$run"}[$__rate_interval]))',
    'sum by (run, kind) (increase(sluice_protocol_errors_total{run=~"$run"}[$__rate_interval]))',
    'sum by (run, purpose) (rate(sluice_exchange_bytes_total{run=~"$run"}[$__rate_interval]))',
    'sum by (run, purpose) (rate(sluice_exchange_seconds_total{run=~"$run"}[$__rate_interval]))',
    'rate(sluice_corpus_tokens_trained_total{run=~"$run"}[$__rate_interval])',
    'sluice_suspect_shards{run=~"$run"} > 0',
    'sluice_tokens_quarantined{run=~"$run"} > 0',
    *(f'sluice_rank_{name}{{run=~"$run"}}'
      for name in ("step_seconds", "work_seconds", "exchange_seconds", "memory_bytes", "active_latents")),
}  # fmt: skip
"""Queries without an answer: no row is rejected, no message dropped, one rank exchanges nothing, the corpus is no
mixture, no shard costs its producers, and none is quarantined. All alerts are empty too."""


@dataclass
class Answer:
    """What one query returned: the values of each series over the run."""

    where: str
    query: str
    series: list[list[float]]

    @property
    def line(self) -> str:
        values = [value for one in self.series for value in one if value == value]
        values_text = f"{min(values):.4g} … {max(values):.4g}" if values else "–"
        points = sum(map(len, self.series))
        query = self.query.replace("|", "\\|")
        return f"| {self.where} | `{query}` | {len(self.series)} | {points} | {values_text} |"


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.began = time.time()

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10) as response:
                return response.status == 200
        except OSError:
            return False

    def get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]

    def ask(self, where: str, query: str, seconds: float | None = None) -> Answer:
        """Over the whole run, or its last `seconds`; raises HTTPError when the query is refused."""
        now = time.time()
        begin = self.began if seconds is None else now - seconds
        series = self.get("/api/v1/query_range", query=query, start=begin, end=now, step=SCRAPE_SECONDS)["result"]
        return Answer(where, query, [[float(value) for _, value in one["values"]] for one in series])

    def values(self, query: str) -> list[str]:
        """Of a dashboard's variable: label_values(selector, label)."""
        selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        return self.get(f"/api/v1/label/{label}/values", **{"match[]": selector})


@dataclass(frozen=True)
class Demo:
    """The three processes of the demo and the Prometheus that scrapes them."""

    prometheus: Prometheus
    processes: Processes
    ports: dict[str, int]
    folder: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Runs until everything has been seen: training, an evaluated snapshot, a checkpoint."""
    with_apt()
    folder = tmp_path_factory.mktemp("watch")
    ports = dict(zip(("trainer", "producer", "monitor", "service", "stream", "prometheus"), free_ports(6), strict=True))
    processes = Processes(folder)
    try:
        prometheus = start_prometheus(processes, folder, ports)
        for name in COMMANDS:
            processes.start(name, sys.executable, "-m", name, str(ROOT / RUN_FILE), *overrides(folder, ports))
        wait_until(lambda: has_all_been_seen(prometheus), processes)
        yield Demo(prometheus, processes, ports, folder)
    finally:
        processes.stop()


def test_every_query_of_a_dashboard_or_rule_is_answered_by_a_real_prometheus(demo: Demo) -> None:
    """Each returns numbers, or is one of those that a healthy run leaves empty."""
    answers = list(everything(demo.prometheus))
    write_table(answers)
    check_variables(demo.prometheus)
    check_prometheus_own_view(demo.prometheus)
    for answer in answers:
        finite = [value for one in answer.series for value in one if value == value]
        assert bool(finite) == (not must_be_empty(answer)), answer.line


def test_every_panel_is_drawn(demo: Demo) -> None:
    """By Grafana's own packages in Chromium, after a pause in which tokens stand still."""
    ctl = [sys.executable, "-m", "trainer", "ctl", str(demo.folder / "run")]
    subprocess.run([*ctl, "pause"], check=True, cwd=ROOT)
    time.sleep(PAUSE_SECONDS)
    subprocess.run([*ctl, "resume"], check=True, cwd=ROOT)
    recording = ROOT / "runs" / "recorded.json.gz"
    write(record(demo.prometheus.url, [RUN], time.time() - demo.prometheus.began), recording)
    assert faults_of_drawn(recording, ROOT / "runs") == []


def test_every_panel_of_two_runs_is_drawn(tmp_path: Path) -> None:
    """From the recorded answers that the quick tests describe without a browser."""
    assert faults_of_drawn(RECORDED, tmp_path) == []


def test_a_lost_producer_is_noticed(demo: Demo) -> None:
    """The only one is killed: the trainer lives on, and the alert begins to wait for its two minutes."""
    demo.processes.named["producer"].kill()
    demo.processes.named.pop("producer").wait()
    wait_until(lambda: "SluiceNoProducers" in alerts(demo.prometheus), demo.processes)
    with urllib.request.urlopen(f"http://127.0.0.1:{demo.ports['trainer']}/healthz", timeout=10) as response:
        assert response.status == 200


def faults_of_drawn(recording: Path, folder: Path) -> list[str]:
    """What is wrong with the panels, each with its dashboard and title."""
    assert missing_packages() is None, missing_packages()
    assert CHROMIUM is not None, "Chromium is not installed: apt-get install chromium"
    boards = {name: FOLDER / f"{name}.json" for name in DASHBOARDS}
    drawn = draw(boards, recording, folder)
    return [
        f"{name}: {panel.title} {fault}"
        for name, panels in drawn.items()
        for panel, definition in zip(panels, json.loads(boards[name].read_text())["panels"], strict=True)
        if is_recorded(definition, read(recording))
        for fault in faults(panel, definition)
    ]


def everything(prometheus: Prometheus) -> Iterator[Answer]:
    """All panels and annotations, as Grafana asks them; all recording rules, by name; all alerts."""
    for name in DASHBOARDS:
        board = json.loads((FOLDER / f"{name}.json").read_text())
        targets = [(panel["title"], target) for panel in board["panels"] for target in panel["targets"]]
        targets += [(f"annotation {one['name']}", one) for one in board["annotations"]["list"]]
        for title, target in targets:
            seconds = NOW if target.get("instant") else None
            answer = prometheus.ask(f"{name}: {title}", substitute(target["expr"], [RUN]), seconds)
            answer.query = target["expr"]
            yield answer
    for rule in rules("recording.yml"):
        yield prometheus.ask("recording rule", rule["record"])
    for rule in rules("alerts.yml"):
        # While the language model loads there is no producer, so not over the whole run.
        yield prometheus.ask(f"alert {rule['alert']}", " ".join(rule["expr"].split()), NOW)


def must_be_empty(answer: Answer) -> bool:
    return answer.query in EMPTY_IN_A_HEALTHY_RUN or answer.where.startswith("alert ")


def check_variables(prometheus: Prometheus) -> None:
    """The choices of run and SAE are those of the run."""
    variables = {one["name"]: one for one in json.loads((FOLDER / "training.json").read_text())["templating"]["list"]}
    run, sae = variables["run"], variables["sae"]
    assert prometheus.values(run["query"]["query"]) == [RUN]
    assert prometheus.values(substitute(sae["query"]["query"], [RUN])) == SAES


def check_prometheus_own_view(prometheus: Prometheus) -> None:
    """All three are up, every rule is evaluated without an error, no alert has fired."""
    targets = prometheus.get("/api/v1/targets")["activeTargets"]
    assert {one["labels"]["job"]: one["health"] for one in targets} == {f"sluice-{name}": "up" for name in COMMANDS}
    groups = prometheus.get("/api/v1/rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    assert [one for one in prometheus.get("/api/v1/alerts")["alerts"] if one["state"] == "firing"] == []


def alerts(prometheus: Prometheus) -> set[str]:
    return {one["labels"]["alertname"] for one in prometheus.get("/api/v1/alerts")["alerts"]}


def has_all_been_seen(prometheus: Prometheus) -> bool:
    """Training for a minute, dead latents counted, a snapshot evaluated half a minute ago, a checkpoint written."""
    answers = [
        "count_over_time(sluice_step_seconds[5m]) > 12",
        "sluice_dead_latents",
        "sluice_checkpoint_last_success_timestamp_seconds",
        f"count_over_time(sluice_ce_delta[5m]) > {30 / SCRAPE_SECONDS}",
    ]
    return all(prometheus.ask("", query, NOW).series for query in answers)


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]


def write_table(answers: list[Answer]) -> None:
    head = "| where | query | series | points | values |\n|---|---|---|---|---|\n"
    table = ROOT / "runs" / "queries.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text(head + "\n".join(answer.line for answer in answers) + "\n", encoding="utf-8")


# Processes


def with_apt() -> None:
    """Debian's package, where root may install it and it is missing."""
    if shutil.which("prometheus") is not None:
        return
    if os.geteuid() == 0 and shutil.which("apt-get") is not None:
        install = "apt-get -qq update && apt-get -qq install -y --no-install-recommends prometheus"
        subprocess.run(install, shell=True, check=False, stdout=subprocess.DEVNULL, timeout=300)
    if shutil.which("prometheus") is None:
        pytest.fail("prometheus is not installed: apt-get install prometheus, or put its binary on the PATH")


class Processes:
    """Started with a log each, and stopped together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.named: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        log = open(self._folder / f"{name}.log", "wb")  # noqa: SIM115 (the child keeps it open)
        self.named[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def check(self) -> None:
        """All still run."""
        for name, process in self.named.items():
            assert process.poll() is None, (name, (self._folder / f"{name}.log").read_text()[-2000:])

    def stop(self) -> None:
        for process in self.named.values():
            process.terminate()
        for process in self.named.values():
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(condition: Callable[[], object], processes: Processes) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        processes.check()
        time.sleep(1)


def free_ports(count: int) -> list[int]:
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return ports


def overrides(folder: Path, ports: dict[str, int]) -> list[str]:
    """The demo without an end that comes too soon, with snapshots and checkpoints sooner and smaller evaluations."""
    return [
        f"run.directory={folder / 'run'}",
        "run.tokens=20_000_000",
        f"stream.endpoint=tcp://127.0.0.1:{ports['stream']}",
        "snapshots.every_tokens=150_000",
        "checkpoint.every_seconds=20.0",
        "monitor.evaluation_tokens=4096",
        "monitor.latents_tokens=8192",
        f"monitor.trainer_port={ports['trainer']}",
        f"monitor.producer_port={ports['producer']}",
        f"monitor.port={ports['monitor']}",
        f"monitor.service_port={ports['service']}",
    ]


def start_prometheus(processes: Processes, folder: Path, ports: dict[str, int]) -> Prometheus:
    """With our files, in which only the ports are others."""
    config = folder / "prometheus"
    shutil.copytree(RULES, config)
    for name in ("prometheus.yml", "producers.yml"):
        text = (config / name).read_text()
        for process, port in (("trainer", 9710), ("producer", 9711), ("monitor", 9712)):
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[process]}")
        (config / name).write_text(text)
    processes.start(
        "prometheus",
        "prometheus",
        f"--config.file={config / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
    )
    prometheus = Prometheus(ports["prometheus"])
    wait_until(prometheus.is_ready, processes)
    return prometheus
