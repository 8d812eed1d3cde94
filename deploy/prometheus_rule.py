"""`python -m deploy.prometheus_rule`: writes alerts and recording rules as the Prometheus operator takes them.

The rules are those of monitor/prometheus; kustomize cannot put a file into a resource.
"""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "monitor/prometheus/recording.yml", ROOT / "monitor/prometheus/alerts.yml")
TARGET = ROOT / "deploy/kubernetes/operator/rules.yaml"
HEADER = "# Generated from monitor/prometheus by the module deploy.prometheus_rule.\n"


def prometheus_rule() -> str:
    """The PrometheusRule as YAML."""
    groups = []
    for source in SOURCES:
        groups += [
            group | {"name": f"{source.stem}-{group['name']}"} for group in yaml.safe_load(source.read_text())["groups"]
        ]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "sluice"},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.safe_dump(resource, sort_keys=False, width=110)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule())
