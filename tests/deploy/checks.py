"""What can be said of each file of deploy/ without an engine, a cluster or a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from deploy.prometheus_rule import prometheus_rule
from monitor.settings import MonitorSettings
from producer.common.run_file import read_run_file
from producer.common.toml import SettingsError
from producer.settings import ProducerSettings
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES_VERSION = "1.32"
OVERLAYS = {"base": "base", "nodes": "nodes", "operator": "scaled", "keda": "scaled", "scaled": "scaled"}
"""Where the files of a folder are looked at: in the base, or in the overlay that uses them."""
CUSTOM_KINDS = ("JobSet", "PodMonitor", "PrometheusRule", "ScaledObject")
MOST_EXPOSED = 40
"""Tenths of systemd's measure of a unit's exposure; 100 is a unit without any protection."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def output_if_failed(*command: str | Path, **options: Any) -> list[str]:
    process = run(*command, **options)
    return [process.stdout + process.stderr] if process.returncode else []


# --- Containers ------------------------------------------------------------------------------------------------------


def dockerfile_faults(path: Path) -> list[str]:
    """hadolint's, and what is copied that is not there."""
    missing = [
        f"COPY {source}: not in the repository"
        for line in re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE)
        for source in line.split()
        if not (ROOT / source).exists()
    ]
    return output_if_failed(BIN / "hadolint", path) + missing


