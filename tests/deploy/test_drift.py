"""Ports, settings, commands, exit codes, metrics and names in deploy/ are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor.metrics import all_metrics
from monitor.settings import MonitorSettings, MonitorTable
from producer.app import REFUSED
from producer.common.addresses import split_endpoint
from producer.common.run_file import read_run_file
from producer.common.version import VERSION
from producer.settings import MetricsSettings, ProducerSettings, StreamSettings
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SETTINGS: dict[str, Any] = {
    "sluice-producer": ProducerSettings,
    "sluice-trainer": TrainerSettings,
    "sluice-monitor": MonitorSettings,
}
PORTS = {
    "stream": int(split_endpoint(StreamSettings().endpoint)[1]),
    "page": MonitorTable().service_port,
    "trainer": MetricsSettings().trainer_port,
    "producer": MetricsSettings().producer_port,
    "monitor": MetricsSettings().port,
}
USER = 10001
BAD_SETTINGS = 2
GRACE_SECONDS = 330
"""For a checkpoint; what an orchestrator waits before it kills the trainer."""


SHELL_VALUES = {
    "$run_file": "RUN.toml",
    "$host": "node1",
    "$port": "5710",
    "$keys": "keys",
    '$(cat "RUN.toml.endpoint")': "tcp://node1:5710",
}
"""What stands in batch scripts, and what it may be."""


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def documents(*names: str) -> list[dict[str, Any]]:
    texts = [(DEPLOY / "kubernetes" / name).read_text() for name in names]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def pods() -> dict[str, dict[str, Any]]:
    """Pod templates by workload."""
    templates = {}
    for document in documents("base/trainer.yaml", "base/producer.yaml", "base/monitor.yaml", "nodes/jobset.yaml"):
        if document["kind"] in ("StatefulSet", "Deployment"):
            templates[document["metadata"]["name"]] = document["spec"]["template"]
        elif document["kind"] == "JobSet":
            for job in document["spec"]["replicatedJobs"]:
                templates[f"jobset {job['name']}"] = job["template"]["spec"]["template"]
    return templates


def commands() -> Iterator[tuple[str, list[str], Path]]:
    """(where, words, run file) of every start of a process."""
    for name, service in compose()["services"].items():
        if "command" in service:
            for run_file in (DEPLOY / "demo.toml", DEPLOY / "gpt2.toml"):
                yield f"compose {name} {run_file.name}", service["command"], run_file
    for name, pod in pods().items():
        words = pod["spec"]["containers"][0]["command"]
        yield (
            f"kubernetes {name}",
            [word for word in words if word not in ("sh", "/etc/sluice/until-done.sh")],
            (DEPLOY / "kubernetes/base/run.toml"),
        )
    for path in (DEPLOY / "slurm").glob("*.sbatch"):
        for line in re.findall(r"sluice-\w+ \"\$run_file\" .*", path.read_text()):
            for variable, value in SHELL_VALUES.items():
                line = line.replace(variable, value)
            words = shlex.split(line.removesuffix(" &"))
            yield f"slurm {path.name} {words[0]}", words, DEPLOY / "gpt2.toml"
    for path in (DEPLOY / "systemd").glob("*.service"):
        (start,) = re.findall(r"^ExecStart=/opt/sluice/bin/(.+)$", path.read_text(), re.MULTILINE)
        yield f"systemd {path.name}", start.split(), DEPLOY / "gpt2.toml"


COMMANDS = list(commands())


@pytest.mark.parametrize(("words", "run_file"), [one[1:] for one in COMMANDS], ids=[one[0] for one in COMMANDS])
def test_a_command_starts_what_exists_with_settings_that_exist(words: list[str], run_file: Path) -> None:
    """The script is installed, and takes the run file and every override behind it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    program, file, *overrides = words
    assert program in scripts
    assert file.endswith(".toml")
    read_run_file(SETTINGS[program], run_file, overrides)


def test_all_ways_of_starting_are_looked_at() -> None:
    assert {where.split()[0] for where, _, _ in COMMANDS} == {"compose", "kubernetes", "slurm", "systemd"}
    assert len(COMMANDS) == 21


