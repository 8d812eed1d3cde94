"""Every file of deploy/ passes its check, and a typo planted in it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deploy.checks import BIN, DEPLOY, check_of, kubernetes_faults, prometheus_faults, systemd_faults

TYPOS = [
    # (file, what stands there, what is planted)
    ("Dockerfile", "RUN apt-get", "RUNN apt-get"),
    ("Dockerfile", "FROM python:3.12-slim@sha256:", "FROM python:3.12-slim#sha256:"),
    ("Dockerfile", "COPY trainer trainer", "COPY trianer trainer"),
    ("Dockerfile", "USER 10001:10001", "USR 10001:10001"),
    ("Dockerfile.dockerignore", "!monitor", "!moniter"),
    ("Dockerfile.dockerignore", "deploy/secrets", "deploy/secret"),
    ("compose.yaml", "stop_grace_period: 330s", "stop_grace_perod: 330s"),
    ("compose.yaml", "cap_drop: [ALL]", "cap_dorp: [ALL]"),
    ("compose.yaml", "source: server_secret,", "source: server_secrt,"),
    ("compose.yaml", "alerts.yml:/etc", "alrts.yml:/etc"),
    ("compose.yaml", "volumes: [runs:/runs, cache:/cache]\n    ports", "volumes: [run:/runs, cache:/cache]\n    ports"),
    ("compose/prometheus.yml", "scrape_interval", "scrape_intervall"),
    ("compose/prometheus.yml", "recording.yml", "recordings.yml"),
    ("compose/datasource.yml", "uid: sluice", "uid: sluce"),
    ("demo.toml", "learning_rate", "learning_rat"),
    ("gpt2.toml", "kind = \"huggingface\"", "kind = \"hugingface\""),
    ("smollm2.toml", "hooks = [", "hoks = ["),
    ("mixture.toml", "weight = 0.7", "wieght = 0.7"),
    ("follow.toml", "watch = ", "wach = "),
    ("activations.toml", "positions = ", "position = "),
    ("files.toml", "shard_bytes", "shard_byte"),
    ("scaling.toml", "grid = { d_sae", "grid = { d_sea"),
    ("suite.toml", "hook = \"blocks.*.hook_resid_post\"", "hook = \"blocks.*.hook_resid_pots\""),
    ("chat.toml", "roles = [\"assistant\"]", "roles = [\"asistant\"]"),
    ("architectures.toml", "target_l0", "target_lo"),
    ("secrets.sh", "uid=${2:-}", "uid=${2:-"),
    ("secrets.sh", "$dir/keys\" ]; then", "$dri/keys\" ]; then"),
    ("kubernetes/create-secrets.sh", "shift\n", "shfit() {\n"),
    ("kubernetes/create-secrets.sh", "$dir/token", "$dri/token"),
    ("kubernetes/base/kustomization.yaml", "configMapGenerator", "configMapGenerater"),
    ("kubernetes/base/kustomization.yaml", "newName: registry", "newNmae: registry"),
    ("kubernetes/base/namespace.yaml", "kind: Namespace", "kind: Namepsace"),
    ("kubernetes/base/storage.yaml", "accessModes", "accesModes"),
    ("kubernetes/base/storage.yaml", "name: runs", "name: run"),
    ("kubernetes/base/trainer.yaml", "terminationGracePeriodSeconds", "terminationGracePeriodSecnds"),
    ("kubernetes/base/trainer.yaml", "clusterIP: None\n", "clusterIp: None\n"),
    ("kubernetes/base/trainer.yaml", "path: /healthz, port: metrics", "path: /healthz, port: metric"),
    ("kubernetes/base/trainer.yaml", "maxUnavailable", "maxUnavailabel"),
    ("kubernetes/base/producer.yaml", "tolerations", "toleratoins"),
    ("kubernetes/base/producer.yaml", "configMap: {name: run-file}", "configMap: {name: runfile}"),
    ("kubernetes/base/monitor.yaml", "targetPort: page", "targetPort: pages"),
    ("kubernetes/base/monitor.yaml", "podAffinity", "podAfinity"),
    ("kubernetes/base/network.yaml", "component: producer\n      ports", "component: producers\n      ports"),
    ("kubernetes/base/network.yaml", "policyTypes", "policyType"),
    ("kubernetes/base/run.toml", "token_file", "tokenfile"),
    ("kubernetes/nodes/kustomization.yaml", "until-done.sh]", "until-dome.sh]"),
    ("kubernetes/nodes/kustomization.yaml", "patches:", "patchs:"),
    ("kubernetes/nodes/references.yaml", "volumes/configMap", "volume/configMap"),
    ("kubernetes/nodes/jobset.yaml", "parallelism: 4", "paralelism: 4"),
    ("kubernetes/nodes/jobset.yaml", "onExitCodes", "onExitCode"),
    ("kubernetes/nodes/jobset.yaml", "readOnlyRootFilesystem", "readOnlyRootFileSystem"),
    ("kubernetes/nodes/jobset.yaml", "action: FailJobSet", "action: FailJobset"),
    ("kubernetes/nodes/until-done.sh", "while kill", "whle kill"),
    ("kubernetes/operator/kustomization.yaml", "podmonitor.yaml", "podmoniter.yaml"),
    ("kubernetes/operator/podmonitor.yaml", "podMetricsEndpoints", "podMetricEndpoints"),
    ("kubernetes/operator/podmonitor.yaml", "label_app_kubernetes_io_instance", "label_app_kubernetes_io_instnace"),
    ("kubernetes/operator/rules.yaml", "sluice_data_wait_ratio", "sluice_data_wait_rate"),
    ("kubernetes/keda/kustomization.yaml", "/spec/replicas", "/spec/replica"),
    ("kubernetes/keda/scaledobject.yaml", "maxReplicaCount", "maxReplicasCount"),
    ("kubernetes/keda/scaledobject.yaml", "threshold:", "treshold:"),
    ("kubernetes/keda/scaledobject.yaml", "  scaleTargetRef:\n    name: sluice-producer",
     "  scaleTargetRef:\n    name: sluice-producers"),
    ("kubernetes/scaled/kustomization.yaml", "components:", "component:"),
    ("slurm/sluice.sbatch", "wait \"$trainer\"\ncode=$?", "wait \"$trainr\"\ncode=$?"),
    ("slurm/producers.sbatch", "code=$?", "cod=$?"),
    ("systemd/sluice-trainer@.service", "TimeoutStopSec", "TimeoutStopSecs"),
    ("systemd/sluice-trainer@.service", "ProtectSystem=strict", "ProtectSystem=strickt"),
    ("systemd/sluice-producer@.service", "RestartPreventExitStatus=2 78", "RestartPreventExitStatus=2 R78"),
    ("systemd/sluice-monitor@.service", "DynamicUser=yes", "DynamicUser=ja"),
    ("systemd/sluice-trainer@.service.d/keys.conf", "LoadCredential", "LoadCredentials"),
    ("systemd/sluice-producer@.service.d/keys.conf", "[Service]", "[Services]"),
    ("systemd/sluice-monitor@.service.d/token.conf", "Environment=", "Enviroment="),
    ("systemd/sluice.target", "Description", "Descripton"),
]  # fmt: skip
FILES = sorted(
    path.relative_to(DEPLOY).as_posix()
    for path in DEPLOY.rglob("*")
    if path.is_file() and path.suffix != ".py" and "pins" not in path.name
    if not {"__pycache__", "secrets"} & set(path.relative_to(DEPLOY).parts[:-1])
)
TOOLS = {kubernetes_faults: "kubectl", prometheus_faults: "promtool", systemd_faults: "systemd-analyze"}


def check_file(name: str, deploy: Path) -> list[str]:
    check = check_of(deploy / name, deploy)
    assert check is not None, f"deploy/{name} has no check"
    if check in TOOLS and shutil.which(TOOLS[check]) is None:
        pytest.skip(f"{TOOLS[check]} is not installed")
    if not (BIN / "hadolint").exists():
        pytest.skip("the checkers are not installed: pip install -e '.[dev]'")
    return check(deploy / name)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("secrets", "__pycache__")))


@pytest.mark.parametrize("name", FILES)
def test_a_file_passes_its_check(name: str, copy: Path) -> None:
    assert check_file(name, copy) == []


@pytest.mark.parametrize(("name", "text", "typo"), TYPOS, ids=[f"{name}-{typo.split()[0]}" for name, _, typo in TYPOS])
def test_a_planted_typo_is_found(name: str, text: str, typo: str, copy: Path) -> None:
    original = (copy / name).read_text()
    assert text in original
    (copy / name).write_text(original.replace(text, typo, 1))
    assert check_file(name, copy) != []


def test_every_file_has_had_a_typo() -> None:
    assert {name for name, _, _ in TYPOS} == set(FILES)