def dockerignore_faults(path: Path) -> list[str]:
    """What is let in exists, and all that the Dockerfile copies is let in."""
    allowed = {line[1:] for line in path.read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", path.with_suffix("").read_text(), re.MULTILINE)
    needed = {source.split("/")[0] for line in copied for source in line.split()}
    others = {line.split("/")[-1] for line in path.read_text().splitlines() if not line.startswith("!")}
    return [f"{name} is let in or copied, not both" for name in allowed ^ needed] + [
        f"{name} is to stay outside and may not" for name in {"*", "__pycache__", "secrets"} - others
    ]


def compose_faults(path: Path) -> list[str]:
    """The specification's own schema, and names within the file that lead nowhere."""
    faults = output_if_failed(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    return [*faults, *_dangling_in_compose(yaml.safe_load(path.read_text()), path.parent)]


def _dangling_in_compose(project: dict[str, Any], folder: Path) -> Iterator[str]:
    for name, service in project["services"].items():
        for kind in ("secrets", "configs"):
            for use in service.get(kind, []):
                if use["source"] not in project.get(kind, {}):
                    yield f"{name}: there is no entry {use['source']} under {kind}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                if not (folder / source).exists() and not (DEPLOY / source).exists():
                    yield f"{name}: {source} does not exist"
            elif source not in project["volumes"]:
                yield f"{name}: there is no volume {source}"
        for other in service.get("depends_on", []):
            if other not in project["services"]:
                yield f"{name}: there is no service {other}"


def prometheus_faults(path: Path) -> list[str]:
    """promtool's, with the rules beside the file as compose.yaml mounts them."""
    folder = path.parent / "mounted"
    folder.mkdir(exist_ok=True)
    for source in (path, ROOT / "monitor/prometheus/alerts.yml", ROOT / "monitor/prometheus/recording.yml"):
        shutil.copy(source, folder)
    return output_if_failed("promtool", "check", "config", folder / path.name)


def datasource_faults(path: Path) -> list[str]:
    """The one of monitor/grafana but for the address, which is that of the service."""
    own, original = (
        yaml.safe_load(file.read_text())
        for file in (path, ROOT / "monitor/grafana/provisioning/datasources/sluice.yml")
    )
    original["datasources"][0]["url"] = "http://prometheus:9090"
    return [] if own == original else [f"{own} differs from {original}"]


# --- Run files and scripts -------------------------------------------------------------------------------------------


def run_file_faults(path: Path) -> list[str]:
    """What the three processes say to it."""
    faults = []
    for kind in (ProducerSettings, TrainerSettings, MonitorSettings):
        try:
            read_run_file(kind, path, [])
        except SettingsError as error:
            faults.append(str(error))
    return faults


def script_faults(path: Path) -> list[str]:
    return output_if_failed(BIN / "shellcheck", "--enable=check-unassigned-uppercase,quote-safe-variables", path)


def batch_faults(path: Path) -> list[str]:
    """shellcheck's. Slurm's own opinion of the directives is in test_slurm."""
    return output_if_failed(BIN / "shellcheck", path)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def kubernetes_faults(path: Path) -> list[str]:
    """Of the overlay that a file belongs to, as kustomize renders it: kinds and keys, and references within it."""
    process = run("kubectl", "kustomize", path.parent.parent / OVERLAYS[path.parent.name])
    if process.returncode:
        return [process.stderr]
    resources = list(yaml.safe_load_all(process.stdout))
    faults = [fault for resource in resources for fault in resource_faults(resource)]
    return faults or reference_faults(resources)


def resource_faults(resource: dict[str, Any]) -> list[str]:
    kind = resource.get("kind")
    try:
        if kind in CUSTOM_KINDS:
            schema = json.loads((SCHEMAS / f"{kind.lower()}.json").read_text())
            jsonschema.validate(resource, _closed(schema))
        else:
            kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return [f"{kind}: {error}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"there is no kind {error}"]
    return []


def _closed(schema: Any) -> Any:
    """A definition's schema in which keys that it does not name are refused, as `kubectl apply` warns of them."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    if set(schema.get("properties", {})) >= {"apiVersion", "kind", "metadata"}:
        closed["properties"]["metadata"] = {"type": "object"}
    return closed


def reference_faults(resources: list[dict[str, Any]]) -> list[str]:
    """ConfigMaps, claims and ports by name, images that have a registry, and labels that select a pod."""
    names = {(one["kind"], one["metadata"]["name"]) for one in resources}
    pods = [template for resource in resources for template in _pod_templates(resource)]
    labels = [template["metadata"]["labels"] for template in pods]
    faults = []
    for template in pods:
        spec = template["spec"]
        for volume in spec["volumes"]:
            for kind, key, name in (
                ("ConfigMap", "configMap", "name"),
                ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
            ):
                if key in volume and (kind, volume[key][name]) not in names:
                    faults.append(f"there is no {kind} {volume[key][name]}")
        for container in spec["containers"]:
            if "/" not in container["image"] or ":" not in container["image"]:
                faults.append(f"the image {container['image']} is not replaced by one with registry and tag")
            if unmounted := {mount["name"] for mount in container["volumeMounts"]} ^ {
                volume["name"] for volume in spec["volumes"]
            }:
                faults.append(f"{container['name']}: {unmounted} is a volume or a mount, not both")
            ports = {port["name"] for port in container["ports"]}
            for probe in ("livenessProbe", "startupProbe", "readinessProbe"):
                if probe in container and container[probe]["httpGet"]["port"] not in ports:
                    faults.append(f"{container['name']}: {probe} asks a port that is not there")
    all_ports = {port["name"] for template in pods for one in template["spec"]["containers"] for port in one["ports"]}
    for resource in resources:
        for selector in _selectors(resource):
            if not any(selector.items() <= label.items() for label in labels):
                faults.append(f"{resource['kind']} {resource['metadata']['name']}: {selector} selects no pod")
        for port in _port_names(resource):
            if port not in all_ports:
                faults.append(f"{resource['kind']} {resource['metadata']['name']}: no pod has a port {port}")
        if resource["kind"] == "ScaledObject":
            target = resource["spec"]["scaleTargetRef"]["name"]
            if ("Deployment", target) not in names:
                faults.append(f"ScaledObject: there is no Deployment {target}")
            deployment = next((one for one in resources if one["metadata"]["name"] == target), {"spec": {}})
            if "replicas" in deployment["spec"]:
                faults.append("ScaledObject: the Deployment sets its number of replicas as well")
    return faults


def _pod_templates(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = resource.get("spec", {})
    if resource["kind"] == "JobSet":
        yield from (job["template"]["spec"]["template"] for job in spec["replicatedJobs"])
    elif "template" in spec:
        yield spec["template"]


def _selectors(resource: dict[str, Any]) -> Iterator[dict[str, str]]:
    spec = resource.get("spec", {})
    if resource["kind"] == "Service":
        yield spec["selector"]
    elif resource["kind"] == "NetworkPolicy":
        yield spec["podSelector"]["matchLabels"]
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "podSelector" in peer:
                    yield peer["podSelector"]["matchLabels"]
    elif resource["kind"] in ("PodMonitor", "PodDisruptionBudget"):
        yield spec["selector"]["matchLabels"]


def _port_names(resource: dict[str, Any]) -> Iterator[str]:
    spec = resource.get("spec", {})
    if resource["kind"] == "Service":
        yield from (port["targetPort"] for port in spec["ports"])
    elif resource["kind"] == "NetworkPolicy":
        ports = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
        yield from (port for port in ports if isinstance(port, str))
    elif resource["kind"] == "PodMonitor":
        yield from (endpoint["port"] for endpoint in spec["podMetricsEndpoints"])


def rules_faults(path: Path) -> list[str]:
    """Those of monitor/prometheus, unchanged."""
    return [] if path.read_text() == prometheus_rule() else ["not as deploy.prometheus_rule writes it"]


# --- systemd ---------------------------------------------------------------------------------------------------------


def systemd_faults(path: Path) -> list[str]:
    """`systemd-analyze verify` prints and exits 0; `security` exits 1 above its threshold."""
    folder = next(parent for parent in path.parents if parent.name == "systemd")
    units = folder.parent / "units"
    shutil.copytree(folder, units, dirs_exist_ok=True)
    for unit in units.glob("*.service"):
        # It wants the program to exist.
        unit.write_text(unit.read_text().replace("ExecStart=/opt/sluice/bin/", "ExecStart=/bin/true "))
    template = path.relative_to(folder).parts[0].partition(".service")[0]
    name = template if template.endswith(".target") else f"{template}demo.service"
    process = run("systemd-analyze", "verify", name, SYSTEMD_UNIT_PATH=f"{units}:/lib/systemd/system")
    faults = [process.stdout + process.stderr] if process.stdout + process.stderr or process.returncode else []
    if name.endswith(".service"):
        unit = units / f"{template}.service"
        security = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}"]
        faults += output_if_failed(*security, unit)
    return faults


CHECKS: list[tuple[str, Callable[[Path], list[str]]]] = [
    ("Dockerfile", dockerfile_faults),
    ("Dockerfile.dockerignore", dockerignore_faults),
    ("compose.yaml", compose_faults),
    ("compose/prometheus.yml", prometheus_faults),
    ("compose/datasource.yml", datasource_faults),
    ("kubernetes/operator/rules.yaml", rules_faults),
    ("kubernetes/**/*.yaml", kubernetes_faults),
    ("kubernetes/**/*.toml", run_file_faults),
    ("systemd/**/*.*", systemd_faults),
    ("slurm/*.sbatch", batch_faults),
    ("**/*.sh", script_faults),
    ("*.toml", run_file_faults),
]
"""Patterns of files under deploy/, and the check of each; the first that matches counts."""


def check_of(path: Path, deploy: Path) -> Callable[[Path], list[str]] | None:
    for pattern, check in CHECKS:
        if path in deploy.glob(pattern):
            return check
    return None