def test_ports_of_compose() -> None:
    """Health is asked, and metrics are scraped, where they are; what is published is so on loopback."""
    services = compose()["services"]
    for name, service in services.items():
        for mapping in service.get("ports", []):
            assert mapping.startswith("127.0.0.1:")
        if "healthcheck" in service:
            role = name.removesuffix("-demo")
            assert f"http://127.0.0.1:{PORTS[role]}/healthz" in service["healthcheck"]["test"][-1]
    assert services["monitor"]["ports"] == [f"127.0.0.1:{PORTS['page']}:{PORTS['page']}"]
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())["scrape_configs"]
    }
    for role in ("trainer", "monitor"):
        assert jobs[f"sluice-{role}"]["static_configs"][0]["targets"] == [f"{role}:{PORTS[role]}"]
    assert jobs["sluice-producer"]["dns_sd_configs"][0]["port"] == PORTS["producer"]
    for role in ("trainer", "producer"):
        assert f":{PORTS['stream']}" in services[role]["command"][3]
        aliases = [services[name]["networks"]["default"]["aliases"] for name in (role, f"{role}-demo")]
        assert aliases == [[role], [role]]


def test_ports_of_kubernetes() -> None:
    for name, pod in pods().items():
        role = re.split(r"[- ]", name)[-1]
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports.pop("metrics") == PORTS[role]
        assert all(PORTS[port] == number for port, number in ports.items())
    for document in documents("base/trainer.yaml", "base/monitor.yaml"):
        if document["kind"] == "Service":
            assert [PORTS[port["name"]] for port in document["spec"]["ports"]] == [document["spec"]["ports"][0]["port"]]
    to_trainer = [
        port["port"]
        for document in documents("base/network.yaml")
        for rule in document["spec"]["egress"]
        for port in rule["ports"]
        if "to" in rule
    ]
    assert to_trainer == [PORTS["stream"]]


def test_exit_codes() -> None:
    """What is not tried again is what trying again does not help."""
    final = {BAD_SETTINGS, REFUSED}
    for name in ("trainer", "producer"):
        unit = (DEPLOY / f"systemd/sluice-{name}@.service").read_text()
        assert set(map(int, re.findall(r"RestartPreventExitStatus=(.+)", unit)[0].split())) == final
    (jobset,) = documents("nodes/jobset.yaml")
    for job in jobset["spec"]["replicatedJobs"]:
        rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
        assert set(rules[0]["onExitCodes"]["values"]) == final
        containers = job["template"]["spec"]["template"]["spec"]["containers"]
        assert rules[0]["onExitCodes"]["containerName"] == containers[0]["name"]
    assert f"0, {BAD_SETTINGS} and {REFUSED} stay" in (DEPLOY / "slurm/producers.sbatch").read_text()


def test_time_for_a_checkpoint() -> None:
    """Everywhere at least as long."""
    services = compose()["services"]
    assert services["trainer"]["stop_grace_period"] == f"{GRACE_SECONDS}s"
    assert f"TimeoutStopSec={GRACE_SECONDS}" in (DEPLOY / "systemd/sluice-trainer@.service").read_text()
    for name in ("sluice-trainer", "jobset trainer"):
        assert pods()[name]["spec"]["terminationGracePeriodSeconds"] >= GRACE_SECONDS
    seconds = re.findall(r"--signal=B:USR1@(\d+)", (DEPLOY / "slurm/sluice.sbatch").read_text())
    assert int(seconds[0]) >= GRACE_SECONDS


def test_metrics() -> None:
    names = {metric.name for metric in all_metrics()}
    for path in [*DEPLOY.glob("kubernetes/keda/*.yaml"), *DEPLOY.glob("compose/*.yml")]:
        text = re.sub(r"#.*", "", path.read_text())
        assert {name for name in re.findall(r"\bsluice_\w+", text)} <= names, path


def test_jobs_are_called_as_alerts_ask_for_them() -> None:
    """`job` and `run` are the labels of monitor/prometheus."""
    original = yaml.safe_load((ROOT / "monitor/prometheus/prometheus.yml").read_text())["scrape_configs"]
    ours = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in ours] == [job["job_name"] for job in original]
    (monitor,) = documents("operator/podmonitor.yaml")
    relabelings = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    assert [one["targetLabel"] for one in relabelings] == ["job", "run"]
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods().values()}
    assert {relabelings[0]["replacement"].replace("$1", one) for one in components} == {
        job["job_name"] for job in original
    }


