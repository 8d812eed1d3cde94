"""The house rules of imports: against the data's direction, only onto contracts, and contracts stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("producer", "trainer", "monitor")

CONTRACTS = {
    "producer": {
        "producer.wire", "producer.report", "producer.metrics", "producer.settings", "producer.keys",
        # for evaluation and tuning: the language model, and the text it reads
        "producer.lm.model", "producer.lm.loading", "producer.lm.errors", "producer.lm.unembedding",
        "producer.lm.passes", "producer.lm.precision", "producer.lm.revisions", "producer.corpus",
        "producer.corpus.held_out", "producer.corpus.rendering.windows", "producer.corpus.sources.jsonl",
        # what every process needs
        *(f"producer.common.{path.stem}" for path in (ROOT / "producer/common").glob("*.py")),
    },
    "trainer": {
        "trainer.snapshot", "trainer.report", "trainer.phases", "trainer.metrics", "trainer.settings",
        "trainer.state.durable", "trainer.saes.hooks", "trainer.saes.inference", "trainer.saes.description",
        "trainer.scaling.report",
    },
    "monitor": set(),
}  # fmt: skip
"""What another stage may import of each stage."""

LIGHT = (
    "producer.wire",
    "producer.report",
    "producer.settings",
    "producer.common.parsing",
    "producer.common.addresses",
    "producer.common.toml",
    "producer.common.run_file",
    "producer.common.command_line",
    "producer.common.shell",
    "trainer.report",
    "trainer.phases",
    "trainer.settings",
    "trainer.snapshot",
    "trainer.saes.hooks",
    "trainer.scaling.report",
)
HEAVY = {"torch", "transformers", "zmq"}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from trainer import snapshot` names a module, `from trainer.training.loop import Loop` something in one.
            modules |= {
                f"{node.module}.{alias.name}" if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                else node.module
                for alias in node.names
            }  # fmt: skip
    return modules


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_upstream_only_and_onto_contracts(package: str) -> None:
    """monitor → trainer → producer, and there only the contracts."""
    upstream = PACKAGES[: PACKAGES.index(package)]
    for path in modules(package):
        for module in imports_of(path):
            owner = module.split(".")[0]
            if owner in PACKAGES and owner != package:
                assert owner in upstream, f"{path} imports {module}, which is downstream of {package}"
                assert module in CONTRACTS[owner], f"{path} imports {module}, which is no contract of {owner}"


def test_no_process_needs_what_draws_the_dashboards() -> None:
    """Grafana's SDK is a dependency of development: it stays inside monitor/grafana, which nobody imports."""
    importers = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in modules(package)
        if any(name.startswith(("grafana_foundation_sdk", "monitor.grafana")) for name in imports_of(path))
    }
    assert importers == {"monitor/grafana/generate.py", "monitor/grafana/panels.py"}


def test_there_are_no_import_cycles() -> None:
    """No module of ours can reach itself through imports."""
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): {
            module for module in imports_of(path) if module.split(".")[0] in PACKAGES
        }
        for package in PACKAGES
        for path in modules(package)
    }

    def reachable(start: str) -> set[str]:
        modules: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in modules:
                modules.add(module)
                waiting += graph.get(module, ())
        return modules

    assert [module for module in graph if module in reachable(module)] == []


@pytest.mark.parametrize("package", [path.parent for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")])
def test_a_package_names_its_modules(package: Path) -> None:
    """Its docstring lists every module and folder with Python in it, each as a word, in reading order."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    parts = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    parts += [path.parent.name for path in package.glob("*/__init__.py")]

    assert docstring is not None
    assert [part for part in parts if not re.search(rf"\b{part}\b", docstring)] == []


def test_the_shared_package_imports_no_other() -> None:
    """producer/common is below everything."""
    for path in (ROOT / "producer/common").glob("*.py"):
        ours = {module for module in imports_of(path) if module.split(".")[0] in PACKAGES}
        assert {module for module in ours if not module.startswith("producer.common")} == set(), path


@pytest.mark.parametrize("module", LIGHT)
def test_contracts_are_light(module: str) -> None:
    """A contract can be imported without torch, transformers or zmq: by a dashboard, a script, a test."""
    code = f"import sys, {module}; print(','.join(sorted({HEAVY!r} & set(sys.modules))))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert process.stdout.strip() == ""


def test_nothing_unpickles() -> None:
    """No pickle, torch.load, eval or recv_pyobj anywhere near a socket or a file."""
    banned = ("import pickle", "torch.load(", "recv_pyobj", "send_pyobj", "allow_pickle=True", " eval(")
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text()
            assert not [word for word in banned if word in text], path


def test_json_and_toml_are_parsed_in_one_place() -> None:
    """What the parsers raise besides their own errors is known to producer.common.parsing alone."""
    parsers = {"json.loads", "json.load", "tomllib.loads", "tomllib.load", "json.JSONDecoder"}
    callers = {
        path.relative_to(ROOT).as_posix()
        for package in (*PACKAGES, "deploy")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in parsers
    }
    assert callers == {"producer/common/parsing.py"}
