"""The commands of an installation: names, version, completion, and packages of others that are in the way."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from producer.common.completion import setting_keys
from producer.common.version import VERSION
from trainer.__main__ import COMMANDS
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPTS = ("sluice-producer", "sluice-trainer", "sluice-monitor", "sluice-demo")

needs_scripts = pytest.mark.skipif(
    not (BIN / "sluice-demo").is_file(), reason="the scripts are not installed: pip install -e ."
)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


@needs_scripts
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_its_own_name_and_version(script: str, tmp_path: Path) -> None:
    """In usage lines too, where what is shown can be typed as it stands."""
    path = {"PATH": f"{BIN}:/usr/bin:/bin"}
    assert run(script, "--version", cwd=tmp_path, **path).stdout == f"Sluice {VERSION}\n"
    assert run(script, "--help", cwd=tmp_path, **path).stdout.startswith(f"usage: {script} [-h]")
    away = run(str(BIN / script), "--help", cwd=tmp_path, PATH="/usr/bin:/bin").stdout
    assert away.startswith(f"usage: {script if script == 'sluice-demo' else BIN / script} [-h]")


@needs_scripts
def test_subcommands_say_the_name_of_the_script(tmp_path: Path) -> None:
    path = {"PATH": f"{BIN}:/usr/bin:/bin"}
    for command in COMMANDS:
        help_text = run("sluice-trainer", command, "--help", cwd=tmp_path, **path).stdout
        assert help_text.startswith(f"usage: sluice-trainer {command} [-h]")


@pytest.mark.parametrize("module", ["producer", "trainer", "monitor", "deploy.demo"])
def test_help_comes_at_once(module: str) -> None:
    """Under a second of processor time, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(sys.executable, "-m", module, "--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def completions(line: str, cwd: Path, output: Path) -> set[str]:
    """What bash, through argcomplete, would offer at the end of `line`."""
    package = line.split()[0].removeprefix("sluice-")
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(output),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(ROOT),
    }
    run(sys.executable, "-m", package, cwd=cwd, **environment)
    return {word.strip() for word in output.read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sluice-trainer ", {"ctl", "check", "export", "estimate", "mine.toml", "folder/"}),
        ("sluice-trainer mine.toml optimizer.l", {"optimizer.learning_rate="}),
        ("sluice-trainer ctl folder ret", {"retry-quarantined"}),
        ("sluice-trainer export folder --format sae", {"saelens"}),
        ("sluice-producer ", {"keys", "fetch-example", "mine.toml"}),
        ("sluice-monitor mine.toml monitor.tok", {"monitor.token_file="}),
        ("sluice-monitor pull http://x --fol", {"--follow"}),
    ],
)
def test_a_shell_completes(line: str, offered: set[str], tmp_path: Path) -> None:
    """Commands, run files, settings and options."""
    (tmp_path / "mine.toml").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.json").touch()
    words = completions(line, tmp_path, tmp_path / "offered.txt")
    assert offered <= words
    assert "other.json" not in words


def test_completed_settings_are_those_of_the_run_file() -> None:
    keys = set(setting_keys(TrainerSettings))
    assert {"run.tokens", "model.name", "stream.keys", "checkpoint.every_seconds"} <= keys
    assert not [key for key in keys if key.startswith("sae.")]


@pytest.mark.parametrize("package", ["producer", "monitor"])
def test_a_package_of_the_same_name_is_told(package: str, tmp_path: Path) -> None:
    """Another distribution's `trainer` comes first on the path: a sentence and exit code 2, not a traceback."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("from trainer.elsewhere import Trainer\n")
    process = run(sys.executable, "-P", "-m", package, "--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.returncode == 2
    assert process.stderr.startswith(f'the package "trainer" at {tmp_path}/trainer/__init__.py is not Sluice\'s')
    assert len(process.stderr.splitlines()) == 1