def test_everything_runs_as_the_image_s_user() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"--uid {USER}" in dockerfile and f"USER {USER}:{USER}" in dockerfile
    for pod in pods().values():
        context = pod["spec"]["securityContext"]
        assert {context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    assert compose()["services"]["grafana"]["user"].startswith(f"{USER}:")


def test_versions() -> None:
    """The image's tag is Sluice's version; its Python is one that the package accepts."""
    for name in ("base", "nodes"):
        (kustomization,) = documents(f"{name}/kustomization.yaml")
        assert [image["newTag"] for image in kustomization["images"]] == [VERSION]
    python = re.findall(r"^FROM python:3\.(\d+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert int(python[0]) >= int(required.removeprefix(">=3."))


def test_grafana_is_the_version_that_its_dashboards_are_written_for() -> None:
    sdk = re.findall(r"grafana-foundation-sdk==\d+!(\S+?)\"", (ROOT / "pyproject.toml").read_text())
    assert compose()["services"]["grafana"]["image"] == f"grafana/grafana:{sdk[0]}"


def test_secrets_are_those_that_the_script_writes(tmp_path: Path) -> None:
    """secrets.sh is run; compose's files and Kubernetes' items exist in what it writes, and no secret is open."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["sh", str(DEPLOY / "secrets.sh"), "secrets"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=60)
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr[:26]) == (2, "secrets holds keys already")
    for name, entry in compose()["secrets"].items():
        path = tmp_path / entry["file"]
        assert path.is_file()
        assert path.stat().st_mode & 0o077 == 0 or not name.endswith(("secret", "token", "password"))
    assert re.fullmatch("[0-9a-f]{48}", (tmp_path / "secrets/token").read_text())
    files = {path.name for path in (tmp_path / "secrets").rglob("*") if path.is_file()}
    for pod in pods().values():
        for volume in pod["spec"]["volumes"]:
            for item in volume.get("secret", {}).get("items", []):
                assert item["key"] in files
                assert (tmp_path / "secrets/keys" / item["path"]).is_file()
    for role, needed in (("trainer", {"server.key", "server.key_secret", "clients/client.key"}),
                         ("producer", {"server.key", "client.key_secret"})):  # fmt: skip
        targets = {use["target"].removeprefix("/run/secrets/keys/") for use in compose()["services"][role]["secrets"]}
        assert targets == needed


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_secrets_of_kubernetes(tmp_path: Path) -> None:
    """create-secrets.sh is run, without a cluster: what pods mount is what it makes."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["sh", DEPLOY / "secrets.sh", tmp_path / "new"], env=environment, check=True, capture_output=True)
    create = ["sh", DEPLOY / "kubernetes/create-secrets.sh", tmp_path / "new", "--dry-run=client", "--output=yaml"]
    process = subprocess.run(create, env=environment, check=True, capture_output=True, text=True, timeout=60)
    secrets = {secret["metadata"]["name"]: set(secret["data"]) for secret in yaml.safe_load_all(process.stdout)}
    volumes = [volume["secret"] for pod in pods().values() for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert {secret["secretName"] for secret in volumes} == set(secrets)
    for secret in volumes:
        assert {item["key"] for item in secret.get("items", [])} <= secrets[secret["secretName"]]
    assert secrets["sluice-producer-keys"] == {"server.key", "client.key_secret"}


def test_the_page_names_files_that_exist() -> None:
    """In the commands of docs/deployment.md."""
    commands = re.findall(r"(?m)^    .+", (ROOT / "docs/deployment.md").read_text())
    paths = {path for command in commands for path in re.findall(r"(?<![\w/])deploy/[\w./@*-]+", command)}
    assert len(paths) > 5
    assert [
        path for path in paths if not list(ROOT.glob(path)) and path not in ("deploy/secrets", "deploy/sluice-monitor")
    ] == []


@pytest.mark.parametrize(
    ("command", "stop", "code"),
    [("exit 0", False, 0), ("exit 2", False, 2), ("exit 78", False, 78),
     ("trap 'exit 0' TERM; touch ready; while :; do sleep 0.1; done", True, 143),
     ("trap 'exit 1' TERM; touch ready; while :; do sleep 0.1; done", True, 1)],
)  # fmt: skip
def test_until_done(command: str, stop: bool, code: int, tmp_path: Path) -> None:
    """A command that was asked to stop and did so is not done: its Job tries again."""
    script = DEPLOY / "kubernetes/nodes/until-done.sh"
    process = subprocess.Popen(["sh", str(script), "sh", "-c", command], cwd=tmp_path)
    if stop:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.wait(120) == code


def test_nothing_listens_to_strangers_without_a_secret() -> None:
    """Where an address is not loopback, keys and a token are set; metrics are closed by the network."""
    for _, words, run_file in COMMANDS:
        settings = read_run_file(SETTINGS[words[0]], run_file, words[2:])
        if words[0] == "sluice-monitor":
            assert settings.monitor.host == "127.0.0.1" or settings.monitor.token_file is not None
        else:
            assert settings.stream.endpoint.startswith("tcp://127.0.0.1:") or settings.stream.keys is not None
    policies = {document["metadata"]["name"]: document for document in documents("base/network.yaml")}
    assert set(policies) == {"sluice-trainer", "sluice-producer", "sluice-monitor"}
    assert all(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())
