"""The commands that we show: typed as they stand, into the shell that shows them, they run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from producer.common.shell import shell_command

ROOT = Path(__file__).parent.parent


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python in `.venv/bin` of the working directory, not on the PATH."""
    executable = tmp_path / "some folder" / ".venv" / "bin" / "python"
    executable.parent.mkdir(parents=True)
    executable.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(executable.parents[2])
    return executable


def test_it_names_the_python_that_runs(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its name where that leads to it, else as it is reached from here, else from anywhere, quoted."""
    assert shell_command("monitor", "RUN.toml") == ".venv/bin/python -m monitor RUN.toml"
    assert shell_command("monitor", "top", anywhere=True) == f"'{python}' -m monitor top"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert shell_command("trainer", 'model.hooks=["a b"]') == f"""'{python}' -m trainer 'model.hooks=["a b"]'"""
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin:/bin")
    assert shell_command("trainer") == "python -m trainer"


def test_what_is_shown_can_be_typed(monkeypatch: pytest.MonkeyPatch):
    """Into a shell without the virtual environment: the trainer itself answers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    line = shell_command("trainer", "check", "nowhere at all")
    process = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "nowhere at all is no run directory" in process.stdout + process.stderr


def test_no_message_writes_a_command_by_hand():
    """`python` alone is another Python where the environment is not active; docstrings may speak of it."""
    for package in ("producer", "trainer", "monitor", "deploy"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docstrings = {node.body[0].value for node in ast.walk(tree) if isinstance(node, holders)
                          if node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                    assert "python -m" not in node.value or path.name == "live_page.py", f"{path}: {node.value}"


COMMANDS = [
    (package, command, module)
    for package in ("trainer", "monitor")
    for command, module in import_module(f"{package}.__main__").COMMANDS.items()
]


@pytest.mark.parametrize(("package", "command", "module"), COMMANDS)
def test_the_help_of_a_command_ends_with_examples(
    package: str, command: str, module: str, capsys: pytest.CaptureFixture[str]
):
    """Each begins as a shell takes it, and names options that the help explains."""
    with pytest.raises(SystemExit) as end:
        import_module(module).main(["--help"])
    explanations, _, examples = capsys.readouterr().out.partition("\nexample")
    lines = examples.splitlines()[1:]
    assert end.value.code == 0 and lines
    for line in lines:
        assert line.startswith(f"  {shell_command(package, command)} ")
        for word in line.split():
            if word.startswith("--"):
                assert re.search(rf"^ +(-\w, )?{word}\b", explanations, re.MULTILINE), f"{word} of {line!r}"
